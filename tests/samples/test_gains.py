"""What is said of two models: differences, what length explains of them, how far apart they are."""

from pathlib import Path

import numpy as np
import pytest

from model.chat import ChatTemplate
from model.generate import Generator
from model.sampling import SamplingOptions
from model.tokenizer import Tokenizer
from samples.dialogues import Dialogue
from samples.gains import Trial, bootstrap, divergence, gain_at_equal_length, gain_lines, main, report_gains, try_out
from samples.questions import questions_of
from samples.true_reward import bundled_judge
from tests.samples.conftest import Splits
from tests.small_base import write_small_base

QUESTIONS, ANSWERS = 400, 4


def trial(rewards: np.ndarray, lengths: np.ndarray) -> Trial:
    """A trial of these totals, all four parts of each equal to it."""
    return Trial([], np.repeat(rewards[..., None], 5, axis=-1), lengths)


def test_a_reward_that_length_alone_explains_is_no_gain_at_equal_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 30, size=(QUESTIONS, ANSWERS)).astype(float)
    estimate = gain_at_equal_length(trial(0.02 * lengths, lengths), trial(0.02 * (lengths + 6), lengths + 6))
    assert estimate.value == pytest.approx(0, abs=1e-12)


def test_a_gain_that_has_nothing_to_do_with_length_is_left_whole() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.integers(5, 30, size=(2, QUESTIONS, ANSWERS)).astype(float)
    estimate = gain_at_equal_length(trial(0.02 * before, before), trial(0.02 * after + 0.3, after))
    assert estimate.value == pytest.approx(0.3) and estimate.low == pytest.approx(0.3)


def test_intervals_are_those_of_a_mean_over_questions() -> None:
    values = np.random.default_rng(2).normal(size=QUESTIONS)
    estimate = bootstrap(lambda drawn: float(values[drawn].mean()), QUESTIONS)
    half = 1.96 * values.std() / QUESTIONS**0.5
    assert estimate.value == values.mean()
    # 2,000 draws place an end with a standard error of sqrt(0.025 · 0.975 / 2000) / φ(1.96) = 0.06 deviations.
    tolerance = 4 * 0.06 * values.std() / QUESTIONS**0.5
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=tolerance)


def test_the_lines_name_the_total_and_its_parts_with_both_means() -> None:
    lengths = np.ones((QUESTIONS, ANSWERS))
    lines = gain_lines(trial(0.25 * lengths, 10 * lengths), trial(0.75 * lengths, 12 * lengths))
    assert lines[0].split() == ["true", "reward", "0.250", "→", "0.750", "+0.500", "(+0.500", "to", "+0.500)"]
    assert [line.split()[0] for line in lines] == ["true", "at", "correct", "complete", "cautious", "safe", "tokens"]
    assert lines[-1].split()[-3:] == ["10.0", "→", "12.0"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_small_base(tmp_path_factory.mktemp("model"), context=256)
    tokenizer = Tokenizer.load(base)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(base)
    return base


def test_a_model_has_gained_nothing_over_itself_and_is_no_distance_away(
    directory: Path, dialogues: Splits[Dialogue]
) -> None:
    questions = questions_of(dialogues.held_out)[:6]
    generator = Generator.from_directory(directory)
    template = ChatTemplate.of(generator.tokenizer)
    options = SamplingOptions(max_new_tokens=16, stop_ids=template.end_ids(generator.tokenizer))
    old, new = (try_out(generator, template, questions, options, bundled_judge()) for _ in range(2))
    assert [one.ids for own in old.answers for one in own] == [one.ids for own in new.answers for one in own]
    assert len({tuple(one.ids) for one in old.answers[0]}) == ANSWERS  # samples of a question differ
    # In fp32 the sampler's log-probabilities are within 1e-5 of a forward pass over the finished text, a token.
    most = 1e-5 * new.lengths.max()
    assert abs(divergence(generator, template, questions, new).value) < most


def test_the_report_puts_both_models_to_every_held_out_question(directory: Path, dialogues: Splits[Dialogue]) -> None:
    said = report_gains(directory, directory, longest=4)
    assert said.startswith(f"{len(questions_of(dialogues.held_out))} held-out questions, 4 sampled answers each")
    assert "+0.000 (+0.000 to +0.000)" in said and "Right department: 0 of" in said
    assert said.count("  before ") == said.count("  after  ") == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["one"], "usage: "), (["--model", "one"], "usage: "), (["missing", "missing"], "missing")],
)
def test_the_command_says_how_to_call_it(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1


def test_the_command_prints_the_report(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("samples.gains.report_gains", lambda *directories: f"from {directories[0]} to {directories[1]}")
    assert main([str(directory), str(directory)]) == 0
    assert capsys.readouterr().out == f"from {directory} to {directory}\n"
