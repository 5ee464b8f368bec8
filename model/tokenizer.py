"""Text to ids and back, for every base: one class over the tokenizers library.

Which file defines the ids: `tokenizer.json` where there is one, since that is what transformers and the serving
engines read; otherwise `tokenizer.model`, converted piece for piece (`tokenizer_sentencepiece.py`). Tokens that
`added_tokens.json` or `tokenizer_config.json` add on top (Ziya's `<human>` and `<bot>`) keep the ids written there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from model.directories import lineage
from model.errors import InputError
from model.tokenizer_sentencepiece import SPACE, read_sentencepiece, to_tokenizers

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_NAMEABLE = (*_NAMED, "sep_token", "cls_token", "mask_token")
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Names of all files that tell of a tokenizer."""
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # transformers' name for "as tokenizer.json says"
_PROBE = " a  b\n\n12.5 mg\t高血压病，　é\u0301😀</s>"  # touches spaces, digits, normalisation and bytes


class Tokenizer:
    """A vocabulary with its rules. Picklable, and safe to share between threads.

    Attributes:
        vocab_size: number of real ids, holes included; a model may have more rows.
        bos_id, eos_id, pad_id, unk_id: None where the base has none; eos_id is always there.
        add_bos: whether a document begins with bos.
        add_prefix_space: whether every text is encoded with a space before it (SentencePiece's dummy prefix).
        config: `tokenizer_config.json`, with what transformers needs to agree; a chat template may be put into it
            before `save`.
        files: name -> bytes of the directory's other files, saved as they are.
        source: the directory it was read from, for messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], files: dict[str, bytes], source: Path):
        """Use `load` or `from_sentencepiece`. `config` names the special tokens; `files` are saved as they are."""
        self.config = config
        self.files = files
        self.source = source
        self._variants: dict[tuple[bool, bool, frozenset[str]], tokenizers.Tokenizer] = {}
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, eos_id, self.unk_id, self.pad_id = (self._id_of(name) for name in _NAMED)
        if eos_id is None:
            raise InputError(f'{source}: no end token is named. Add "eos_token" to its tokenizer_config.json.')
        self.eos_id = eos_id
        first = "".join(backend.encode("a", add_special_tokens=False).tokens[:1])
        self.add_prefix_space = first.startswith((SPACE, "Ġ"))  # Ġ is the space of byte-level pieces
        self.add_bos = self.bos_id is not None and bool(config.get("add_bos_token", self._json_adds_bos()))

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a Hugging Face model or tokenizer directory; of an adapter without one, the directory it stands on.

        Raises:
            InputError: nothing there, a file is damaged, or its added tokens contradict its vocabulary.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory. Give one that holds tokenizer.json or tokenizer.model.")
        directory = find_tokenizer(directory) or directory
        files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
        named = _json(files, "special_tokens_map.json", directory)
        config = {name: token for name, token in named.items() if name in _NAMED}
        config |= _json(files, "tokenizer_config.json", directory)
        if "tokenizer.json" in files:
            backend = _open_json(files["tokenizer.json"], directory)
            _add_tokens(backend, config, files, directory)
            tokenizer = cls(backend, config, files, directory)
            if tokenizer.add_prefix_space and str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
                # transformers 5 would put rules of its own in place of the file's, and lose a text's leading space.
                config["tokenizer_class"] = _TOKENIZER_CLASS
            return tokenizer
        if "tokenizer.model" in files:
            return cls.from_sentencepiece(files["tokenizer.model"], config, files, directory)
        raise InputError(
            f"{directory}: neither tokenizer.json nor tokenizer.model is in it. Give a tokenizer directory."
        )

    @classmethod
    def from_sentencepiece(
        cls,
        model: bytes,
        config: dict[str, Any],
        files: dict[str, bytes] | None = None,
        directory: Path = Path(),
    ) -> Tokenizer:
        """From the bytes of a SentencePiece BPE model; `config` overrides what the model says of itself.

        Args:
            files: other files of a tokenizer directory, which `save` writes again.
            directory: where they came from, for messages.
        """
        files = {**(files or {}), "tokenizer.model": model}
        proto = read_sentencepiece(model, directory / "tokenizer.model")
        spec = proto.trainer_spec
        prefix = config.get("add_prefix_space")
        prefix = bool(proto.normalizer_spec.add_dummy_prefix if prefix is None else prefix)
        named = {name: getattr(spec, f"{name[:3]}_piece") for name in _NAMED if getattr(spec, f"{name[:3]}_id") >= 0}
        backend = to_tokenizers(proto, prefix)
        config = {"add_bos_token": "bos_token" in named, "add_eos_token": False, **named, **config}
        _add_tokens(backend, config, files, directory)
        # From here on tokenizer.json holds the added tokens, with the rules of this conversion.
        files = {name: content for name, content in files.items() if name in ("tokenizer.model", "chat_template.jinja")}
        config |= {name: _content(config[name]) for name in _NAMED if name in config}
        config |= {"tokenizer_class": _TOKENIZER_CLASS, "add_prefix_space": prefix}
        for name in ("added_tokens_decoder", "auto_map", "legacy", "sp_model_kwargs"):
            config.pop(name, None)
        tokenizer = cls(backend, {"clean_up_tokenization_spaces": False, **config}, files, directory)
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            bos = backend.id_to_token(tokenizer.bos_id)
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
            )
        return tokenizer

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`, without bos or eos.

        Args:
            allow_special: read the names of special tokens in the text as those tokens. For templates that the
                program wrote; in a user's text "</s>" stays text.
        """
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        allow_special: bool = False,
        *,
        is_continuation: bool = False,
        text_only: frozenset[str] = frozenset(),
    ) -> list[list[int]]:
        """`encode` for many texts, on all cores where the environment allows it (TOKENIZERS_PARALLELISM).

        Args:
            is_continuation: the texts go on behind other tokens, so that none gets SentencePiece's space before it.
            text_only: names of added tokens that stay text although they are not special (Ziya's `<human>`).
        """
        backend = self._variant(allow_special, is_continuation, frozenset() if allow_special else text_only)
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                if not isinstance(text, str):
                    raise
                if any("\ud800" <= character <= "\udfff" for character in text):
                    where = f"{text[:30]!r}"
                    raise InputError(f"text {where}: holds half a surrogate pair. Mend or drop the record.") from None
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for, so that a stream can be decoded when a character is complete."""
        return self._token_bytes[token]

    def piece(self, token: int) -> str:
        """How the vocabulary writes one id (spaces as U+2581, or bytes as GPT-2's stand-ins); "" for a hole."""
        return self._backend.id_to_token(token) or ""

    def split(self, piece: str) -> list[int]:
        """Ids of a text in the vocabulary's own writing, with nothing put before it."""
        return [token.id for token in self._backend.model.tokenize(piece)]

    @property
    def special_names(self) -> dict[str, str]:
        """What chat templates may name: bos_token, eos_token and their kind, where the base has them."""
        named = {name: _content(self.config.get(name)) for name in _NAMEABLE}
        return {name: content for name, content in named.items() if content is not None}

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """The tokens that are found in text before merging, by id."""
        return self._backend.get_added_tokens_decoder()

    @property
    def decoder(self) -> dict[str, Any]:
        """How pieces become text: the `decoder` of tokenizer.json, {} where there is none."""
        decoder = self._backend.decoder
        return {} if decoder is None else json.loads(decoder.__getstate__())

    @property
    def padded_vocab_size(self) -> int:
        """Rows for a model over this vocabulary: the next multiple of 64, for the matrix units."""
        return -(-self.vocab_size // 64) * 64

    @cached_property
    def fingerprint(self) -> str:
        """128 bits in hex over everything that decides ids: pieces, merges, special tokens and a probe's ids."""
        table = json.loads(self._backend.to_str())
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in table["model"].get("merges", [])]
        decisive = {
            "pieces": sorted((index, piece) for piece, index in self._backend.get_vocab().items()),
            "merges": merges,
            "special": sorted((token["id"], token["content"], token["special"]) for token in table["added_tokens"]),
            "named": [self.bos_id, self.eos_id, self.unk_id, self.pad_id, self.add_bos],
            "probe": self.encode(_PROBE),
        }
        return hashlib.sha256(json.dumps(decisive, ensure_ascii=True).encode()).hexdigest()[:32]

    def save(self, directory: str | Path) -> None:
        """Write what transformers and serving engines need to give the same ids. Whenever it is killed, every file is
        the old one or the new.

        Raises:
            InputError: the directory cannot be written.
        """
        directory = Path(directory)
        files = {"tokenizer.json": self._backend.to_str(pretty=True).encode(), **self.files}
        files["tokenizer_config.json"] = json.dumps(self.config, ensure_ascii=False, indent=2).encode() + b"\n"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                with open(_beside(directory, name), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for name in files:
                os.replace(_beside(directory, name), directory / name)
        except OSError as error:
            for name in files:
                with contextlib.suppress(OSError):
                    _beside(directory, name).unlink(missing_ok=True)
            raise InputError(f"{directory}: cannot write the tokenizer ({error.strerror}). Choose another.") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_variants": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._backend.encode_special_tokens = True  # the library's own pickle forgets it

    def _variant(self, allow_special: bool, is_continuation: bool, text_only: frozenset[str]) -> tokenizers.Tokenizer:
        """Another copy of the library's object: how it reads is set by switches and rules inside it."""
        key = (allow_special, is_continuation, text_only)
        if key not in self._variants:
            table = json.loads(self._backend.to_str())
            before = json.dumps(table)
            if is_continuation:
                table["normalizer"] = _without_prefix(table["normalizer"])
                table["pre_tokenizer"] = _without_prefix(table["pre_tokenizer"])
            for token in table["added_tokens"]:
                token["special"] |= token["content"] in text_only
            after = json.dumps(table)
            if after == before and not allow_special:
                self._variants[key] = self._backend
            else:
                self._variants[key] = tokenizers.Tokenizer.from_str(after)
                self._variants[key].encode_special_tokens = not allow_special
        return self._variants[key]

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        added = {index: token.content.encode() for index, token in self.added_tokens.items()}
        byte_level = byte_level_alphabet() if "ByteLevel" in str(self._backend.decoder) else None
        table = [b""] * self.vocab_size
        for piece, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = added[index]
            elif byte_level is not None and all(character in byte_level for character in piece):
                table[index] = bytes(byte_level[character] for character in piece)
            elif len(piece) == 6 and piece.startswith("<0x"):
                table[index] = bytes([int(piece[3:5], 16)])
            else:
                table[index] = piece.replace(SPACE, " ").encode()
        return table

    def _id_of(self, name: str) -> int | None:
        content = _content(self.config.get(name))
        return None if content is None else self._backend.token_to_id(content)

    def _json_adds_bos(self) -> bool:
        return self._backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]


def has_tokenizer(directory: Path) -> bool:
    """Whether `Tokenizer.load` finds one."""
    return find_tokenizer(directory) is not None


def find_tokenizer(directory: Path) -> Path | None:
    """Where a model's tokenizer is: in its directory, or for an adapter without one in what it stands on."""
    names = ("tokenizer.json", "tokenizer.model")
    return next((each for each in lineage(directory) if any((each / name).is_file() for name in names)), None)


def _beside(directory: Path, name: str) -> Path:
    """Where a file is written before it takes its name."""
    return directory / f".{name}.tmp"


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokeniser of tokenizer.json that puts no space before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    step = dict(step)
    if step["type"] == "Metaspace":
        step["prepend_scheme"] = "never"
    if step["type"] == "ByteLevel":
        step["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            step[name] = [kept for part in step[name] if (kept := _without_prefix(part)) is not None]
    return step


def _content(token: str | dict[str, Any] | None) -> str | None:
    """A token as Hugging Face files write it: its text, or a mapping that holds the text."""
    return token["content"] if isinstance(token, dict) else token


def _json(files: dict[str, bytes], name: str, directory: Path) -> dict[str, Any]:
    """A file that holds a JSON mapping; a missing one is empty."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise InputError(f"{directory}/{name}: not readable as JSON ({error}). Fetch the file again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{directory}/{name}: a mapping was expected, not {type(content).__name__}. Fetch it again.")
    return content


def _open_json(content: bytes, directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, with every added token within reach."""
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{directory}/tokenizer.json: damaged ({error}). Fetch the file again.") from None
    added = backend.get_added_tokens_decoder().values()
    hidden = {token.content for token in added if token.normalized and _is_hidden(backend, token.content)}
    if hidden:
        table = json.loads(content)
        for token in table["added_tokens"]:
            token["normalized"] &= token["content"] not in hidden
        backend = tokenizers.Tokenizer.from_str(json.dumps(table))
    return backend


def _is_hidden(backend: tokenizers.Tokenizer, content: str) -> bool:
    """Whether an added token that is looked for in normalised text is missed there: LLaMA's normaliser puts a space
    before the token's own text, so that it is found at the start of a text only."""
    return backend.normalizer is not None and backend.normalizer.normalize_str(content) != content


def _add_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], files: dict[str, bytes], directory: Path
) -> None:
    """Add the tokens that stand outside the vocabulary file, at the ids that the other files give them."""
    wanted: dict[int, AddedToken] = {}
    named = _json(files, "special_tokens_map.json", directory)
    special = {_content(config.get(name)) for name in _NAMED}
    special |= {_content(token) for token in named.get("additional_special_tokens", [])}
    special |= {_content(token) for token in config.get("additional_special_tokens") or []}
    for content, index in _json(files, "added_tokens.json", directory).items():
        wanted[index] = AddedToken(content, special=content in special, normalized=content not in special)
    for index, token in config.get("added_tokens_decoder", {}).items():
        wanted[int(index)] = AddedToken(**{key: value for key, value in token.items() if key != "__type"})
    for index in sorted(wanted):
        token = wanted[index]
        if token.normalized and _is_hidden(backend, token.content):
            rules = {name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word")}
            token = AddedToken(token.content, normalized=False, **rules)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != index:
            found = backend.token_to_id(token.content)
            raise InputError(
                f"{directory}: the added token {token.content!r} should be id {index}, but the vocabulary puts it at "
                f"{found}. Fetch tokenizer files that belong together."
            )
    for name in _NAMED:
        special_token = _content(config.get(name))
        if special_token is not None and backend.token_to_id(special_token) is None:
            backend.add_special_tokens([AddedToken(special_token, special=True, normalized=False)])


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
