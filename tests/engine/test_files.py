"""What is on disk is the old or the new, and was flushed before it had its name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

import pytest

from engine.files import explain, human_size, locked, new_directory, remove_directory, sync_tree, write_durably
from model.errors import InputError
from tests.engine.kill import kill_at_touch, run_to_the_end_or_a_kill


def test_a_file_keeps_its_old_content_until_the_new_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "COMPLETE"
    path.write_text("old")
    real_fsync = os.fsync
    seen = []

    def fsync(descriptor: int) -> None:
        seen.append((path.read_text(), os.fstat(descriptor).st_size))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_durably(path, "newer")
    assert seen[0] == ("old", 5)
    assert [content for content, _ in seen[1:]] == ["newer"]  # the directory, with the new name in it
    assert [entry.name for entry in tmp_path.iterdir()] == ["COMPLETE"]


def test_a_directory_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "step-00000001"
    directory.mkdir()
    (directory / "COMPLETE").write_text("")
    real_rmtree = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        assert not directory.exists() or path != directory
        real_rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    remove_directory(directory)
    assert list(tmp_path.iterdir()) == []
    remove_directory(directory)  # gone already: nothing to do


FILES = {"one": "1", "two": "22"}


def make_directory(path: Path, may_repeat: bool = True) -> None:
    with new_directory(path, may_repeat=may_repeat) as folder:
        for name, content in FILES.items():
            (folder / name).write_text(content)


def make_directory_and_be_killed(path: Path, touch: int) -> None:
    kill_at_touch(touch, path.parent)
    make_directory(path)


def test_a_new_directory_is_whole_or_not_there_wherever_its_making_is_killed(tmp_path: Path) -> None:
    path, touch, has_ended = tmp_path / "out", 0, False
    while not has_ended:
        touch += 1
        shutil.rmtree(path, ignore_errors=True)
        has_ended = run_to_the_end_or_a_kill(make_directory_and_be_killed, path, touch)
        assert not path.exists() or {file.name: file.read_text() for file in path.iterdir()} == FILES
        make_directory(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert touch > 8


def test_a_directory_is_made_again_only_where_it_holds_the_very_files(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "out").symlink_to("place")
    make_directory(tmp_path / "out")  # in an empty directory, by a link
    assert {file.name: file.read_text() for file in (tmp_path / "place").iterdir()} == FILES
    make_directory(tmp_path / "out")
    with pytest.raises(InputError, match=r"out exists, and nothing is overwritten. Choose another, or remove it first"):
        make_directory(tmp_path / "out", may_repeat=False)
    for change in (lambda path: path.write_text("2"), lambda path: path.unlink(), lambda path: path.mkdir()):
        change(tmp_path / "out" / "two")
        with pytest.raises(InputError, match="out exists, and nothing is overwritten"):
            make_directory(tmp_path / "out")
    assert (tmp_path / "out" / "one").read_text() == "1" and (tmp_path / "out" / "two").is_dir()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "place"]


def test_every_file_of_a_tree_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    files = {tmp_path / "one", tmp_path / "a" / "two"}
    for path in files:
        path.write_text("x")
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    sync_tree(tmp_path)
    assert flushed == files | {tmp_path, tmp_path / "a"}


def test_a_filesystem_that_cannot_flush_directories_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    write_durably(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"), open(tmp_path / ".lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_no_locks_are_offered_the_work_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(file: IO[str], operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    done = []
    for turn in range(2):
        with locked(tmp_path / ".lock"):
            done.append(turn)
    assert done == [0, 1]
    said = f"{tmp_path}: its filesystem offers no locks. Let no two jobs prepare data there at the same time.\n"
    assert capsys.readouterr().err == said


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: IO[str], operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize(
    ("number", "meaning", "remedy"),
    [
        (errno.ENOSPC, "is full", "Free some space"),
        (errno.EDQUOT, "is full", "Free some space"),
        (errno.EROFS, "may not be written", "Choose an --out where this user can write"),
        (errno.EACCES, "may not be written", "Choose an --out where this user can write"),
        (errno.ENOTDIR, "a file stands where a directory is needed", "Move it"),
        (errno.EIO, "Input/output error", "See to the filesystem"),
    ],
)
def test_an_operating_system_error_is_explained(number: int, meaning: str, remedy: str) -> None:
    sentence = explain(OSError(number, os.strerror(number), "/runs/x"))
    assert meaning in sentence
    assert "(/runs/x)" in sentence
    assert remedy in sentence


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (156_000_000_000, "156.0 GB")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert human_size(count) == text
