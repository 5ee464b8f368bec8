"""Nothing that a command reads, and no model that it could not go on from, is where it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.building import set_run_aside
from engine.job import JobConfig
from engine.out_directory import require_apart, require_run
from engine.pretraining import PretrainConfig
from engine.sft import SftConfig
from model.errors import InputError
from rlhf.dpo_job import DpoConfig
from rlhf.ppo_config import KlConfig, PpoConfig, RewardConfig, ValueConfig
from rlhf.rejection_config import RejectionConfig
from rlhf.reward_job import RmConfig

SOME = "somewhere"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, a link to it, and an adapter that stands on it."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
    return tmp_path


@pytest.mark.parametrize("read", ["base", "link", "adapter", "./adapter/../base/"])
@pytest.mark.parametrize("out", ["base", "base/", "./base", "link", "adapter/../link"])
def test_what_is_read_is_not_where_is_written_by_whatever_path(folder: Path, read: str, out: str) -> None:
    with pytest.raises(InputError, match=rf"--out {out}: --reward {read} is read from there, and would be replaced"):
        require_apart(out, {"--model": None, "--reward": read})
    with pytest.raises(InputError, match="is read from there"):
        require_apart(str(folder / out), {"--reward": read})


@pytest.mark.parametrize("read", [None, "tiny", "rules:score", "adapter", "gone"])
def test_other_directories_and_names_of_something_else_are_free(folder: Path, read: str | None) -> None:
    for out in ("new", "base/new", "gone"):
        require_apart(out, {"--model": read})


JOBS: list[tuple[str, JobConfig]] = [
    *((option, job(**{option[2:]: SOME}))
      for job in (PretrainConfig, SftConfig, RmConfig, DpoConfig, PpoConfig, RejectionConfig)
      for option in ("--model", "--tokenizer")),
    ("--reward", RejectionConfig(reward=SOME)),
    ("--reward", PpoConfig(reward=RewardConfig(source=SOME))),
    ("--kl.reference", PpoConfig(kl=KlConfig(reference=SOME))),
    ("--value.model", PpoConfig(value=ValueConfig(model=SOME))),
]  # fmt: skip


@pytest.mark.parametrize(("option", "config"), JOBS, ids=lambda value: str(getattr(type(value), "__name__", value)))
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_job_never_writes_where_it_reads(folder: Path, option: str, config: JobConfig, resume: str) -> None:
    (folder / SOME / "state").mkdir(parents=True)  # a run of its own there changes nothing
    config.out, config.resume = str(folder / "other"), resume  # type: ignore[assignment]
    config.check()
    config.out = SOME
    with pytest.raises(InputError, match=rf"--out {SOME}: {option} {SOME} is read from there"):
        config.check()


def test_a_presets_name_is_no_directory_to_pretraining(folder: Path) -> None:
    (folder / "tiny").mkdir()
    PretrainConfig(model="tiny", out="tiny").check()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.json", "model"),
        ("model.safetensors", "model"),
        ("model-00001-of-00002.safetensors", "model"),
        ("pytorch_model.bin.index.json", "model"),
        ("adapter_model.bin", "model"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer.model", "tokenizer"),
    ],
)
@pytest.mark.parametrize("runs", ["state", "rounds"])
def test_a_model_is_left_alone_where_there_is_no_run_to_go_on_with(
    folder: Path, name: str, kind: str, runs: str
) -> None:
    (folder / "base" / name).write_text("")
    for out in ("base", "link"):
        with pytest.raises(InputError, match=rf"--out {out} holds a {kind} \({name}\) and no run that could go on"):
            require_run(out)
        with pytest.raises(InputError, match="holds a"):
            SftConfig(model="other", out=out).check()
    SftConfig(model="other", out="base", resume="never").check()
    (folder / "base" / runs).mkdir()
    require_run("base")


def test_a_directory_in_which_a_run_has_begun_or_another_thing_lies_is_a_runs(folder: Path) -> None:
    require_run("gone")
    for name in ("prepared", "tokenizer", "sample"):
        (folder / "base" / name).mkdir()
    (folder / "base" / "tokenizer" / "tokenizer.json").write_text("")
    for name in ("config.yaml", "metrics.jsonl", "README.md"):
        (folder / "base" / name).write_text("")
    require_run("base")


def test_a_model_without_a_run_is_set_aside_as_a_run_is(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / "base" / name).write_text(name)
    set_run_aside(folder / "base", {})
    assert [path.name for path in (folder / "base").iterdir()] == ["replaced-1"]
    aside = folder / "base" / "replaced-1"
    assert {path.name: path.read_text() for path in aside.iterdir()} == {
        name: name for name in ("config.json", "model.safetensors", "README.md")
    }
    set_run_aside(folder / "base", {})
    assert [path.name for path in (folder / "base").iterdir()] == ["replaced-1"]
