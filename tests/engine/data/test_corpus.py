from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engine.data import duplicates
from engine.data.corpus import Corpus, open_corpus
from engine.data.mixture import Mixture
from engine.data.prepare import prepare
from engine.data.selection import Selection
from engine.data.sources import ReadOptions
from model.errors import InputError
from tests.engine.data.stand_in import Bytes, prepare_lengths


def prepare_texts(directory: Path, texts: list[str]) -> Path:
    directory.mkdir(parents=True)
    (directory / "raw.json").write_text(json.dumps(texts))
    return prepare([directory / "raw.json"], Bytes(), directory / "prepared", ReadOptions(min_characters=1), workers=1)


def text(corpus: Corpus, document: int) -> str:
    return bytes(corpus.read(document)[1:-1].tolist()).decode()


def texts_of(corpus: Corpus) -> list[str]:
    return [text(corpus, document) for document in corpus.documents().tolist()]


def test_duplicates_are_dropped_within_and_across_directories_and_the_first_stays(tmp_path: Path) -> None:
    first = prepare_texts(tmp_path / "1", ["甲", "乙", "甲", "丙"])
    second = prepare_texts(tmp_path / "2", ["丁", "乙", "甲 ", "丁"])
    corpus = open_corpus([first, second])
    assert texts_of(corpus) == ["甲", "乙", "丙", "丁", "甲 "]
    assert corpus.num_duplicates == 3
    assert corpus.num_documents == 5
    assert corpus.num_tokens == sum(len(text.encode()) + 2 for text in texts_of(corpus))
    assert texts_of(open_corpus([second, first])) == ["丁", "乙", "甲 ", "甲", "丙"]


def test_equal_half_hashes_are_no_duplicates(tmp_path: Path) -> None:
    class Store:
        fingerprint = "x"
        _hashes = np.array([[1, 1], [1, 2], [2, 1], [1, 2], [1, 1], [3, 3]], np.uint64)

        def __len__(self) -> int:
            return 6

        def hashes(self, first: int, last: int) -> np.ndarray:
            return self._hashes[first:last]

    assert duplicates.find_duplicates(Store(), tmp_path).tolist() == [3, 4]


def test_duplicates_of_a_large_store_are_found_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = prepare_texts(tmp_path / "1", ["甲", "乙", "甲", "丙"])
    monkeypatch.setattr(duplicates, "_CACHED_FROM", 4)
    monkeypatch.setattr(duplicates, "_SCAN", 3)
    assert texts_of(open_corpus([directory])) == ["甲", "乙", "丙"]
    assert len(list(directory.glob("duplicates-*.npy"))) == 1
    monkeypatch.setattr(duplicates, "_find", None)  # would fail if it were called again
    assert texts_of(open_corpus([directory])) == ["甲", "乙", "丙"]


@pytest.mark.parametrize("is_listed_chosen", [True, False])
def test_selection_gives_what_a_list_would(is_listed_chosen: bool) -> None:
    listed = np.array([10, 11, 15, 19])
    selection = Selection(10, 20, listed, is_listed_chosen)
    expected = [number for number in range(10, 20) if (number in listed) == is_listed_chosen]
    assert selection[np.arange(len(selection))].tolist() == expected
    rest = selection.without(np.array([3, 11, 12, 25]))
    assert rest[np.arange(len(rest))].tolist() == [number for number in expected if number not in (11, 12)]


def test_split_is_a_partition_that_depends_on_texts_alone(tmp_path: Path) -> None:
    texts = [f"病历{number}" for number in range(2000)]
    one = open_corpus([prepare_texts(tmp_path / "1", texts)])
    parts = [
        prepare_texts(tmp_path / "2", [*texts[1500:], "另一份"]),
        prepare_texts(tmp_path / "3", texts[:1500]),
    ]
    train, held_out = one.split(0.1)
    assert sorted(texts_of(train) + texts_of(held_out)) == sorted(texts)
    # Binomial(2000, 0.1): mean 200, standard deviation 13.4.
    assert 133 < held_out.num_documents < 267
    assert train.num_tokens + held_out.num_tokens == one.num_tokens
    _, other = open_corpus(parts).split(0.1)
    assert set(texts_of(other)) - {"另一份"} == set(texts_of(held_out))
    assert held_out.num_tokens == sum(len(text.encode()) + 2 for text in texts_of(held_out))


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("count", [2, 3])
def test_split_leaves_a_document_on_each_side(tmp_path: Path, fraction: float, count: int) -> None:
    corpus = open_corpus([prepare_texts(tmp_path / "1", [f"病历{number}" for number in range(count)])])
    train, held_out = corpus.split(fraction)
    assert train.num_documents >= 1 and held_out.num_documents >= 1
    assert train.num_documents + held_out.num_documents == count


