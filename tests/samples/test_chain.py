"""The demo's chain: what is done stays done, what is killed goes on, and figures out of place are named."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest

from samples.chain.figures import COLUMNS, MODELS, Figure, figures, gains, out_of_place
from samples.chain.page import write_page
from samples.chain.stages import STAGES, Done, Ledger, Stage, run_stages
from samples.chain.table import aligned, rows, times

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stages(tmp_path: Path) -> tuple[Stage, ...]:
    """Three of them, each of which writes a file and counts its calls."""
    script = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    )
    (tmp_path / "step.py").write_text(script)
    return tuple(Stage(name, name.title(), f"step.py {name}.txt", 5, f"{name}.txt") for name in ("one", "two", "three"))


def calls(folder: Path) -> dict[str, int]:
    return {path.stem: len(path.read_text()) for path in folder.glob("*.txt")}


def test_stages_run_once_and_their_commands_are_said(
    tmp_path: Path, stages: tuple[Stage, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path, stages)
    assert run_stages(stages, ledger, tmp_path) == 0
    assert capfd.readouterr().out.count("$ python step.py") == 3
    assert run_stages(stages, ledger, tmp_path) == 0
    assert calls(tmp_path) == {"one": 1, "two": 1, "three": 1}
    said = capfd.readouterr().out
    assert "[2/3] Two: done" in said and "$ python" not in said


def test_a_stage_that_fails_ends_the_chain_with_its_code_and_is_run_again(
    tmp_path: Path, stages: tuple[Stage, ...]
) -> None:
    (tmp_path / "fail.py").write_text("import sys; sys.exit(3)")
    broken = (stages[0], Stage("two", "Two", "fail.py", 5), stages[2])
    assert run_stages(broken, Ledger(tmp_path, broken), tmp_path) == 3
    assert calls(tmp_path) == {"one": 1}
    assert run_stages(stages, Ledger(tmp_path, stages), tmp_path) == 0
    assert calls(tmp_path) == {"one": 1, "two": 1, "three": 1}


def test_a_stage_whose_work_is_gone_or_whose_command_is_another_is_run_again_with_all_behind_it(
    tmp_path: Path, stages: tuple[Stage, ...]
) -> None:
    run_stages(stages, Ledger(tmp_path, stages), tmp_path)
    (tmp_path / "two.txt").unlink()
    run_stages(stages, Ledger(tmp_path, stages), tmp_path)
    assert calls(tmp_path) == {"one": 1, "two": 1, "three": 2}
    changed = (stages[0]._replace(command="step.py one.txt --more"), *stages[1:])
    run_stages(changed, Ledger(tmp_path, changed), tmp_path)
    assert calls(tmp_path) == {"one": 2, "two": 2, "three": 3}


def test_what_is_typed_reaches_the_command_and_its_memory_is_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "read.py").write_text("block = bytearray(300_000_000)\nprint('read', input())")
    (stage,) = (Stage("read", "Read", "read.py", 5, typed="医生"),)
    ledger = Ledger(tmp_path, (stage,))
    assert run_stages((stage,), ledger, tmp_path) == 0
    said = capfd.readouterr().out
    assert "$ echo '医生' | python read.py" in said and "read 医生" in said
    assert 0.3 < ledger.read()[0].gigabytes < 0.6


def test_killed_in_a_stage_the_chain_goes_on_with_that_stage(tmp_path: Path, stages: tuple[Stage, ...]) -> None:
    (tmp_path / "wait.py").write_text(
        "import pathlib, time\n"
        "if not pathlib.Path('again').exists():\n"
        "    pathlib.Path('again').touch(); time.sleep(3600)\n"
        "pathlib.Path('two.txt').write_text('x')"
    )
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from samples.chain.stages import Ledger, Stage, run_stages\n"
        "names = ('step.py one.txt', 'wait.py', 'step.py three.txt')\n"
        "stages = tuple(Stage(name, name, name, 5) for name in names)\n"
        "sys.exit(run_stages(stages, Ledger(Path('.'), stages), Path('.')))"
    )
    command = [sys.executable, "run.py"]
    running = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE)
    while not (tmp_path / "again").exists():
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert calls(tmp_path) == {"one": 1, "two": 1, "three": 1}


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a chain would leave, of figures that lie in their bands."""
    values = {"pretrain": 0.1, "sft": 0.8, "rejection": 0.9, "ppo": 0.9}
    for name, loss in (("pretrain", 1.47), ("sft", 0.68)):
        (tmp_path / "ckpt" / name).mkdir(parents=True)
        lines = [{"step": 0, "held_out_loss": 8.0}, {"step": 9, "loss": 1.0}, {"step": 9, "held_out_loss": loss}]
        (tmp_path / "ckpt" / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "ckpt" / "rm").mkdir()
    (tmp_path / "ckpt" / "rm" / "report.json").write_text(json.dumps({"accuracy": [0.83, 0.80, 0.86]}))
    sections: dict[str, dict[str, list[dict[str, object]]]] = {}
    for task, metric in COLUMNS.values():
        for model, value in values.items():
            value = min(value, 0.32) if task == "entities" and model != "pretrain" else value
            one = {"name": metric, "value": value, "low": value - 0.02, "high": value + 0.02}
            sections.setdefault(task, {}).setdefault(model, []).append(one)
    report = [
        {
            "label": task,
            "entries": [{"model": model, "metrics": metrics} for model, metrics in by_model.items()],
            "comparisons": [
                {
                    "metric": first["name"],
                    "a": a,
                    "b": b,
                    "difference": {"value": first["value"] - second["value"], "low": -0.9, "high": -0.05},  # type: ignore[operator]
                }
                for a, b in itertools.combinations(MODELS, 2)
                for first, second in zip(by_model[a], by_model[b], strict=True)
            ],
        }
        for task, by_model in sections.items()
    ]
    for model in MODELS:
        folder = tmp_path / "ckpt" / "evaluation" / model / "qa"
        folder.mkdir(parents=True)
        said = ({"id": str(n), "shown": f"q{n} <b>", "gold": f"g{n}", "answer": f"{model} {n}"} for n in range(12))
        (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, said)))
    (tmp_path / "ckpt" / "evaluation" / "report.json").write_text(json.dumps({"sections": report}))
    return tmp_path


