from __future__ import annotations

import errno
import fcntl
import filecmp
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from engine.data import duplicates
from engine.data import prepare as prepare_module
from engine.data.corpus import open_corpus
from engine.data.prepare import Progress, preparation_key, prepare
from engine.data.shards import MANIFEST, Prepared, is_prepared, read_manifest, token_path
from engine.data.sources import ReadOptions
from model.errors import InputError
from model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """580 documents in five files of three formats and two encodings."""
    folder = tmp_path_factory.mktemp("raw")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[:200]]
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.json").write_text(json.dumps(texts[200:400], ensure_ascii=False))
    for number in range(3):
        piece = "\n\n".join(text.replace("\n\n", "\n") for text in texts[400 + 60 * number : 460 + 60 * number])
        (folder / f"c{number}.txt").write_bytes(piece.encode("gb18030"))
    return folder


OPTIONS = ReadOptions(document="paragraph")
UNIT = 8000


def same_content(first: Path, second: Path) -> bool:
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (first, second)]
    if names[0] != names[1]:
        return False
    files = [name for name in names[0] if (first / name).is_file()]
    return filecmp.cmpfiles(first, second, files, shallow=False)[0] == files


def stored_texts(directory: Path, tokenizer: Tokenizer) -> list[str]:
    corpus = open_corpus([directory])
    return [tokenizer.decode(corpus.read(number)[1:-1].tolist()) for number in range(len(corpus.store))]


def test_prepared_documents_decode_to_the_texts_between_bos_and_eos(
    tmp_path: Path, raw: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    directory = prepare([raw], tokenizer, tmp_path / "out", OPTIONS, unit_bytes=UNIT, workers=1)
    assert stored_texts(directory, tokenizer)[:400] == texts[:400]
    corpus = open_corpus([directory])
    ids = corpus.read(0)
    assert ids.dtype == np.uint16
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    manifest = read_manifest(directory)
    assert manifest["documents"] == len(corpus.store) == 580
    assert manifest["characters"] == sum(map(len, stored_texts(directory, tokenizer)))
    assert manifest["encodings"] == {"utf-8": 2, "gbk": 3}
    files = [json.loads(line) for line in (directory / "files.jsonl").read_text().splitlines()]
    assert [file["documents"] for file in files[:2]] == [200, 200]
    assert sum(file["documents"] for file in files) == manifest["documents"]


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    class Large:
        vocab_size, bos_id, eos_id, add_bos, fingerprint = 70_000, None, 69_999, False, "large"

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[65_536 + len(text) % 100] for text in texts]

        save = tokenizer.save

    directory = prepare([raw], Large(), tmp_path / "out", OPTIONS, workers=1)  # type: ignore[arg-type]
    ids = open_corpus([directory]).read(0)
    assert ids.dtype == np.uint32 and ids[-1] == 69_999 and ids[0] > 65_535


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    one = prepare([raw], tokenizer, tmp_path / "one", OPTIONS, unit_bytes=UNIT, workers=1)
    three = prepare([raw], tokenizer, tmp_path / "three", OPTIONS, unit_bytes=UNIT, workers=3)
    assert len(read_manifest(one)["units"]) > 30
    assert same_content(one, three)


