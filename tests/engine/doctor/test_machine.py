"""GPUs that torch does not reach, disks, limits, and ranks that differ."""

import os
import stat
from pathlib import Path

import pytest

from engine.doctor import gpus, ranks, storage
from engine.doctor.gpus import Card
from engine.doctor.ranks import Place

H100 = Card("NVIDIA H100 80GB HBM3", "81559 MiB", "535.104.05")


def place(host: str, **versions: str) -> Place:
    return Place(host, {"torch": "2.13.0", "checkout": "abc"} | versions)


def test_a_torch_without_cuda_on_a_machine_with_cards_is_wrong() -> None:
    found = gpus.unreachable([H100], "the CPU alone", "")
    assert found.state == "wrong" and "without CUDA" in found.remedy and "535.104.05" in found.found


def test_a_driver_that_is_too_old_is_told_in_torchs_words() -> None:
    found = gpus.unreachable([H100], "CUDA 13.0", "The NVIDIA driver on your system is too old (found version 12020).")
    assert found.state == "wrong" and "too old" in found.found and "update the driver" in found.remedy


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has a driver")
def test_a_machine_without_cards_works_on_the_cpu() -> None:
    assert gpus.unreachable([], "the CPU alone", "").state == "note"


def test_cards_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{', '.join(H100)}'\necho '{', '.join(H100)}'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus.cards() == [H100, H100]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, because it could not talk, to the driver'\nexit 9\n")
    assert gpus.cards() == []


def test_a_machine_without_a_compiler_cannot_launch_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.compiler().state == "wrong"


def test_an_output_directory_need_not_exist_and_is_left_as_it_was(tmp_path: Path) -> None:
    assert storage.disk(tmp_path / "deep" / "ckpt").state in ("good", "note")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_wrong() -> None:
    assert storage.disk(Path("/proc/ckpt")).state == "wrong"


def test_little_disk_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LITTLE_DISK", 1 << 60)
    assert storage.disk(tmp_path).state == "note"


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_limit_of_a_container_counts(tmp_path: Path, name: str) -> None:
    info, limit = tmp_path / "meminfo", tmp_path / name
    info.write_text("MemTotal:       527988000 kB\nMemFree:  1 kB\nMemAvailable:   500000000 kB\n")
    assert storage.memory(info, tmp_path).state == "good"
    limit.parent.mkdir(exist_ok=True)
    limit.write_text(str(8 << 30))
    found = storage.memory(info, tmp_path)
    assert found.state == "note" and "8 GiB" in found.found
    limit.write_text("max\n")
    assert storage.memory(info, tmp_path).state == "good"


def test_ranks_that_are_alike_are_counted() -> None:
    found = ranks.likeness([place("a"), place("a"), place("b"), place("b")])
    assert found.state == "good" and found.found == "4 on 2 hosts"


@pytest.mark.parametrize("name", ["torch", "checkout"])
def test_ranks_of_other_versions_are_wrong(name: str) -> None:
    found = ranks.likeness([place("a"), place("b", **{name: "other"})])
    assert found.state == "wrong" and "b other" in found.found


def test_uneven_hosts_are_noted() -> None:
    assert ranks.likeness([place("a"), place("a"), place("b")]).state == "note"


def test_what_other_hosts_found_is_said_once_a_host() -> None:
    full = storage.Finding("disk", "wrong", "full", "Make room.")
    fine = storage.Finding("memory", "good", "much")
    said = [("a", [full]), ("b", [full, fine]), ("b", [full, fine])]
    assert [finding.name for finding in ranks.from_elsewhere(said)] == ["b: disk"]


def test_hosts_that_do_not_see_the_directory_are_named() -> None:
    assert ranks.shared_directory(Path("ckpt"), ["a", "b"], ["b"]).state == "wrong"
    assert "b" in ranks.shared_directory(Path("ckpt"), ["a", "b"], ["b"]).found
    assert ranks.shared_directory(Path("ckpt"), ["a", "b"], []).state == "good"