def test_nothing_is_held_out_of_one_document_or_without_a_fraction(tmp_path: Path) -> None:
    one = open_corpus([prepare_texts(tmp_path / "1", ["甲"])])
    assert one.split(0.5)[0].num_documents + one.split(0.5)[1].num_documents == 1
    two = open_corpus([prepare_texts(tmp_path / "2", ["甲", "乙"])])
    assert two.split(0.0)[1].num_documents == 0


def test_held_out_texts_are_taken_out_of_training(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_texts(tmp_path / "1", ["甲", "乙", "丙", "乙"])])
    held_out = open_corpus([prepare_texts(tmp_path / "2", ["丁", "乙"])])
    rest, dropped = corpus.without(held_out)
    assert texts_of(rest) == ["甲", "丙"] and dropped == 1
    assert rest.fingerprint != corpus.fingerprint


def test_reads_of_many_directories_agree_with_the_documents(tmp_path: Path) -> None:
    texts = [f"第{number}份" * (number % 5 + 1) for number in range(50)]
    corpus = open_corpus([prepare_texts(tmp_path / str(n), texts[n::3]) for n in range(3)])
    order = np.random.default_rng(0).permutation(len(corpus.store))
    found = [text(corpus, document) for document in order.tolist()]
    assert corpus.store.lengths(order).tolist() == [len(text.encode()) + 2 for text in found]
    assert corpus.store.characters(order).tolist() == [len(text) for text in found]
    assert sorted(found) == sorted(texts)
    assert corpus.read(7, 2, 5).tolist() == corpus.read(7)[2:5].tolist()


def test_fewer_shards_are_kept_open_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.shards._OPEN_SHARDS", 2)
    (tmp_path / "a.jsonl").write_text("".join(f'"第{number}份病历"\n' for number in range(100)))
    options = ReadOptions(min_characters=1)
    directory = prepare([tmp_path / "a.jsonl"], Bytes(), tmp_path / "out", options, unit_bytes=200, workers=1)
    corpus = open_corpus([directory])
    assert len(corpus.store.prepared[0].shards) > 5
    assert texts_of(corpus) == [f"第{number}份病历" for number in range(100)]
    assert len(corpus.store._files._open) == 2


