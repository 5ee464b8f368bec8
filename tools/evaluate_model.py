"""Evaluate models, compare them, and write a report.

    torchrun --nproc-per-node 8 tools/evaluate_model.py --model ckpt/ppo ckpt/sft \
        --tasks cmmlu=data/cmmlu,shots=5 medqa=data/medqa.jsonl ccks2019=data/subtask1_test_set_with_answer.json
    python tools/evaluate_model.py                # the newest model in ckpt/ on the bundled questions
    python tools/evaluate_model.py --dry-run      # what would be asked

Interrupted, the same command goes on. docs/evaluation.md tells more.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.launch import is_main_process, run, speak
from evals.eval_config import EvaluationConfig
from evals.evaluation_job import evaluate_models, plan_evaluation
from evals.preview import describe
from evals.summary import summary
from rlhf.answer_judge import AnswerJudge
from samples.bundle import bundled_tasks, sample_folder
from samples.quiz_task import BUILDERS


def main(config: EvaluationConfig) -> None:
    if config.tasks:
        return evaluate(config)
    speak("No --tasks: these are the bundled questions.")
    with sample_folder(config.out, config.dry_run) as folder:
        config.tasks = [*bundled_tasks(folder, with_reward=config.reward is not None)]
        evaluate(config)


def evaluate(config: EvaluationConfig) -> None:
    if config.dry_run:
        for respondent, tasks in plan_evaluation(config, AnswerJudge, BUILDERS):
            print("\n".join(describe(respondent, tasks)))
        return
    evaluations = evaluate_models(config, AnswerJudge, BUILDERS)
    if is_main_process():
        print("\n".join(summary(evaluations)))
        print(f"{config.out}/report.html: the same with more metrics, comparisons, plots and samples")


if __name__ == "__main__":
    run(main, EvaluationConfig)
