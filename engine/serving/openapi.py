"""What /openapi.json says of answers: their shapes, and which errors each path may give."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

_ERRORS = {
    400: "Malformed, out of range, too long, or an option that is not served",
    401: "The token is missing or another",
    404: "No such model",
    408: "The request came too slowly",
    413: "The request is too large",
    421: "This server is not known by the name in Host",
    429: "The queue is full: come again after Retry-After seconds",
    500: "The server failed",
    503: "The server is shutting down",
}
_ANYWHERE = (401, 408, 413, 421, 500)


class Answered(BaseModel):
    """What is sent is what is declared, and no more."""

    model_config = ConfigDict(extra="forbid")


class ErrorFacts(Answered):
    message: str
    type: str
    param: None
    code: str | None


class ErrorAnswer(Answered):
    error: ErrorFacts


class Health(Answered):
    status: Literal["ok", "closed"]


class ModelFacts(Answered):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(Answered):
    object: Literal["list"]
    data: list[ModelFacts]


class Usage(Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Written(Answered):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answered):
    index: int
    message: Written
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(Answered):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Logprobs(Answered):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answered):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class TextAnswer(Answered):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice] = Field(min_length=1)
    usage: Usage


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a path: these, and those that every path may give."""
    return {
        status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in sorted({*_ANYWHERE, *statuses})
    }


def health() -> dict[int | str, dict[str, Any]]:
    """What /health gives: its own shape also where it says that the server is none."""
    told = {"model": Health}
    return {**errors(), 200: told, 503: {**told, "description": _ERRORS[503]}}


def answers(model: type[Answered]) -> dict[int | str, dict[str, Any]]:
    """What a path that generates answers: whole, or with `stream` in pieces; or an error."""
    return {200: {"model": model, "content": {"text/event-stream": {}}}, **errors(400, 404, 429, 503)}


def declare(app: FastAPI, model: str) -> None:
    """Have the schema name the one model, and say 400 for what is malformed, as the server does, not FastAPI's 422."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            shapes = schema["components"]["schemas"]
            for unused in "HTTPValidationError", "ValidationError":
                shapes.pop(unused, None)
            for asked in "ChatRequest", "CompletionRequest":
                shapes[asked]["properties"]["model"]["enum"] = [model]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