def test_threads_may_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation reads while the loader reads ahead; a descriptor closed under the other would give other text."""
    monkeypatch.setattr("engine.data.shards._OPEN_SHARDS", 1)
    directories = [prepare_texts(tmp_path / str(n), [f"第{n}份" + "文" * 3000]) for n in range(4)]
    corpus = open_corpus(directories)
    expected = [corpus.read(document).tobytes() for document in range(4)]

    def read(thread: int) -> bool:
        return all(corpus.read((thread + n) % 4).tobytes() == expected[(thread + n) % 4] for n in range(1000))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


def test_wrong_lists_of_directories_are_refused(tmp_path: Path) -> None:
    first = prepare_texts(tmp_path / "1", ["甲"])
    empty = prepare_texts(tmp_path / "2", [])
    (tmp_path / "b.jsonl").write_text('"一二三四五六七八九十"\n"二二三四五六七八九十"\n')
    parts = [prepare([tmp_path / "b.jsonl"], Bytes(), tmp_path / "p", part=(n, 2), workers=1) for n in (1, 2)]
    halves = [prepare([tmp_path / "b.jsonl"], Bytes(), tmp_path / "q", part=(n, 3), workers=1) for n in (1, 2, 3)]
    copy = tmp_path / "copy"
    shutil.copytree(parts[0], copy)
    numbers = prepare_lengths(tmp_path / "n", [5, 6])
    for directories, problem in (
        ([first, first], "listed twice"),
        ([*parts, copy], "part 1 of 2 is listed twice"),
        ([parts[1]], "part 1 of 2 is missing"),
        ([*parts, *halves], "another division"),
        ([empty], "there is no document"),
        ([tmp_path / "missing"], "not prepared"),
        ([first, numbers], "another tokenizer"),
        ([], "There is no data"),
    ):
        with pytest.raises(InputError, match=problem):
            open_corpus(directories)
    with pytest.raises(InputError, match="another tokenizer"):
        open_corpus([first], tokenizer_fingerprint="other")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, -1.0], [float("inf"), 1.0]])
def test_wrong_weights_are_refused(tmp_path: Path, weights: list[float]) -> None:
    directories = [prepare_texts(tmp_path / "1", ["甲"]), prepare_texts(tmp_path / "2", ["乙"])]
    with pytest.raises(InputError, match=r"--data\.weights"):
        open_corpus(directories, weights)


# The order of documents


def seen(mixture: Mixture, epoch: int) -> Counter[int]:
    return Counter(mixture.documents(epoch, 0, mixture.epoch_length(epoch)).tolist())


def test_at_weight_one_every_document_comes_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [6] * 500), prepare_lengths(tmp_path / "2", [6] * 300, 500)])
    mixture = Mixture(corpus, seed=3)
    orders = [mixture.documents(epoch, 0, 800) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(800)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], Mixture(corpus, seed=4).documents(0, 0, 800))
    # Both sources are spread: of the first 400 slots 250 are expected from the first source, deviation 7.
    assert 200 < (orders[0][:400] < 500).sum() < 300


def test_half_weight_sees_each_document_once_in_two_epochs_and_double_weight_twice_in_one(tmp_path: Path) -> None:
    directories = [prepare_lengths(tmp_path / str(n), [6] * 101, 101 * n) for n in range(3)]
    corpus = open_corpus(directories, weights=[1, 0.5, 2])
    mixture = Mixture(corpus, seed=0)
    epochs = [seen(mixture, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert all(epoch[document] == 1 for document in range(101))
        assert all(epoch[document] == 2 for document in range(202, 303))
    for pair in (epochs[0] + epochs[1], epochs[2] + epochs[3]):
        assert all(pair[document] == 1 for document in range(101, 202))
    assert [sum(epoch.values()) for epoch in epochs] == [353, 354, 353, 354]
    # The halves are not the same ones every time.
    halves = [{document for document in epoch if 101 <= document < 202} for epoch in epochs]
    assert halves[0] != halves[2]


def test_a_tenth_is_exactly_a_tenth(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [6] * 30)], weights=[0.1])
    assert corpus.weights == [Fraction(1, 10)]
    mixture = Mixture(corpus, seed=0)
    assert sum((seen(mixture, epoch) for epoch in range(10)), Counter()) == Counter(range(30))


def test_any_slots_can_be_asked_for(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [6] * 100)], weights=[2.5])
    mixture = Mixture(corpus, seed=0)
    whole = mixture.documents(1, 0, mixture.epoch_length(1))
    assert np.array_equal(mixture.documents(1, 37, 91), whole[37:91])


def test_held_out_documents_never_come(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [6] * 400)])
    train, held_out = corpus.split(0.2)
    assert set(seen(Mixture(train, 0), 0)) == set(range(400)) - set(held_out.documents().tolist())


def test_a_held_out_share_that_is_not_what_was_asked_for_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = open_corpus([prepare_texts(tmp_path / "1", ["甲" * 400, "乙" * 300])])
    capsys.readouterr()
    _, held_out = books.split(0.005)
    share = held_out.num_tokens / books.num_tokens
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"Warning: 1 of 2 documents are held out, {share:.2%} of the tokens where --eval.fraction ")
    assert "asks for 0.50%, which are not trained on. Give --eval.data" in said
    few = open_corpus([prepare_texts(tmp_path / "2", [f"第{number}例" for number in range(300)])])
    capsys.readouterr()
    _, held_out = few.split(0.02)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"Warning: {held_out.num_documents} of 300 documents are held out")
    assert "a loss is uncertain. Raise --eval.fraction" in said
    for corpus, fraction in ((few, 0.2), (few, 0.0)):
        _, held_out = corpus.split(fraction)
        assert held_out.num_documents >= 20 or not fraction
        assert not capsys.readouterr().err
