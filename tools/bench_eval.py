"""Race an evaluation by multiple choice against question-by-question forward passes in transformers, on this machine.

    python tools/bench_eval.py                                       # make bench-eval
    python tools/bench_eval.py --data DIR                            # with CMMLU's own questions (dev/ and test/)
    python tools/bench_eval.py --out docs/benchmarks/eval-cpu        # and keep the result

The questions are those of the seven medical subjects of CMMLU, each behind its subject's five exemplars: CMMLU's own,
or random characters in the same numbers and of about the same lengths. What is asked is the log-probability of each
letter. We score all prompts at once, so that exemplars are computed once for many questions; the peer runs a forward
pass for every prompt, computes logits at its last token alone, and attends in the way that is fastest. Both have the
same ids, weights, precision and threads, and take turns. Choices are compared: where they differ, the peer's
log-probabilities of the two letters must be a near-tie.

One character is one token. On a GPU the model has the shape of a 7B one, in bf16.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark import Lap, fastest, median_speed, now, race
from engine.launch import run, speak
from evals.choice import build
from evals.suite import BuildContext, TaskSpec
from evals.task import Choose
from model import scoring
from model.config import ModelConfig
from model.errors import InputError
from model.generate import Generator
from model.hf import read_model
from model.shared_prefixes import plan_passes
from tools.racing import NEAR_TIE, OURS, RaceConfig, keep, require_shape, shape_of, write_lively_model

PEER = "transformers"
_LETTERS = "ABCD"
# Prompts by which the peer's ways of attending are compared.
_TRIED = 12

# Of CMMLU's subjects: questions, the median length in characters of a question, of an option and of an exemplar's
# question, and the standard deviation of the logarithm of a question's length.
_SUBJECTS = {
    "anatomy": (148, 9, 4, 8, 0.5),
    "clinical_knowledge": (237, 84, 6, 19, 0.8),
    "college_medical_statistics": (106, 28, 9, 16, 0.8),
    "genetics": (176, 26, 5, 16, 0.6),
    "nutrition": (145, 16, 5, 14, 0.5),
    "traditional_chinese_medicine": (185, 15, 4, 8, 0.6),
    "virology": (169, 14, 6, 11, 0.5),
}
_OPTION_SPREAD = 0.7


@dataclass
class BenchConfig(RaceConfig):
    """Questions a second, against transformers."""

    data: str | None = None
    """folder of CMMLU's dev/ and test/; by default random characters in the same numbers"""
    model: str | None = None
    """a preset, or `small`: width 512, 8 blocks; by default `small` on a CPU and `7b` on a GPU"""
    shots: int = 5
    """exemplars before each question"""
    limit: int | None = None
    """so many questions, drawn with the seed; by default all"""
    rounds: int = 3
    """times that each answers all questions, in turn"""
    peer_attentions: list[str] = field(default_factory=lambda: ["sdpa", "eager"])
    """transformers' ways of attending that are tried: the fastest races"""
    seed: int = 0
    """of weights, questions that are made up, and `limit`"""

    def check(self) -> None:
        super().check()
        require_shape(self.model)
        if not self.peer_attentions:
            raise InputError("--peer_attentions needs at least one. Give one.")

    def shape(self, device: torch.device) -> ModelConfig:
        return shape_of(self.model, device, "7b")[1]


