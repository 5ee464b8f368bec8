"""Attitude scales asked of respondents of which theory says what they score."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.attitude_items import Scale, read_scale
from evals.attitudes import KEYS, AttitudeTask, build
from evals.suite import BuildContext, parse_spec
from evals.task import Choose, Chosen, Metric, Result
from model.errors import InputError
from tests.evals.scales import TEA, task, write
from tests.evals.stubs import Stub, always, ask, guessing, knowing

CAMI_SUBSCALES = ("authoritarianism", "benevolence", "social_restrictiveness", "community_mental_health_ideology")


def metric(found: Result | tuple[Metric, ...], name: str) -> Metric:
    metrics = found.metrics if isinstance(found, Result) else found
    return next(one for one in metrics if one.name == name)


def holding(asked: AttitudeTask, level: Callable[[bool], int]) -> Stub:
    """Goes by the meaning alone: the degree of agreement with an item is a function of its polarity."""
    degree = {item.id: level(item.agreeing_is_stigma) for item in asked.scale.items}
    key: dict[str, int | str] = {}
    for request in asked.requests():
        item, order = request.id.rsplit("/", 1)
        place = order.index(str(degree[item]))
        key[request.id] = place if isinstance(request, Choose) else "ABCDEF"[place]
    return knowing(key)


def attitude_task(tmp_path: Path, name: str, options: str = "", context: BuildContext | None = None) -> AttitudeTask:
    found = task(tmp_path, name, options, context)
    assert isinstance(found, AttitudeTask)
    return found


@pytest.mark.parametrize("name", ["cami", "mica4", "attitudes"])
@pytest.mark.parametrize("orders", ["all", "rotations", "30"])
@pytest.mark.parametrize("letter", [0, 2])
def test_the_same_letter_scores_the_exact_midpoint_and_says_nothing(
    tmp_path: Path, name: str, orders: str, letter: int
) -> None:
    orders = "3" if (name, orders) == ("attitudes", "30") else orders
    result = ask(attitude_task(tmp_path, name, f"orders={orders}"), always(letter))
    midpoint = {"cami": 120, "mica4": 56, "attitudes": 10}[name]
    assert metric(result, "score").value == pytest.approx(midpoint)
    assert metric(result, "argmax_score").value == pytest.approx(midpoint)
    assert metric(result, "stigma").value == pytest.approx(0.5)
    assert metric(result, "by_meaning").value == pytest.approx(0, abs=1e-12)
    assert metric(result, "by_order").value > 0.3
    for own in result.groups.values():
        assert metric(own, "stigma").value == pytest.approx(0.5)
    shares = [metric(result, f"letter_{other}").value for other in "ABC"]
    assert shares.index(max(shares)) == letter
    baseline = {name: value for name, of, value in result.baselines if of == "score"}
    assert metric(result, "score").value == pytest.approx(next(iter(baseline.values())))


@pytest.mark.parametrize("most", [True, False])
def test_the_most_and_the_least_stigma_are_the_ends_of_every_subscale_of_cami(tmp_path: Path, most: bool) -> None:
    asked = attitude_task(tmp_path, "cami", "orders=rotations,mode=gen")
    result = ask(asked, holding(asked, lambda is_stigma: 4 if is_stigma == most else 0))
    assert metric(result, "score").value == (200 if most else 40)
    assert metric(result, "stigma").value == most
    assert [*result.groups] == [*CAMI_SUBSCALES]
    for own in result.groups.values():
        assert metric(own, "subscale_score").value == (50 if most else 10)
    assert metric(result, "by_meaning").value == 1
    assert metric(result, "letter_entropy").value == pytest.approx(1)


@pytest.mark.parametrize(("most", "score"), [(True, 96), (False, 16)])
def test_the_most_and_the_least_stigma_are_the_ends_of_mica_4(tmp_path: Path, most: bool, score: int) -> None:
    asked = attitude_task(tmp_path, "mica4", "orders=all")
    result = ask(asked, holding(asked, lambda is_stigma: 5 if is_stigma == most else 0))
    assert metric(result, "argmax_score").value == score
    # The stub holds the option ten times as likely as each of the five others.
    share = {True: 10 / 15, False: 1 / 15}
    expected = sum(points * share[points == (6 if most else 1)] for points in range(1, 7))
    assert metric(result, "score").value == pytest.approx(16 * expected)
    assert result.groups == {}


@pytest.mark.parametrize("level", range(6))
def test_the_same_degree_of_agreement_scores_what_the_baseline_says(tmp_path: Path, level: int) -> None:
    asked = attitude_task(tmp_path, "mica4", "orders=rotations,mode=gen")
    result = ask(asked, holding(asked, lambda is_stigma: level))
    assert metric(result, "score").value == 10 * (level + 1) + 6 * (6 - level)
    assert ("always " + asked.scale.options[level], "score", metric(result, "score").value) in result.baselines


def test_on_a_balanced_subscale_any_constant_answer_is_the_midpoint(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "cami", "orders=rotations,mode=gen")
    for level in range(5):
        result = ask(asked, holding(asked, lambda is_stigma: level))  # noqa: B023
        assert [metric(own, "subscale_score").value for own in result.groups.values()] == [30] * 4
    named = [(f"always the same answer ({subscale})", "subscale_score", 30.0) for subscale in CAMI_SUBSCALES]
    assert result.baselines == (("always the same answer", "score", 120.0), *named)


def test_guesses_score_the_midpoint_on_average(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "cami", "orders=rotations")
    scores = [metric(ask(asked, guessing(seed)), "score").value for seed in range(10)]
    # A guess puts 10/14 on one degree and 1/14 on each other: its points have the variance (9/14)^2 * 2.
    deviation = math.sqrt(40 / 5 * (9 / 14) ** 2 * 2)
    assert sum(scores) / 10 == pytest.approx(120, abs=4 * deviation / math.sqrt(10))


def test_points_are_weighed_by_probability(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "attitudes", "orders=all")
    weight = {"0": 1.0, "1": 2.0, "2": 5.0}  # of degrees of agreement
    result = ask(asked, Stub(lambda request: [weight[level] for level in request.id[-3:]], lambda request: ""))
    agreement = (1 * 1 + 2 * 2 + 3 * 5) / 8
    # Of five statements three count agreement, two the reverse.
    assert metric(result, "score").value == pytest.approx(3 * agreement + 2 * (4 - agreement))
    assert metric(result.groups["work"], "subscale_score").value == pytest.approx(2 * agreement + (4 - agreement))
    assert metric(result, "argmax_score").value == pytest.approx(3 * 3 + 2 * 1)
    assert metric(result, "by_order").value == pytest.approx(0, abs=1e-12)
    assert metric(result, "letter_mass").value == pytest.approx(1)
    assert {item.answer for item in result.items} == {"赞成"}


def test_the_share_of_probability_on_letters_is_reported_and_a_small_one_noted(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "attitudes")
    requests = asked.requests()
    responses, lowered = {}, {}
    for request, response in zip(requests, always().respond(requests), strict=True):
        assert isinstance(response, Chosen)
        responses[request.id] = response
        quarter = tuple(logprob + math.log(0.25) for logprob in response.logprobs)
        lowered[request.id] = response._replace(logprobs=quarter)
    result = asked.result(lowered)
    assert metric(result, "letter_mass").value == pytest.approx(0.25)
    assert metric(result, "score").value == pytest.approx(metric(asked.result(responses), "score").value)
    assert any("hold 25.0% of the probability" in note for note in result.notes)


def test_free_answers_that_name_no_option_are_counted_and_left_out(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "attitudes", "mode=gen")
    says = {"t1": "赞成", "t2": "我没有看法。", "t3": "A", "t4": "不赞成", "t5": "A或B"}
    result = ask(asked, Stub(lambda request: [], lambda request: says[request.id.split("/")[0]]))
    # t1 has 3 points, t3 (any letter, over all rotations) 2, t4 3; the two others are extrapolated from these.
    assert metric(result, "score").value == pytest.approx(5 * (3 + 2 + 3) / 3)
    assert metric(result, "unparsed") == Metric("unparsed", 0.4, *bounds(metric(result, "unparsed")), 5, "%", "lower")
    assert result.counts["unparsed"] == 2 * 3
    assert [item.answer for item in result.items][:2] == ["赞成", ""]


def bounds(found: Metric) -> tuple[float | None, float | None]:
    return found.low, found.high


def test_where_no_free_answer_names_an_option_there_is_no_score(tmp_path: Path) -> None:
    result = ask(attitude_task(tmp_path, "cami", "mode=gen"), always(text="作为人工智能，我没有看法。"))
    assert math.isnan(metric(result, "score").value) and metric(result, "unparsed").value == 1
    assert result.counts["unparsed"] == 40 * 5


def test_a_prompt_shows_statement_and_options_and_only_their_order_changes(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "attitudes", "system=请直接回答。")
    first, second = asked.requests()[:2]
    assert isinstance(first, Choose) and not isinstance(first.prompt, str)
    assert [message.role for message in first.prompt] == ["system", "user"]
    assert first.id == "t1/012" and second.id == "t1/021"
    assert first.prompt[1].content.endswith("“下午喝茶会打扰工作。”\n\nA. 不赞成\nB. 说不好\nC. 赞成")
    assert second.prompt[1].content.endswith("A. 不赞成\nB. 赞成\nC. 说不好")  # type: ignore[union-attr]
    assert first.options == ("A", "B", "C")


def test_a_plain_prompt_ends_where_the_answer_begins(tmp_path: Path) -> None:
    for mode in ("probability", "gen"):
        asked = attitude_task(tmp_path, "attitudes", f"mode={mode},system=请回答。", BuildContext("plain"))
        prompt = asked.requests()[0].prompt  # type: ignore[union-attr]
        assert isinstance(prompt, str)
        assert prompt.startswith("请回答。\n\n") and prompt.endswith("C. 赞成\n\n答案：")


def test_some_items_stand_for_all(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "cami", "orders=rotations,mode=gen", BuildContext("chat", limit=8))
    result = ask(asked, holding(asked, lambda is_stigma: 4 if is_stigma else 0))
    assert len(result.items) == 8 and metric(result, "score").value == 200
    assert "Asked were 8 of 40 items; scores are extrapolated to all." in result.notes


def test_an_interval_does_not_mistake_the_balance_of_a_scale_for_chance(tmp_path: Path) -> None:
    asked = attitude_task(tmp_path, "cami", "orders=rotations,mode=gen")
    agreeing = metric(ask(asked, holding(asked, lambda is_stigma: 4)), "score")
    assert (agreeing.low, agreeing.value, agreeing.high) == (120, 120, 120)
    guessed = metric(ask(asked, guessing(sayings="ABCDE")), "score")
    assert guessed.low is not None and guessed.high is not None
    assert 5 < guessed.high - guessed.low < 40


def test_what_decides_the_numbers_is_in_the_settings(tmp_path: Path) -> None:
    found = [
        dict(attitude_task(tmp_path, "attitudes", options).settings)
        for options in ("", "orders=rotations", "wording=doctor", "system=好。", "mode=gen")
    ]
    assert len({one["signature"] for one in found}) == 5
    assert found[0]["items"] == read_scale(str(tmp_path / "attitudes.json")).fingerprint
    asked = attitude_task(tmp_path, "attitudes")
    write(tmp_path / "attitudes.json", {**TEA, "scale": "more tea"})
    assert attitude_task_of(tmp_path).settings["items"] != asked.settings["items"]


def attitude_task_of(tmp_path: Path) -> AttitudeTask:
    """The task of the file that lies there already."""
    found = build(parse_spec(f"attitudes={tmp_path / 'attitudes.json'}"), BuildContext("chat"))
    assert isinstance(found, AttitudeTask)
    return found


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("cami", "mode=paper,orders=all", "--tasks cami: orders is none of its options"),
        ("cami", "max_new_tokens=5", "--tasks cami: max_new_tokens is none of its options"),
        ("attitudes", "mode=paper", "mode=paper is not one of probability, gen"),
        ("cami", "wording=mine", "wording=mine is not one of own, doctor, survey"),
    ],
)
def test_options_that_would_mean_nothing_are_refused(tmp_path: Path, name: str, options: str, sentence: str) -> None:
    path = write(tmp_path / "items.json", TEA if name == "attitudes" else [f"{n}" for n in range(40)])
    spec = parse_spec(f"{name}={path},{options}")
    with pytest.raises(InputError, match=sentence):
        build(spec, BuildContext("chat"))
        spec.check_all_taken()


@pytest.mark.parametrize(("name", "orders", "requests"), [("cami", 120, 4800), ("mica4", 720, 11520)])
def test_the_real_items_are_asked_in_all_orders(real_data: Path, name: str, orders: int, requests: int) -> None:
    asked = build(parse_spec(f"{name}={real_data / 'bias' / f'{name}.json'}"), BuildContext("chat"))
    assert isinstance(asked, AttitudeTask) and len(asked.orders) == orders
    assert len(asked.requests()) == requests
    assert isinstance(asked.scale, Scale) and len(asked.scale.items) == len(KEYS[name].subscales)
