"""The real items, asked of a model directory with random weights in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.model_directory import ModelDirectory
from evals.attitudes import build
from evals.respondent import ModelRespondent
from evals.suite import BuildContext, parse_spec
from tests.tools.small_chat import write_small_chat_model

ITEMS = {"cami": (40, (40, 200)), "mica4": (16, (16, 96))}


@pytest.fixture(scope="module")
def respondent(tmp_path_factory: pytest.TempPathFactory) -> ModelRespondent:
    directory = write_small_chat_model(tmp_path_factory.mktemp("model"), 1024)
    return ModelRespondent(ModelDirectory.open(str(directory)), device="cpu")


@pytest.mark.parametrize("prompting", ["chat", "plain"])
@pytest.mark.parametrize("mode", ["probability,orders=rotations", "gen,max_new_tokens=4", "paper"])
@pytest.mark.parametrize("name", ["cami", "mica4"])
def test_every_item_is_asked_and_scored(
    real_data: Path, respondent: ModelRespondent, name: str, mode: str, prompting: str
) -> None:
    count, (fewest, most) = ITEMS[name]
    context = BuildContext(prompting)  # type: ignore[arg-type]
    task = build(parse_spec(f"{name}={real_data / 'bias' / f'{name}.json'},mode={mode}"), context)
    requests = task.requests()
    responses = respondent.respond(requests)
    assert not any(response.cut or response.dropped for response in responses)  # type: ignore[union-attr]
    result = task.result(dict(zip([request.id for request in requests], responses, strict=True)))
    assert len(result.items) == count
    found = {metric.name: metric.value for metric in result.metrics}
    if mode.startswith("gen"):
        # Four tokens at random name no option but by chance.
        assert found["unparsed"] > 0.5
        return
    assert fewest <= result.metrics[0].value <= most
    assert 0 < found["letter_mass"] < 1
    if mode.startswith("probability"):
        assert found["by_meaning"] + found["by_order"] + found["undecided"] == pytest.approx(1)
        assert sum(found[f"letter_{letter}"] for letter in "ABCDEF"[: 5 if name == "cami" else 6]) == pytest.approx(1)
