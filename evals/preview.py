"""What an evaluation would ask, before it asks: settings, numbers of requests, and one whole prompt of each task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from engine.chatting import room
from evals.evaluation import all_settings
from evals.respondent import ModelRespondent
from evals.task import Answer, Answered, Choose, Chosen, Read, Request, Response, Scored, Task

_VERBS = {Choose: "choices", Answer: "answers", Read: "texts to read"}


def describe(respondent: ModelRespondent, tasks: Mapping[str, Task]) -> Iterator[str]:
    """Lines for a reader. No weights are read."""
    for label, task in tasks.items():
        requests = task.requests()
        counts = {verb: sum(isinstance(one, kind) for one in requests) for kind, verb in _VERBS.items()}
        asked = ", ".join(f"{count:,} {verb}" for verb, count in counts.items() if count)
        yield f"== {label}, asked of {respondent.name}: {asked}"
        for name, value in all_settings(task, respondent, requests).items():
            yield f"{name}: {value!r}" if isinstance(value, str) and "\n" in value else f"{name}: {value}"
        yield from _baselines(task, requests)
        yield f"-- the first request, {requests[0].id}, in ids and back:"
        yield from _request(respondent, requests[0])
        yield ""


def _baselines(task: Task, requests: Sequence[Request]) -> Iterator[str]:
    """What is known without a model: of responses that say nothing, a result still has them. Nothing is of rewards,
    whose results ask a reward model, and of perplexity; of generation it takes as long as scoring all answers."""
    if task.kind in ("reward", "perplexity", "generation"):
        return
    result = task.result({request.id: _nothing(request) for request in requests})
    for name, metric, value in result.baselines:
        is_share = any(one.unit == "%" for one in result.metrics if one.name == metric)
        yield f"{name}: {metric} {value:.2%}" if is_share else f"{name}: {metric} {value:.4g}"


def _nothing(request: Request) -> Response:
    if isinstance(request, Choose):
        count = len(request.options)
        return Chosen((-math.log(count),) * count, (1,) * count, (False,) * count)
    return Answered("", "stop", 1) if isinstance(request, Answer) else Scored(-1.0, 1)


def _request(respondent: ModelRespondent, request: Request) -> Iterator[str]:
    encoder, decode = respondent.encoder, respondent.directory.tokenizer.decode
    if isinstance(request, Choose):
        prompt, options = encoder.pair(request.prompt, request.options)
        yield decode(prompt.ids)
        for option, ids in zip(request.options, options, strict=True):
            yield f"-- option {option!r}: ids {', '.join(map(str, ids))}"
    elif isinstance(request, Answer):
        following = room(respondent.context, request.sampling.max_new_tokens)
        yield decode(encoder.prompt(request.prompt, following, least=1).ids)
        yield f"-- at most {request.sampling.max_new_tokens} tokens"
    else:
        before, ids = encoder.windows(request.text)[0]
        yield decode([*before, *ids])
