"""Extension: every added piece is emitted, old ids stay, and the libraries agree on the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_extension import domain_pieces, extend_tokenizer, extended_rows, grow, rank_candidates
from model.tokenizer_report import measure
from model.tokenizer_sentencepiece import SPACE, PieceMerger, merge_order, read_sentencepiece
from model.tokenizer_training import sample_lines, train_sentencepiece
from tests.model.tokenizer_bases import llama_model, real_texts, sentences, write_llama, write_qwen

WORDS = ["高血压病人", "心力衰竭", "对乙酰氨基酚", "一日三次", "过敏性休克", "龘靐", "acetaminophen", "▁mmHg", "KTx"]


@pytest.fixture(scope="module", params=["dummy prefix", "no prefix", "with tokenizer.json"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_llama(folder / "base", add_dummy_prefix=request.param != "no prefix", character_coverage=0.98)
    if request.param != "with tokenizer.json":
        return folder / "base"
    tokenizer = Tokenizer.load(folder / "base")
    rules = {index: token.__getstate__() for index, token in tokenizer.added_tokens.items()}
    tokenizer.config["added_tokens_decoder"] = {index: {**rule, "normalized": True} for index, rule in rules.items()}
    tokenizer.save(folder / "saved")
    return folder / "saved"


def test_every_added_piece_is_emitted_when_its_own_text_is_encoded(base: Path, tmp_path: Path) -> None:
    lines, _ = sample_lines(sentences(0, 300), 10**6, 0)
    size = Tokenizer.load(base).vocab_size + 150
    extension = extend_tokenizer(base, [*WORDS, *domain_pieces(base, lines, size)], tmp_path, size)
    tokenizer = Tokenizer.load(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert len(extension.pieces) == 150 and tokenizer.vocab_size == extension.first_id + 150
    for index, piece in enumerate(extension.pieces, extension.first_id):
        text = tokenizer.decode([index])
        assert tokenizer.piece(index) == piece
        assert index in tokenizer.encode(text), piece
        assert processor.encode(text) == tokenizer.encode(text)
        after_line_end = tokenizer.encode("\n" + piece.replace(SPACE, " "))
        assert after_line_end[-1] == index, piece
    for text in sentences(7, 50):
        assert processor.encode(text) == tokenizer.encode(text)


def test_added_words_alone_would_hardly_ever_be_emitted(base: Path) -> None:
    order = merge_order(read_sentencepiece((base / "tokenizer.model").read_bytes(), base))
    words = [word for word in WORDS if word not in order]
    naive = PieceMerger([*order, *words])
    assert sum(naive(word) == [word] for word in words) <= 1
    merger = PieceMerger(order)
    pieces, unreachable = grow(merger, words, room=10**6, has_prefix=False)
    assert unreachable == 0 and set(words) <= set(pieces)
    assert all(merger(piece) == [piece] for piece in pieces)


@given(
    base=st.lists(st.text("abc▁", min_size=2, max_size=4), unique=True, max_size=8),
    letters=st.sets(st.sampled_from("abc▁")),
    candidates=st.lists(st.text("abc▁", min_size=1, max_size=6), unique=True, max_size=10),
    room=st.integers(0, 20),
    has_prefix=st.booleans(),
)
# In both, a character that the base lacks wakes a piece that the base has: in the candidate, and after the prefix.
@example(base=["ac"], letters=set(), candidates=["aa", "baac"], room=6, has_prefix=False)
@example(base=["▁ab"], letters={"a", "b", "c"}, candidates=["ab", "abc", "▁c"], room=6, has_prefix=True)
@settings(max_examples=500, deadline=None)
def test_growing_any_vocabulary_by_any_candidates_reaches_every_piece(
    base: list[str], letters: set[str], candidates: list[str], room: int, has_prefix: bool
) -> None:
    merger = PieceMerger([*base, *sorted(letters - set(base))])
    old = dict(merger.rank)
    pieces, unreachable = grow(merger, candidates, room, has_prefix)
    assert len(pieces) <= room and not set(pieces) & set(old)
    assert merger.rank.items() >= old.items() and list(merger.rank)[len(old) :] == pieces
    for piece in pieces:
        assert merger(piece) == [piece]
        if has_prefix and not piece.startswith(SPACE):
            assert merger(SPACE + piece)[-1] == piece
    if not has_prefix:
        assert unreachable == 0


@given(st.text("血压高病人一日 aein", max_size=40))
@settings(max_examples=300, deadline=None)
def test_the_merger_says_what_the_library_does(text: str) -> None:
    proto = read_sentencepiece(llama_model(add_dummy_prefix=False), Path("m"))
    tokenizer = Tokenizer.from_sentencepiece(proto.SerializeToString(), {})
    symbols = PieceMerger(merge_order(proto))(text.replace(" ", SPACE))
    known = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    expected = [known[s] for symbol in symbols for s in ([symbol] if symbol in known else _bytes(symbol))]
    assert tokenizer.encode(text) == expected == tokenizer.split(text.replace(" ", SPACE))


def _bytes(character: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in character.encode()]


def test_old_ids_and_added_tokens_do_not_move(base: Path, tmp_path: Path) -> None:
    old = Tokenizer.load(base)
    extend_tokenizer(base, WORDS, tmp_path, old.vocab_size + 12)
    new = Tokenizer.load(tmp_path)
    assert [new.piece(index) for index in range(old.vocab_size)] == [old.piece(i) for i in range(old.vocab_size)]
    assert new.encode("<human>:头痛<bot>:", True)[0] == old.encode("<human>:头痛<bot>:", True)[0] == old.vocab_size - 2
    for index, token in old.added_tokens.items():
        for rule in ("content", "special", "lstrip", "rstrip", "single_word"):
            assert getattr(new.added_tokens[index], rule) == getattr(token, rule)
    assert (new.bos_id, new.eos_id, new.pad_id, new.add_bos) == (old.bos_id, old.eos_id, old.pad_id, old.add_bos)
    rows = extended_rows(old, new)
    assert list(rows) == list(range(old.vocab_size, new.vocab_size))
    for index, old_ids in rows.items():
        assert b"".join(map(old.token_bytes, old_ids)) == new.token_bytes(index)


def test_the_name_of_a_token_never_becomes_a_piece(base: Path, tmp_path: Path) -> None:
    names = ["</s>", "<human>", "<0x0A>", "a<bot>b"]
    size = Tokenizer.load(base).vocab_size + 2
    extension = extend_tokenizer(base, [*names, "龘靐"], tmp_path, size)
    assert extension.pieces == ["龘", "靐"] and extension.unreachable == len(names)


def test_an_extended_base_needs_fewer_tokens_for_held_out_text(base: Path, tmp_path: Path) -> None:
    lines, _ = sample_lines(sentences(0, 300), 10**6, 0)
    old = Tokenizer.load(base)
    extend_tokenizer(base, domain_pieces(base, lines, old.vocab_size + 100), tmp_path, old.vocab_size + 100)
    held_out = sentences(9, 50)
    before, after = measure(old, held_out), measure(Tokenizer.load(tmp_path), held_out)
    assert after.changed_documents == before.changed_documents == 0
    assert after.characters_per_token > 1.5 * before.characters_per_token


def test_candidates_come_by_the_tokens_they_save() -> None:
    lines = ["心电图心电图", "心律", "图图"] * 20
    model = train_sentencepiece(lines, 300, character_coverage=1.0, is_limit_soft=True)
    known = PieceMerger(["心", "电"])
    ranked = rank_candidates(model, lines, known)
    # 图 is spelt in 3 bytes: each of 80 saves 2 tokens. 律: 20 times 2. One half of 心电图 is joined 40 times, then all
    # of it; the rest is joined 20 times.
    assert ranked[0] == "图" and ranked[3] == "律"  # of equal ones, the domain's order
    assert {"心电图"} < set(ranked[1:3]) < {"心电图", "心电", "电图"}
    assert set(ranked[4:]) == {"心律", "图图", "心电图心电图"}


def test_transformers_and_sentencepiece_agree_on_every_real_file(real_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = real_texts(real_data)
    base = write_llama(tmp_path / "base")
    lines, _ = sample_lines((text for name, text in texts.items() if "classics" in name), 1_000_000, 0)
    extension = extend_tokenizer(base, domain_pieces(base, lines, 6000), tmp_path / "extended", 6000)
    tokenizer = Tokenizer.load(tmp_path / "extended")
    for index in range(extension.first_id, tokenizer.vocab_size):
        assert index in tokenizer.encode(tokenizer.decode([index]))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "extended" / "tokenizer.model"))
    oracle = AutoTokenizer.from_pretrained(tmp_path / "extended").backend_tokenizer
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        assert oracle.encode_batch_fast([text], add_special_tokens=False)[0].ids == ids, name
        assert processor.encode(text) == ids, name
        assert tokenizer.decode(ids) == text.replace(SPACE, " "), name


def test_bases_that_cannot_be_extended_are_refused(base: Path, tmp_path: Path) -> None:
    size = Tokenizer.load(base).vocab_size
    with pytest.raises(InputError, match=f"has {size} ids already"):
        extend_tokenizer(base, WORDS, tmp_path / "out", size)
    with pytest.raises(InputError, match=r"at most \d+ on this base") as refusal:
        extend_tokenizer(base, WORDS, tmp_path / "out", 5000)
    most = int(str(refusal.value).split("at most ")[1].split()[0])
    extend_tokenizer(base, WORDS, tmp_path / "most", most)
    qwen = write_qwen(tmp_path / "qwen")
    with pytest.raises(InputError, match=r"no tokenizer\.model"):
        extend_tokenizer(qwen, WORDS, tmp_path / "out", 5000)
    (qwen / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    with pytest.raises(InputError, match="Fetch files that belong together"):
        extend_tokenizer(qwen, WORDS, tmp_path / "out", 5000)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_extend_the_old_one_is_refused(base: Path, tmp_path: Path) -> None:
    old, other = Tokenizer.load(base), Tokenizer.load(write_qwen(tmp_path / "qwen"))
    with pytest.raises(InputError, match="the new tokenizer's id 0 is"):
        extended_rows(old, other)
