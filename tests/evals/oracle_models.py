"""Model directories that lm-evaluation-harness and transformers read as well as the project: random, and the same
wherever they are made.

Nothing in them is trained, not even the tokenizers, so that a record of what another program said of them stays true:
`spm` writes a space before each text and characters as pieces, as SentencePiece models do, and documents begin with
<s>; `bytes` is byte-level as GPT-2's, without a token at the beginning, and writes " A" as two tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONTEXT = 4096
MERGES = ["▁ A", "▁ B", "▁ C", "▁ D", "答 案", "答案 ：", "题 目", "选 项", "选 择", "正 确", ". ▁", "\n ▁"]


def write_oracle_model(directory: Path, kind: str, context: int = CONTEXT) -> Path:
    """A Hugging Face directory with a LLaMA of two layers in fp32.

    Args:
        kind: "spm" or "bytes".
        context: tokens that the model, and with it lm-evaluation-harness, takes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, config = _spm() if kind == "spm" else _bytes()
    tokenizer.save(str(directory / "tokenizer.json"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": context}))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            bos_token_id=1 if kind == "spm" else None,
            eos_token_id=2 if kind == "spm" else 0,
            pad_token_id=None,
        )
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            scale = 1.0 if "embed" in name else 0.4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (1.0 if "norm" in name else 0))
    model.save_pretrained(directory)
    return directory


def _spm() -> tuple[Tokenizer, dict[str, object]]:
    hanzi = [bytes((row, cell)).decode("gb2312") for row in range(0xB0, 0xD7) for cell in range(0xA1, 0xFF)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n"]
    pieces += [chr(code) for code in range(33, 127)] + list("，。、；：？！（）“”《》．") + hanzi
    pieces += [merge.replace(" ", "") for merge in MERGES]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return tokenizer, named | {"add_eos_token": False}


def _bytes() -> tuple[Tokenizer, dict[str, object]]:
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, {"eos_token": "<|endoftext|>"}
