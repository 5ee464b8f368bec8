"""The decoder, its heads, its tokenizer and Hugging Face directories. Knows nothing of distribution."""
