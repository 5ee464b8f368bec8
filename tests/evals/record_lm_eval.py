"""What lm-evaluation-harness says of the oracle models, written down for the tests.

    python -m venv lm && lm/bin/pip install 'lm_eval[hf]==0.4.13' torch
    lm/bin/python tests/evals/record_lm_eval.py samples
    lm/bin/python tests/evals/record_lm_eval.py real --cmmlu FOLDER

`samples` asks the questions of `choice_samples.py`, as ceval-valid and as cmmlu, and writes all log-likelihoods.
`real` asks the seven subjects of CMMLU of a folder with dev/ and test/, and writes which letter is the likeliest, mean
log-likelihoods and scores; nothing of the questions. Both write to tests/evals/recorded/.

The harness is used as it is, its own task files included; only the place where the questions come from is another:
`datasets.load_dataset` gives the rows of the local tables, as text.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evals.choice_subjects import CMMLU_PAPER  # noqa: E402
from tests.evals.choice_samples import CMMLU_SUBJECTS, SUBJECTS, write_ceval, write_cmmlu  # noqa: E402
from tests.evals.oracle_models import CONTEXT, write_oracle_model  # noqa: E402

RECORDED = ROOT / "tests" / "evals" / "recorded"
SHORT = 128
"""A context that five exemplars exceed."""
PACKAGES = ("lm_eval", "transformers", "tokenizers", "torch", "datasets")


def serve(folder: Path) -> None:
    """Let the harness find the tables of a folder where it looks for those of the hub."""
    import datasets

    def load_dataset(path: str, name: str, **_: Any) -> Any:
        def read(file: Path) -> Any:
            with open(file, encoding="utf-8-sig", newline="") as stream:
                return datasets.Dataset.from_list(list(csv.DictReader(stream)))

        if "ceval" in path:
            return datasets.DatasetDict({key: read(folder / key / f"{name}_{key}.csv") for key in ("dev", "val")})
        return datasets.DatasetDict({key: read(folder / key / f"{name}.csv") for key in ("dev", "test")})

    datasets.load_dataset = load_dataset


def ask(directory: Path, folder: Path, tasks: list[str], shots: int) -> dict[str, Any]:
    """By task its log-likelihoods in the order of the questions and its scores; and the scores of all together."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    serve(folder)
    weighted = [{"metric": name, "weight_by_size": True} for name in ("acc", "acc_norm")]
    group = {"group": "all", "task": tasks, "aggregate_metric_list": weighted}
    (directory / "all.yaml").write_text(json.dumps(group))  # JSON is YAML
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=["all"],
        task_manager=TaskManager(include_path=str(directory)),
        num_fewshot=shots,
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    by_task: dict[str, Any] = {}
    for task in tasks:
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        scores = {name: found["results"][task][f"{name},none"] for name in ("acc", "acc_norm")}
        by_task[task] = {
            "logprobs": [[float(response[0][0]) for response in sample["resps"]] for sample in samples],
            "right": [int(sample["acc"]) for sample in samples],
            **scores,
        }
    scores = {name: found["groups"]["all"][f"{name},none"] for name in ("acc", "acc_norm")}
    return {"shots": shots, "tasks": by_task, **scores}


def condense(run: dict[str, Any]) -> dict[str, Any]:
    """Letters and means in place of every log-likelihood; `margin` is the smallest lead of a likeliest letter."""
    margins = []
    for task in run["tasks"].values():
        logprobs = task.pop("logprobs")
        task.pop("right")
        task["choices"] = "".join("ABCD"[max(range(4), key=own.__getitem__)] for own in logprobs)
        task["mean_logprobs"] = [round(sum(column) / len(logprobs), 6) for column in zip(*logprobs, strict=True)]
        margins += [(ordered := sorted(own))[-1] - ordered[-2] for own in logprobs]
    return {**run, "margin": min(margins)}


def fingerprint(folder: Path, subjects: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for subject in subjects:
        for split in ("dev", "test"):
            digest.update((folder / split / f"{subject}.csv").read_bytes())
    return digest.hexdigest()[:32]


def write(name: str, record: dict[str, Any]) -> None:
    RECORDED.mkdir(exist_ok=True)
    record = {"made by": {package: version(package) for package in PACKAGES}, **record}
    (RECORDED / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def record_samples(folder: Path) -> None:
    tasks = {
        "ceval": [f"ceval-valid_{subject}" for subject in SUBJECTS],
        "cmmlu": [f"cmmlu_{subject}" for subject in CMMLU_SUBJECTS],
    }
    files = {"ceval": write_ceval(folder / "ceval"), "cmmlu": write_cmmlu(folder / "cmmlu")}
    asked = [(dataset, shots, CONTEXT) for dataset in tasks for shots in (0, 2, 5)] + [("cmmlu", 5, SHORT)]
    runs = {}
    for kind in ("spm", "bytes"):
        for dataset, shots, context in asked:
            model = write_oracle_model(folder / f"{kind} {context}", kind, context)
            runs[f"{dataset} {kind} {shots} {context}"] = ask(model, files[dataset], tasks[dataset], shots)
    write("lm_eval_samples", {"runs": runs})


def record_real(folder: Path, files: Path) -> None:
    tasks = [f"cmmlu_{subject}" for subject in CMMLU_PAPER]
    asked = (("spm", 0), ("spm", 5), ("bytes", 0))
    models = {kind: write_oracle_model(folder / kind, kind) for kind in ("spm", "bytes")}
    runs = {f"{kind} {shots}": condense(ask(models[kind], files, tasks, shots)) for kind, shots in asked}
    write("lm_eval_cmmlu", {"files": fingerprint(files, CMMLU_PAPER), "runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("samples", "real"))
    parser.add_argument("--cmmlu", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.what == "samples":
            record_samples(folder)
        else:
            record_real(folder, options.cmmlu)


if __name__ == "__main__":
    main()