def test_figures_are_those_that_the_stages_left(left: Path) -> None:
    found = figures(left)
    assert found["sft.loss"] == Figure(0.68) and found["rm.accuracy"] == Figure(0.83, 0.80, 0.86)
    assert found["ppo.true reward"].value == 0.9 and found["sft.entity F1"].low == pytest.approx(0.30)
    gained = gains(left)
    assert gained["sft", "ppo", "true reward"] == pytest.approx(Figure(0.1, 0.05, 0.9))
    assert gained["ppo", "sft", "true reward"] == pytest.approx(Figure(-0.1, -0.9, -0.05))
    assert out_of_place(found, gained) == []


@pytest.mark.parametrize(
    ("name", "figure", "said"),
    [
        ("sft.loss", Figure(1.2), "sft.loss is 1.2; it should lie between"),
        ("rm.accuracy", Figure(0.5), "rm.accuracy is 0.5"),
    ],
)
def test_a_figure_out_of_its_band_is_named(left: Path, name: str, figure: Figure, said: str) -> None:
    (sentence,) = out_of_place({**figures(left), name: figure}, gains(left))
    assert sentence.startswith(said)


@pytest.mark.parametrize(
    ("who", "figure", "said"),
    [
        (
            ("sft", "ppo", "true reward"),
            Figure(0.03, -0.01, 0.07),
            "true reward: ppo is +0.030 (-0.010 to",
        ),
        (("pretrain", "sft", "entity F1"), Figure(-0.2, -0.3, -0.1), "entity F1: sft is -0.200"),
    ],
)
def test_a_gain_that_is_not_sure_is_named(left: Path, who: tuple[str, str, str], figure: Figure, said: str) -> None:
    (sentence,) = out_of_place(figures(left), {**gains(left), who: figure})
    assert sentence.startswith(said)


def test_the_table_has_a_row_for_each_model_and_its_intervals(left: Path) -> None:
    lines = aligned(rows(figures(left)))
    assert [line.split()[0] for line in lines[1:]] == list(MODELS)
    assert "0.680" in lines[2] and "80.0 [78.0, 82.0]" in lines[2] and "0.900 [0.880, 0.920]" in lines[3]


def test_all_budgets_together_are_nine_minutes() -> None:
    assert sum(stage.budget for stage in STAGES) == 9 * 60


def test_a_stage_over_its_budget_is_said() -> None:
    done = [Done(stage.name, stage.command, stage.budget - 1, 1.5) for stage in STAGES]
    assert len(times(STAGES, done)) == 2
    late = [*done[:-1], Done(STAGES[-1].name, STAGES[-1].command, STAGES[-1].budget + 1, 1.5)]
    assert f"Over its budget: {STAGES[-1].name}" in times(STAGES, late)[1]


def test_the_page_needs_nothing_else_and_says_what_it_was_given(left: Path) -> None:
    class Outside(HTMLParser):
        sources: ClassVar[list[str]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.sources += [value or "" for name, value in attrs if name in ("src", "srcset")]

    (left / "ckpt" / "sft" / "curves.png").write_bytes(b"\x89PNG")
    text = write_page(left, STAGES, figures(left)).read_text(encoding="utf-8")
    reader = Outside()
    reader.feed(text)
    assert reader.sources == ["data:image/png;base64,iVBORw=="]
    assert "q0 &lt;b&gt;" in text and "<b>" not in text
    assert all(f"{model} {n}" in text for model in MODELS for n in (0, 2, 4, 7, 9))
    assert "tools/ppo.py --reward ckpt/rm" in text
