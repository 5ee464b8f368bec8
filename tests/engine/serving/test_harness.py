"""lm-evaluation-harness, as its authors publish it, asks a server: its log-likelihoods are those of our own scoring.

`make test` installs it into .venv/harness, where nothing else sees it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.scoring import score
from tests.engine.serving.live import NAME, Alone, Live

HARNESS = Path(sys.prefix) / "harness"
TASK = """
task: ward_round
dataset_path: json
dataset_kwargs:
  data_files:
    test: ward_round.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{A}}\\nB. {{B}}\\n答案："
doc_to_choice: ["A", "B"]
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
QUESTIONS = [("发热的病人应当多做什么？", "喝水", "熬夜", "A"), ("咳嗽三天，先做什么？", "跑步", "就诊", "B")]
QUESTIONS += [("高血压要少吃什么？", "盐", "蔬菜", "A"), ("头晕时可以开车吗？", "可以", "不可以", "B")]


@pytest.mark.skipif(not (HARNESS / "lm_eval").is_dir(), reason="lm-evaluation-harness is installed by `make test`")
def test_its_likelihoods_are_those_of_our_own_scoring(
    live: Live, alone: Alone, directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "ward_round.yaml").write_text(TASK, encoding="utf-8")
    with open(tmp_path / "ward_round.jsonl", "w", encoding="utf-8") as file:
        for question, a, b, answer in QUESTIONS:
            print(json.dumps({"question": question, "A": a, "B": b, "answer": answer}, ensure_ascii=False), file=file)
    asked = f"model={NAME},base_url=http://127.0.0.1:{live.port}/v1/completions,tokenizer={directory}"
    words = ["--model", "local-completions", "--model_args", f"{asked},add_bos_token=True,num_concurrent=4"]
    words += ["--tasks", "ward_round", "--include_path", ".", "--log_samples", "--output_path", "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "*"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(HARNESS)}
    command = [sys.executable, "-m", "lm_eval", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_ward_round_*.jsonl")
    tokenizer, asked_pairs = alone.directory.tokenizer, 0
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for arguments, (told, is_greedy) in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            context, continuation = arguments["arg_0"], arguments["arg_1"]
            before = tokenizer.encode(context)
            behind = tokenizer.encode(context + continuation)[len(before) :]
            prompt = [tokenizer.bos_id, *before]
            ((own,),) = score(alone.generator.model, [prompt], [[behind]], with_greedy=True)
            assert float(told) == pytest.approx(sum(own.logprobs), abs=1e-5)
            assert str(is_greedy) == str(own.is_greedy)
            asked_pairs += 1
    assert asked_pairs == 2 * len(QUESTIONS)
