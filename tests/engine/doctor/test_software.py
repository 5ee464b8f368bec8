"""What is missing, too old or in the way is found, in an environment that is made so."""

import importlib.metadata
from pathlib import Path

import pytest

from engine.doctor import software
from engine.doctor.finding import Finding, render


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that differ from what is installed; None is missing."""
    changed: dict[str, str | None] = {}
    version = importlib.metadata.version

    def fake(package: str) -> str:
        if package not in changed:
            return version(package)
        found = changed[package]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "version", fake)
    return changed


def states() -> dict[str, str]:
    return {finding.name: finding.state for finding in software.software()}


def test_this_environment_can_train() -> None:
    assert "wrong" not in states().values()


def test_an_old_python_is_refused() -> None:
    assert software.python((3, 9, 18)).state == "wrong"
    assert software.python((3, 10, 0)).state == "good"


@pytest.mark.parametrize("package", ["torch", "triton", "tokenizers"])
def test_a_missing_package_is_wrong_and_has_a_remedy(installed: dict[str, str | None], package: str) -> None:
    installed[package] = None
    wrong = [finding for finding in software.software() if finding.state == "wrong"]
    assert len(wrong) == 1 and "make setup" in wrong[0].remedy and (package in wrong[0].name + wrong[0].found)


def test_an_old_torch_is_wrong(installed: dict[str, str | None]) -> None:
    installed["torch"] = "2.9.1+cu128"
    assert states()["torch"] == "wrong"


def test_a_triton_that_torch_was_not_built_with_is_wrong(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = ['triton==3.7.1; platform_system == "Linux"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: pinned if package == "torch" else [])
    installed["triton"] = "3.6.0"
    assert software.triton_package().state == "wrong" and "3.7.1" in software.triton_package().remedy
    installed["triton"] = "3.7.1"
    assert software.triton_package().state == "good"


def test_a_flash_attn_that_does_not_load_is_wrong(installed: dict[str, str | None]) -> None:
    installed["flash-attn"] = "2.8.0"  # said to be there, and cannot be imported
    assert software.flash_attention().state == "wrong"


def test_missing_extras_are_noted(installed: dict[str, str | None]) -> None:
    installed["sacrebleu"] = None
    notes = [finding for finding in software.software() if finding.name == "extra eval"]
    assert notes[0].state == "note" and "[eval]" in notes[0].remedy


def test_a_foreign_package_of_our_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels-0.5.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.5.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [finding for finding in software.foreign_packages() if finding.name == "package kernels"]
    assert len(found) == 1 and "0.5.0" in found[0].found and "pip uninstall kernels" in found[0].remedy


def test_a_foreign_package_on_pythonpath_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{software.ROOT}:{tmp_path}")
    assert [finding.name for finding in software.foreign_packages()] == ["package model"]


def test_the_report_names_what_to_mend() -> None:
    said = render([Finding("a", "good", "1"), Finding("b", "wrong", "none", "Get one."), Finding("c", "note", "2")])
    assert said.endswith("Training cannot work here: mend b.") and "→ Get one." in said
    assert render([Finding("c", "note", "2")]).endswith("Training can work here.")
