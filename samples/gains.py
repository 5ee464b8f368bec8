"""What tuning on a reward has brought: the true reward of sampled answers to held-out questions, before and after.

    python samples/gains.py ckpt/sft ckpt/ppo

Both models answer every question several times, as in the rollouts that one was trained on, without filters. What is
compared is a question's mean over its answers, and intervals are of a bootstrap over questions, both models' answers to
a question drawn together. Beside the gain stands the gain at equal length,

    gain - slope × (length after - length before),

slope: of the true reward on length among one model's answers to one question, pooled over all (analysis of covariance).
It is what is left of a gain that longer answers alone would explain. The KL divergence from the model before is that of
the answers after, log p_after - log p_before summed over an answer's tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if not __package__:  # run as a script: the repository's root, which holds this package, is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.publish import require_model
from model.chat import ChatTemplate
from model.errors import InputError
from model.generate import Completion, Generator, Request
from model.sampling import SamplingOptions
from model.tokenizer import Tokenizer
from samples.dialogues import render_dialogues
from samples.knowledge import load_knowledge
from samples.questions import Question, questions_of
from samples.quiz import compare
from samples.true_reward import Judge, TrueReward

ANSWERS = 4  # to a question
RESAMPLES = 2000
SHOWN = 3  # questions of which an answer is shown

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """Of a difference or a mean over questions, with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Trial:
    """What a model answers to Q questions, A times each.

    rewards: [Q, A, 5]: correct, complete, cautious, safe and the total, each 0 to 1.
    lengths: [Q, A], tokens of the answers, with the one that ends them.
    """

    answers: list[list[Completion]]
    rewards: Array
    lengths: Array


def report_gains(before: Path | str, after: Path | str, longest: int = 64, temperature: float = 1.0) -> str:
    """How two model directories answer the held-out questions: lines with the gain, its parts, and some answers.

    Args:
        longest: tokens of an answer.
        temperature: of sampling.
    """
    knowledge = load_knowledge()
    questions = questions_of(render_dialogues(knowledge)[1])
    judge = Judge(knowledge)
    tokenizer = Tokenizer.load(after)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    generators = [Generator.from_directory(directory) for directory in (before, after)]
    options = SamplingOptions(temperature, max_new_tokens=longest, stop_ids=template.end_ids(tokenizer))
    old, new = (try_out(generator, template, questions, options, judge) for generator in generators)
    lines = [
        f"{len(questions)} held-out questions, {ANSWERS} sampled answers each (temperature {temperature:g}), "
        "before and after, with 95% intervals:",
        *gain_lines(old, new),
        f"KL(after ‖ before)   {divergence(generators[0], template, questions, new)} nats an answer",
        "Token by token the likeliest:",
        compare(before, after, longest),
    ]
    for number in range(0, len(questions), len(questions) // SHOWN + 1):
        lines += ["", *_shown(questions[number], old, new, number)]
    return "\n".join(lines)


def try_out(
    generator: Generator, template: ChatTemplate, questions: Sequence[Question], options: SamplingOptions, judge: Judge
) -> Trial:
    """Sampled answers to every question, judged."""
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    requests = [
        Request(template.encode_prompt(tokenizer, question.messages), options, ANSWERS, seed)
        for seed, question in enumerate(questions)
    ]
    completions = generator.generate(requests)
    answers = [completions[start : start + ANSWERS] for start in range(0, len(completions), ANSWERS)]
    verdicts = [[judge(q, one.text or "") for one in own] for q, own in zip(questions, answers, strict=True)]
    rewards = np.array([[(*verdict, verdict.total) for verdict in own] for own in verdicts])
    return Trial(answers, rewards, np.array([[len(one.ids) for one in own] for own in answers], float))


def gain_lines(old: Trial, new: Trial) -> list[str]:
    """The gain in the true reward, at any length and at equal length, and in each of its parts."""
    rise = (new.rewards - old.rewards).mean(axis=1)  # [Q, 5]
    *parts, total = range(rise.shape[1])
    lines = []
    for name, index in (("true reward", total), *zip(TrueReward._fields, parts, strict=True)):
        means = f"{old.rewards[..., index].mean():.3f} → {new.rewards[..., index].mean():.3f}"
        lines.append(f"{name:18}   {means}   {mean_over(rise[:, index])}")
    lines.insert(1, f"{'  at equal length':18}   {'':13}   {gain_at_equal_length(old, new)}")
    return [*lines, f"{'tokens an answer':18}   {old.lengths.mean():.1f} → {new.lengths.mean():.1f}"]


def gain_at_equal_length(old: Trial, new: Trial) -> Estimate:
    """The gain in the true reward, less what the change in length explains; see above."""
    rise = (new.rewards - old.rewards)[..., -1].mean(axis=1)  # [Q]
    longer = (new.lengths - old.lengths).mean(axis=1)
    square = product = np.zeros(len(rise))
    for trial in (old, new):
        length = trial.lengths - trial.lengths.mean(axis=1, keepdims=True)
        square = square + (length**2).sum(axis=1)
        product = product + (length * trial.rewards[..., -1]).sum(axis=1)

    def adjusted(drawn: Array) -> float:
        slope = product[drawn].sum() / max(square[drawn].sum(), 1e-9)
        return rise[drawn].mean() - slope * longer[drawn].mean()

    return bootstrap(adjusted, len(rise))


def divergence(before: Generator, template: ChatTemplate, questions: Sequence[Question], new: Trial) -> Estimate:
    """KL(after ‖ before) in nats an answer, estimated on the answers of the model after."""
    assert before.tokenizer is not None
    prompts = [template.encode_prompt(before.tokenizer, question.messages) for question in questions]
    scores = before.score(prompts, [[one.ids for one in own] for own in new.answers])
    ratios = [
        np.mean([sum(one.logprobs) - sum(score) for one, score in zip(own, scored, strict=True)])
        for own, scored in zip(new.answers, scores, strict=True)
    ]
    return mean_over(np.array(ratios))


def bootstrap(statistic: Callable[[Array], float], count: int) -> Estimate:
    """A statistic of `count` units, given the numbers of the drawn ones, with its percentile interval (Efron 1979)."""
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile([statistic(draw) for draw in draws], (0.025, 0.975))
    return Estimate(float(statistic(np.arange(count))), float(low), float(high))


def mean_over(values: Array) -> Estimate:
    """The mean of values [Q], one a question."""
    return bootstrap(lambda drawn: values[drawn].mean(), len(values))


def _shown(question: Question, old: Trial, new: Trial, number: int) -> list[str]:
    """A question with a model's first answer before and after, each with its true reward."""
    lines = [question.messages[-1].content]
    for when, trial in (("before", old), ("after", new)):
        lines.append(f"  {when:6} {trial.rewards[number, 0, -1]:.2f}  {trial.answers[number][0].text}")
    return lines


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        print("usage: python samples/gains.py MODEL_BEFORE MODEL_AFTER", file=sys.stderr)
        return 2
    try:
        before, after = map(require_model, arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(report_gains(before, after))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
