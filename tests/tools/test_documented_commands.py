"""Every command of the documentation is run: here, as it stands, in a folder of small files; or where a list says."""

from __future__ import annotations

import functools
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from samples.chain.stages import ADAPTER_STAGES, STAGES
from tests.documented import PAGES, RECIPES, ROOT, Command, commands, others, recipe_commands
from tests.tools.documented_files import shortened, write_documented_files
from tests.tools.in_child import run_tool
from tests.tools.small_chat import read_from

# Run by another test, each of a tool's own; the first pattern that fits counts.
ELSEWHERE = {
    "tools/bench_eval.py *": "tests/tools/test_bench_eval.py",
    "tools/bench_generate.py *": "tests/tools/test_bench_generate.py",
    "tools/bench_ppo.py *": "tests/tools/test_bench_ppo.py",
    "tools/bench_serve.py *": "tests/tools/test_bench_serve.py",
    "tools/bench_train.py *": "tests/tools/test_bench_train.py",
    "tools/convert.py merge *": "tests/tools/test_convert_adapter.py",
    "tools/convert.py verify *": "tests/tools/test_convert.py",
    "tools/doctor.py*": "tests/tools/test_doctor.py",
    "tools/evaluate_model.py": "tests/tools/test_evaluate_bundled.py",
    "tools/evaluate_model.py --config configs/paper_evaluation.yaml *": "tests/tools/test_paper_evaluation.py",
    "tools/serve.py *": "tests/tools/test_serve.py",
    "tools/* --config configs/*/*": "tests/tools/test_recipes.py",
}
# No test can run these; why, and what comes nearest.
CANNOT = {
    "make setup": "downloads packages; tests/fresh_clone.sh",
    "make demo": "is the whole regime, a quarter of an hour; tests/fresh_clone.sh",
    "make demo-lora": "is the regime with adapters behind it; tests/samples/test_lora_bands.py",
    "make test": "is this; tests/fresh_clone.sh",
    "make lint": "is no test",
    "make modules": "tests/test_house.py compares what it would write",
    "make bench-kernels": "times kernels; tests/tools/test_bench_kernels.py",
    "make tune-kernels": "needs a GPU",
    "make test-gpu": "needs a GPU",
    "sbatch *": "needs Slurm; tests/tools/test_cluster.py",
    "torchrun --shutdown-timeout *": "options of torchrun's; tests/tools/test_cluster.py",
    "*python -m venv *": "what follows downloads packages of others",
    "*/bin/pip install *": "downloads packages of others",
    ".venv/bin/pip download *": "downloads packages of others",
    "/tmp/race/bin/python tools/bench_ppo.py": "needs TRL; tests/tools/test_bench_ppo.py",
    "curl http://127.0.0.1:8000/*": "needs a server; tests/engine/serving/test_malformed.py sends the same",
    "lm/bin/lm_eval *": "another project's program; tests/evals/record_lm_eval.py",
    "bash scripts/run_*.sh": "another project's, to be moved away from",
}
BUNDLED = {stage.command for stage in (*STAGES, *ADAPTER_STAGES)}


def line(command: Command) -> str:
    return " ".join([command.program, *command.words])


def where(command: Command) -> str:
    """Who else runs it: a test, or the stages of the demo; nothing where nobody does."""
    if line(command) in BUNDLED or command.program == "samples/render.py":
        return "samples/chain/stages.py"
    return next((test for pattern, test in ELSEWHERE.items() if fnmatchcase(line(command), pattern)), "")


ALL = [
    *(command for page in PAGES for command in commands(page)),
    *(c for path in RECIPES for c in recipe_commands(path)),
]
PLAYED = list({line(command): command for command in ALL if not where(command)}.values())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documented_files(tmp_path_factory.mktemp("documented"))


@pytest.mark.parametrize("command", PLAYED, ids=str)
def test_a_documented_command_runs(template: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "work"
    shutil.copytree(template, folder)
    tool, words = Path(command.program).stem, shortened(command.program, command.words)
    out = words[words.index("--out") + 1] if "--out" in words else f"ckpt/{tool}"
    shutil.rmtree(folder / out, ignore_errors=True)  # of another page's example
    (ended,) = run_tool(tool, *words, cwd=folder, before=functools.partial(read_from, "lines"))
    assert ended.code == 0, ended.stderr


def test_the_tests_that_are_said_to_run_the_others_do() -> None:
    for pattern, test in ELSEWHERE.items():
        tool = re.match(r"tools/([\w*]+)", pattern)
        assert tool is not None and any(fnmatchcase(line(command), pattern) for command in ALL), pattern
        text = (ROOT / test).read_text(encoding="utf-8")
        assert tool[1] == "*" or tool[1] in text, f"{test} does not run {tool[1]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_no_tool_of_ours_is_on_the_list_of_what_no_test_can_run(page: Path) -> None:
    for number, typed in others(page):
        assert any(fnmatchcase(typed, pattern) for pattern in CANNOT), f"{page.name}:{number}: who runs {typed}?"


def test_the_list_of_what_no_test_can_run_has_nothing_that_no_page_shows() -> None:
    shown = [typed for page in PAGES for _, typed in others(page)]
    assert [pattern for pattern in CANNOT if not any(fnmatchcase(typed, pattern) for typed in shown)] == []
    for reason in CANNOT.values():
        for file in re.findall(r"tests/[\w./]+", reason):
            assert (ROOT / file).exists(), file
