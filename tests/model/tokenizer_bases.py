"""Tokenizer directories that stand for downloaded bases, made on the spot: a LLaMA and a Qwen in small."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SUBJECTS = ["高血压病人", "糖尿病患者", "发热的儿童", "孕妇", "老年人", "慢性肾病患者", "哮喘患者", "术后病人"]
ADVICE = [
    "应当低盐饮食",
    "需要监测血糖",
    "可口服对乙酰氨基酚",
    "避免使用布洛芬",
    "每日测量血压",
    "忌食辛辣",
    "应及时就医",
]
REASONS = ["以免诱发心力衰竭", "以防止低血糖反应", "因为肾功能减退", "否则可能出现过敏性休克", "从而减轻气道炎症"]
ENGLISH = ["The patient took aspirin (100 mg) twice.", "blood pressure: 120/80 mmHg", "  a cough lasting 3 weeks"]


def sentences(seed: int, count: int) -> list[str]:
    """Medical sentences put together at random from a few parts."""
    draw = random.Random(seed).choice
    return [f"{draw(SUBJECTS)}{draw(ADVICE)}，{draw(REASONS)}。{draw(ENGLISH)}" for _ in range(count)]


def llama_model(**options: Any) -> bytes:
    """A small SentencePiece model with LLaMA's settings: dummy prefix, whitespace kept, byte fallback."""
    writer = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 420,
        "model_type": "bpe",
        "character_coverage": 1.0,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "pad_id": -1,
        "minloglevel": 2,
        **options,
    }
    text = [*ENGLISH, "血压偏高的病人，一日三次。", "a fever, 38.5 degrees", "一般来说"] * 3
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=writer, **settings)
    return writer.getvalue()


def write_llama(directory: Path, **options: Any) -> Path:
    """A directory as Ziya's: tokenizer.model, and two tokens added on top in added_tokens.json."""
    directory.mkdir(parents=True)
    model = llama_model(**options)
    (directory / "tokenizer.model").write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    write_json(directory / "added_tokens.json", {"<human>": size, "<bot>": size + 1})
    named = {
        name: {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, content in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items()
    }
    write_json(directory / "special_tokens_map.json", named)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    return directory


def write_qwen(directory: Path) -> Path:
    """A directory as Qwen2's: tokenizer.json with byte-level BPE, and chat tokens added after the vocabulary."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(0, 200), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|endoftext|>", "<|im_start|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    decoder = {index: token.__getstate__() for index, token in tokenizer.get_added_tokens_decoder().items()}
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config |= {"bos_token": None, "add_bos_token": False, "added_tokens_decoder": decoder}
    write_json(directory / "tokenizer_config.json", config)
    return directory


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def real_texts(folder: Path) -> dict[str, str]:
    """Every real file as one text, whatever its format: path -> content."""
    texts = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        try:
            texts[str(path.relative_to(folder))] = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            texts[str(path.relative_to(folder))] = content.decode("gb18030")
    return texts
