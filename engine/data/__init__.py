"""Text to tokens to packed batches, in an order that is a pure function of a cursor."""