def write_questions(directory: Path, seed: int) -> None:
    """Files as CMMLU's, of random characters."""
    random = np.random.default_rng(seed)

    def text(median: float, spread: float) -> str:
        length = max(1, round(random.lognormal(np.log(median), spread)))
        return "".join(map(chr, random.integers(0x4E00, 0x4E00 + 2000, min(length, 240))))

    for subject, (questions, long, option, shown, spread) in _SUBJECTS.items():
        for split, count, median in (("dev", 5, shown), ("test", questions, long)):
            (directory / split).mkdir(exist_ok=True)
            with open(directory / split / f"{subject}.csv", "w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["", "Question", *_LETTERS, "Answer"])
                for number in range(count):
                    options = [text(option, _OPTION_SPREAD) for _ in _LETTERS]
                    rows.writerow([number, text(median, spread), *options, random.choice([*_LETTERS])])


@dataclass(frozen=True)
class Questions:
    """names: of each question. prompts: ids of each. letters: ids of the four letters."""

    names: list[str]
    prompts: list[list[int]]
    letters: list[int]

    @classmethod
    def read(cls, directory: Path, config: BenchConfig, shape: ModelConfig) -> Questions:
        """The prompts of the task cmmlu-paper, one id a character.

        Raises:
            InputError: no such files, or prompts that the model cannot take.
        """
        spec = TaskSpec("cmmlu-paper", str(directory), {"shots": str(config.shots), "protocol": "cmmlu"})
        requests = build(spec, BuildContext(seed=config.seed, limit=config.limit)).requests()
        texts = {one.id: one.prompt for one in requests if isinstance(one, Choose) and isinstance(one.prompt, str)}
        characters = sorted({*_LETTERS, *"".join(texts.values())})
        ids = {character: number for number, character in enumerate(characters, 1)}  # 0 begins every prompt
        if len(ids) >= shape.vocab_size:
            raise InputError(f"{directory}: {len(ids)} different characters exceed the vocabulary. Use a larger model.")
        prompts = [[0, *(ids[character] for character in text)] for text in texts.values()]
        if (longest := max(map(len, prompts))) > shape.max_position_embeddings:
            raise InputError(f"{directory}: a prompt has {longest} tokens, more than the context. Use fewer --shots.")
        return cls(list(texts), prompts, [ids[letter] for letter in _LETTERS])


class Ours:
    """logprobs: fp32 [questions, letters], after a step."""

    def __init__(self, directory: Path, shape: ModelConfig, questions: Questions, device: torch.device) -> None:
        self._generator = Generator(shape, device=device, max_rows=1)
        self._generator.load(read_model(directory, shape))
        self._questions, self._device = questions, device
        self._options = [[[letter] for letter in questions.letters]] * len(questions.prompts)

    @property
    def tokens(self) -> int:
        """That forward passes compute."""
        passes = plan_passes(self._questions.prompts, self._options, scoring.TOKEN_BUDGET, scoring.TABLE_ENTRIES)
        branches = (branch for branches in passes for branch in branches)
        return sum(len(self._questions.prompts[branch.prefix]) - branch.shared for branch in branches)

    def step(self) -> Lap:
        begin = now(self._device)
        scores = self._generator.score(self._questions.prompts, self._options)
        lap = Lap(len(scores), now(self._device) - begin)
        self.logprobs = torch.tensor(scores).squeeze(-1)
        return lap


class Peer:
    """A forward pass a question. logprobs: fp32 [questions, letters], after a step."""

    def __init__(self, directory: Path, questions: Questions, device: torch.device, attentions: Sequence[str]) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._questions, self._device = questions, device
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self._model = model.to(device).eval()
        speeds = {}
        for attention in attentions:
            self._model.set_attn_implementation(attention)
            self._score(questions.prompts[:_TRIED])
            begin = now(device)
            self._score(questions.prompts[:_TRIED])
            speeds[attention] = _TRIED / (now(device) - begin)
            speak(f"{PEER}, {attention}: {speeds[attention]:.2f} questions/s")
        self.attention = fastest(speeds)
        self._model.set_attn_implementation(self.attention)

    @torch.inference_mode()
    def _score(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self._device)
            logits = self._model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            rows.append(logits.log_softmax(dim=-1)[self._questions.letters])
        return torch.stack(rows).cpu()

    def step(self) -> Lap:
        begin = now(self._device)
        self.logprobs = self._score(self._questions.prompts)
        return Lap(len(self.logprobs), now(self._device) - begin)


def compare(questions: Questions, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[list[str], list[str]]:
    """Questions whose choices differ: (at a near-tie of the peer's log-probabilities, all others).

    Args:
        ours, theirs: fp32 [questions, letters], log-probabilities.
    """
    chosen = ours.argmax(dim=1)
    behind = theirs.max(dim=1).values - theirs.gather(1, chosen.unsqueeze(1)).squeeze(1)  # 0 where both choose it
    parted = chosen != theirs.argmax(dim=1)
    ties = [questions.names[at] for at in (parted & (behind < NEAR_TIE)).nonzero().flatten().tolist()]
    return ties, [questions.names[at] for at in (parted & (behind >= NEAR_TIE)).nonzero().flatten().tolist()]


def main(config: BenchConfig) -> None:
    config.prepare()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = config.shape(device)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if config.data is None:
            write_questions(directory, config.seed)
        questions = Questions.read(Path(config.data or directory), config, shape)
        write_lively_model(directory, shape, config.seed, device)
        peer = Peer(directory, questions, device, config.peer_attentions)
        ours = Ours(directory, shape, questions, device)
    ours.step()  # memory is touched
    laps = race({OURS: ours, PEER: peer}, config.rounds)
    ties, others = compare(questions, ours.logprobs, peer.logprobs)
    if others and device.type == "cpu":
        raise AssertionError(f"choices differ where there is no near-tie: {', '.join(others)}")
    count, tokens = len(questions.names), sum(map(len, questions.prompts))
    record = {
        "parameters": f"{shape.num_parameters / 1e6:.1f} M",
        "questions": f"{count} {'made up' if config.data is None else 'of CMMLU'}",
        "tokens of prompts": tokens,
        "tokens we compute": ours.tokens,
        "tokens, ratio": f"{tokens / ours.tokens:.2f}",
        "our questions/s": f"{median_speed(laps[OURS]):.2f}",
        "peer's questions/s": f"{median_speed(laps[PEER]):.2f}",
        # The median round's: both answer in it, whatever else the machine does then.
        "ratio": f"{np.median([own.speed / its.speed for own, its in zip(laps[OURS], laps[PEER], strict=True)]):.2f}",
        "peer's attention": peer.attention,
        "equal choices": f"{count - len(ties) - len(others)} of {count}",
        "near-ties": ", ".join(ties),
        "other differences": ", ".join(others),
        "largest difference": f"{(ours.logprobs - peer.logprobs).abs().max():.1e}",
        "speeds": {name: [round(lap.speed, 3) for lap in laps[name]] for name in laps},
    }
    title, command = (
        "Multiple choice against question-by-question forward passes",
        "python tools/bench_eval.py --data DIR",
    )
    keep(config, device, record, _COLUMNS, title, command, _told(config, shape))


_COLUMNS = {
    "Questions": "questions",
    "Tokens of prompts": "tokens of prompts",
    "Computed by us": "tokens we compute",
    "Ours, questions/s": "our questions/s",
    "transformers, questions/s": "peer's questions/s",
    "Ratio": "ratio",
    "Its attention": "peer's attention",
    "Equal choices": "equal choices",
    "Largest difference": "largest difference",
}


def _told(config: BenchConfig, shape: ModelConfig) -> str:
    return (
        f"A LLaMA of width {shape.hidden_size}, {shape.num_layers} blocks, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} key-value heads, feed-forward width {shape.intermediate_size} and vocabulary "
        f"{shape.vocab_size}, fresh weights, one token a character. Questions of CMMLU's seven medical subjects behind "
        f"{config.shots} exemplars of their subject, or made up in the same numbers and of about the same lengths "
        "(without --data). We score all of them in one call; transformers runs a forward pass for each, with logits at "
        "the last token alone. Ratio: our questions a second over transformers', in the median round; speeds are "
        "medians of rounds taken in turn in one process. Largest difference: of two log-probabilities of a letter, in "
        "nats. The rounds and all options of every record are in the .jsonl file beside this page."
    )


if __name__ == "__main__":
    run(main, BenchConfig)