KILLED = """
import sys, threading
from engine.data import prepare as module
from engine.data.sources import ReadOptions
from model.tokenizer import Tokenizer
module.merge_index = lambda *_: threading.Event().wait()  # no kill, however late, comes after the end
module.prepare([sys.argv[1]], Tokenizer.load(sys.argv[2]), sys.argv[3], ReadOptions(document="paragraph"),
               workers=int(sys.argv[4]), unit_bytes=8000)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_the_result_is_the_same_to_the_byte(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer, tokenizer_directory: Path, workers: int
) -> None:
    unbroken = prepare([raw], tokenizer, tmp_path / "unbroken", OPTIONS, unit_bytes=UNIT, workers=1)
    units = len(read_manifest(unbroken)["units"])
    out = tmp_path / "out"
    chance = random.Random(workers)
    command = [sys.executable, "-c", KILLED, str(raw), str(tokenizer_directory), str(out), str(workers)]
    for stop in (3, units // 2, units - 1):
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        while len(list((out / "units").glob("[0-9]*.json"))) < stop and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    resumed: list[Progress] = []
    prepare([raw], tokenizer, out, OPTIONS, unit_bytes=UNIT, workers=1, progress=resumed.append)
    assert not resumed or resumed[-1].resumed > 0
    assert same_content(unbroken, out)


@pytest.mark.parametrize("step", ["merge_index", "_write_lines", "write_durably", "shutil.rmtree"])
def test_stopped_between_the_last_unit_and_the_manifest_it_goes_on(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def prepare_it(out: Path) -> Path:
        return prepare([raw], tokenizer, out, OPTIONS, unit_bytes=UNIT, workers=1)

    class Killed(BaseException):
        pass

    calls = 0
    module: Any = prepare_module
    *owner, name = step.split(".")
    owner_object = getattr(module, owner[0]) if owner else module
    original = getattr(owner_object, name)

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or name in ("merge_index", "_write_lines"):
            raise Killed
        return original(*args, **kwargs)

    unbroken = prepare_it(tmp_path / "unbroken")
    monkeypatch.setattr(owner_object, name, killed)
    with pytest.raises(Killed):
        prepare_it(tmp_path / "out")
    monkeypatch.undo()
    assert same_content(unbroken, prepare_it(tmp_path / "out"))


def test_parts_are_disjoint_and_together_the_whole(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    whole = open_corpus([prepare([raw], tokenizer, tmp_path / "whole", OPTIONS, unit_bytes=UNIT, workers=1)])
    out = tmp_path / "parts"
    directories = [
        prepare([raw], tokenizer, out, OPTIONS, part=(index, 3), unit_bytes=UNIT, workers=1) for index in (1, 2, 3)
    ]
    assert [read_manifest(directory)["part"] for directory in directories] == [[1, 3], [2, 3], [3, 3]]
    for listed in ([out], directories, directories[::-1]):
        parts = open_corpus(listed)
        assert parts.fingerprint == whole.fingerprint
        assert len(parts.store) == len(whole.store)
        for number in range(0, len(whole.store), 7):
            assert np.array_equal(parts.read(number), whole.read(number))


def test_refused_records_are_listed_with_lines_of_the_whole_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = json.dumps({"text": "高血压患者应低盐饮食并按时服药"}) + "\n"
    bad = '{"text": \n'
    lines = [bad if number % 10 == 7 else good for number in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.json").write_text(json.dumps(["短", "合格的文本在这里，足够长", 5]))
    directory = prepare([tmp_path / "?.json*"], tokenizer, tmp_path / "out", unit_bytes=1000, workers=1)
    manifest = read_manifest(directory)
    assert len(manifest["units"]) > 4
    assert (manifest["documents"], manifest["rejected"], manifest["short"]) == (91, 11, 1)
    rejects = [json.loads(line) for line in (directory / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects[:10]] == list(range(8, 100, 10))
    assert {reject["file"] for reject in rejects[:10]} == {str(tmp_path / "a.jsonl")}
    assert "broken JSON" in rejects[0]["reason"] and "a number" in rejects[10]["reason"]
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"a\.jsonl:\d*8: broken JSON"):
            options = ReadOptions(on_error="fail")
            prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "no", options, unit_bytes=1000, workers=workers)


def test_document_longer_than_a_piece_keeps_one_bos_and_one_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(f"第{number}条：多饮水，注意休息。\n" for number in range(300))
    (tmp_path / "a.txt").write_text(text)
    directory = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", ReadOptions(max_characters=1000), workers=1)
    corpus = open_corpus([directory])
    pieces = [corpus.read(number) for number in range(len(corpus.store))]
    ids = np.concatenate(pieces)
    assert len(pieces) > 3 and read_manifest(directory)["divided"] == 1
    assert np.flatnonzero(ids == tokenizer.bos_id).tolist() == [0]
    assert np.flatnonzero(ids == tokenizer.eos_id).tolist() == [len(ids) - 1]
    assert tokenizer.decode(ids[1:-1].tolist()) == text


def test_finished_directory_is_taken_as_it_is(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    directory = prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    before = (directory / MANIFEST).stat().st_mtime_ns
    os.chmod(directory, 0o555)
    calls: list[Progress] = []
    assert prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1, progress=calls.append) == directory
    os.chmod(directory, 0o755)
    assert (directory / MANIFEST).stat().st_mtime_ns == before and not calls


def test_directory_of_other_data_is_not_overwritten(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    with pytest.raises(InputError, match="other data or options"):
        prepare([raw], tokenizer, tmp_path / "out", ReadOptions(min_characters=20), workers=1)
    with pytest.raises(InputError, match="other data or options"):
        prepare([raw / "a.jsonl"], tokenizer, tmp_path / "out", OPTIONS, workers=1)


@pytest.mark.parametrize(("end", "problem"), [("药", "other data"), ("药片" * 2000, "other versions")])
def test_changed_file_is_noticed(tmp_path: Path, tokenizer: Tokenizer, end: str, problem: str) -> None:
    path = tmp_path / "a.txt"
    begin = "高血压患者应低盐饮食并按时" + ("服" * 2000 if len(end) > 1 else "")
    path.write_text(begin + end)
    before = preparation_key([path], tokenizer)
    prepare([path], tokenizer, tmp_path / "out", workers=1)
    path.write_text(begin + end.replace("药", "糖"))
    assert preparation_key([path], tokenizer) != before
    with pytest.raises(InputError, match=problem):
        prepare([path], tokenizer, tmp_path / "out", workers=1)


def test_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((raw / "a.jsonl").read_bytes())

    def touch(_: Progress) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(InputError, match="changed while it was being prepared"):
        prepare([path], tokenizer, tmp_path / "out", workers=1, progress=touch)


def test_recipe_around_the_options_changes_nothing(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    from engine.data.sources import DataOptions

    assert preparation_key([raw], tokenizer, DataOptions(paths=["x"])) == preparation_key([raw], tokenizer)
    assert preparation_key([raw], tokenizer, OPTIONS) != preparation_key([raw], tokenizer)


def test_concurrent_calls_do_the_work_once(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    calls: list[Progress] = []

    def work() -> None:
        prepare([raw], tokenizer, tmp_path / "out", OPTIONS, unit_bytes=UNIT, workers=1, progress=calls.append)

    with ThreadPoolExecutor(3) as threads:
        outcomes = [threads.submit(work) for _ in range(3)]
        for outcome in outcomes:
            outcome.result()
    units = len(read_manifest(tmp_path / "out")["units"])
    assert len(calls) == units
    assert calls[-1].done == calls[-1].total and calls[-1].resumed == 0
    assert all(before.done < after.done for before, after in itertools.pairwise(calls))


def test_a_filesystem_without_locks_is_good_enough(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: IO[str], operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(duplicates, "_CACHED_FROM", 1)
    directory = prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    assert len(open_corpus([directory]).store) == 580
    assert list(directory.glob("duplicates-*.npy"))


def test_dead_worker_is_explained_and_finished_units_are_kept(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    others, killed = children(), []

    def kill_a_worker(progress: Progress) -> None:
        if progress.done and not killed:
            killed.append(max(children() - others, key=int))
            os.kill(int(killed[0]), signal.SIGKILL)

    with pytest.raises(InputError, match="A tokenising process ended with code -9"):
        prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=2, unit_bytes=UNIT, progress=kill_a_worker)
    assert list((tmp_path / "out" / "units").glob("[0-9]*.json"))
    prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1, unit_bytes=UNIT)
    assert is_prepared(tmp_path / "out")


def test_directory_that_cannot_be_written_is_said(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file stands where a directory is needed"):
        prepare([raw], tokenizer, tmp_path / "file" / "out", OPTIONS, workers=1)


def test_full_disk_in_a_worker_is_said(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "tokens")

    monkeypatch.setattr("engine.data.shards.os.fsync", full)
    with pytest.raises(InputError, match="the disk or the quota is full"):
        prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1)


@pytest.mark.parametrize("part", [(0, 3), (4, 3)])
def test_parts_are_numbered_from_one(tmp_path: Path, raw: Path, tokenizer: Tokenizer, part: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="Choose one from 1 to 3"):
        prepare([raw], tokenizer, tmp_path, OPTIONS, part=part)


def test_prepared_folder_inside_the_data_is_not_read_as_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("高血压患者应低盐饮食并按时服药")
    before = preparation_key([tmp_path], tokenizer)
    prepare([tmp_path], tokenizer, tmp_path / "prepared", workers=1)
    assert preparation_key([tmp_path], tokenizer) == before


def damage(directory: Path, kind: str) -> None:
    shard = token_path(directory, 0)
    if kind == "truncated":
        os.truncate(shard, shard.stat().st_size - 2)
    elif kind == "no shard":
        shard.unlink()
    elif kind == "no index":
        (directory / "offsets.npy").unlink()
    elif kind == "short index":
        np.save(directory / "hashes.npy", np.zeros((3, 2), np.uint64))
    elif kind == "manifest":
        (directory / MANIFEST).write_text("{")
    elif kind == "format":
        (directory / MANIFEST).write_text('{"format": 99}')
    else:
        (directory / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"tokens/00000000.bin has \d+ bytes instead of \d+"),
        ("no shard", "00000000.bin is missing"),
        ("no index", "offsets.npy is missing"),
        ("short index", "has shape"),
        ("manifest", "damaged"),
        ("format", "format 99"),
        ("unfinished", "not prepared, or not to the end"),
    ],
)
def test_damage_is_found_when_opening(tmp_path: Path, raw: Path, tokenizer: Tokenizer, kind: str, message: str) -> None:
    directory = prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    damage(directory, kind)
    with pytest.raises(InputError, match=message):
        open_corpus([directory])


def test_changed_token_is_found_when_every_byte_is_compared(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    directory = prepare([raw], tokenizer, tmp_path / "out", OPTIONS, workers=1)
    Prepared(directory).verify()
    with open(token_path(directory, 0), "r+b") as shard:
        shard.seek(100)
        shard.write(b"\xff")
    with pytest.raises(InputError, match="is not what was written"):
        Prepared(directory).verify()


MEASURED = """
import re, resource, sys
from engine.data.prepare import prepare
from tests.engine.data.stand_in import Bytes
prepare([sys.argv[1]], Bytes(), sys.argv[2], workers=2, unit_bytes=4 << 20)
own = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
print(own[1], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(raw: Path, out: Path) -> int:
    """Bytes of the feeding process and of the largest worker, by the kernel's account."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, str(raw), str(out)]
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    return sum(map(int, output.split())) * 1024


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, texts: list[str], kind: str) -> None:
    separator = "," if kind == "json" else "\n"
    block = separator.join(json.dumps(text, ensure_ascii=False) for text in texts)
    sizes, peaks = [], []
    # Both are many more units than can be under way at once, so that the smaller one already reaches the peak.
    for megabytes in (40, 100):
        path = tmp_path / f"{megabytes}.{kind}"
        repeated = separator.join([block] * (megabytes * 10**6 // len(block.encode())))
        # The list stands on one line, and can only be read from its beginning.
        path.write_text(f"[{repeated}]" if kind == "json" else repeated)
        sizes.append(path.stat().st_size)
        peaks.append(peak_memory(path, tmp_path / f"out{megabytes}"))
    # Text held in memory costs at least its size in bytes, and here half as many again as Python strings.
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 2, (sizes, peaks)
    assert peaks[1] < 300e6, (sizes, peaks)
