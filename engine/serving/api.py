"""The paths of the server: OpenAI's, its state, and the page.

    /  /health  /metrics  /v1/models  /v1/chat/completions  /v1/completions

A request that was accepted is watched until it is answered: a client that leaves gives its place back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from engine.model_directory import ModelDirectory
from engine.serving import openapi
from engine.serving.answers import Answers, sent
from engine.serving.auth import KnownHosts, TokenRequired
from engine.serving.errors import ApiError
from engine.serving.limits import BoundedBodies, Limits
from engine.serving.metrics import Measured
from engine.serving.page import load_page
from engine.serving.prompting import Prompter
from engine.serving.schema import ChatRequest, CompletionRequest, Sampled
from engine.serving.service import GenerationService, QueueFull, ServiceClosed
from engine.serving.subscription import Subscription
from model.errors import InputError
from model.generate import Event
from model.generate import Request as GeneratorRequest


def create_app(
    service: GenerationService,
    directory: ModelDirectory,
    name: str,
    limits: Limits,
    token: str | None = None,
    hosts: Iterable[str] = (),
) -> FastAPI:
    """The application.

    Args:
        directory: of the model that the service's generator runs.
        name: what clients call the model.
        token: what they have to show; None lets everybody in who calls the server by a name of this machine.
        hosts: further such names; with a token, and none given, any name will do.
    """
    tokenizer, prompter = directory.tokenizer, Prompter(directory, limits)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # The generated pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="ChiMed Engine", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BoundedBodies, limits=limits)
    if token is not None:
        app.add_middleware(TokenRequired, token=token)
    if token is None or hosts:  # a page from elsewhere knows no token, whatever its name resolves to
        app.add_middleware(KnownHosts, names=hosts)
    app.add_middleware(Measured, metrics=service.metrics)
    _answer_errors(app)
    openapi.declare(app, name)

    def subscribe(asked: Sampled, requests: list[GeneratorRequest], **how: Any) -> Subscription:
        if asked.model != name:
            raise ApiError(404, f"There is no model {asked.model!r} here. Ask for {name!r}.", "model_not_found")
        try:
            subscription = Subscription(service, requests, **how)
        except InputError as error:
            is_long = any(len(request.prompt) >= service.context for request in requests)
            raise ApiError(400, str(error), "context_length_exceeded" if is_long else None) from None
        except QueueFull:
            message = f"{service.capacity} answers are on their way already. Try again."
            raise ApiError(429, message, "queue_full", {"Retry-After": "1"}) from None
        except ServiceClosed:
            raise ApiError(503, "The server is shutting down. Try another, or later.", "closing") from None
        service.metrics.count("prompt_tokens", sum(len(request.prompt) for request in requests))
        return subscription

    page, page_headers = load_page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/health", responses=openapi.health())
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if service.is_open else "closed"}, 200 if service.is_open else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=openapi.errors())
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(*service.load), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", response_model=openapi.ModelList, responses=openapi.errors())
    async def models() -> dict[str, Any]:
        facts = {"id": name, "object": "model", "created": created, "owned_by": "chimed-engine"}
        return {"object": "list", "data": [{**facts, "context_length": service.context}]}

    @app.post("/v1/chat/completions", responses=openapi.answers(openapi.ChatAnswer))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        requests = [await prompter.chat(asked)]
        answers = Answers("chat.completion", name, requests)
        subscription = subscribe(asked, requests)
        if asked.stream:
            return _Stream(subscription, answers, asked.wants_usage)
        await _collect(subscription, answers, request)
        return JSONResponse(answers.chat())

    @app.post("/v1/completions", responses=openapi.answers(openapi.TextAnswer))
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        if asked.stream and (asked.echo or asked.logprobs is not None):
            raise ApiError(400, "echo and logprobs cannot be streamed. Leave out stream.")
        if asked.max_tokens == 0 and not asked.echo:
            raise ApiError(400, "max_tokens 0 writes nothing. Ask for at least 1, or for the prompt with echo.")
        requests = await prompter.completion(asked)
        answers = Answers("text_completion", name, requests)
        # Without log-probabilities an echo alone still passes through the service, as the one place with limits.
        top = 0 if asked.max_tokens == 0 and asked.logprobs is None else asked.logprobs
        subscription = subscribe(asked, requests, top=top, writes=asked.max_tokens != 0)
        if asked.stream:
            return _Stream(subscription, answers, asked.wants_usage)
        await _collect(subscription, answers, request)
        echoed = None
        if asked.echo:
            echoed = [
                one if isinstance(one, str) else tokenizer.decode(one, skip_special=True) for one in asked.prompts
            ]
        return JSONResponse(answers.completion(tokenizer, echoed, asked.logprobs is not None))

    return app


async def _collect(subscription: Subscription, answers: Answers, request: Request) -> None:
    """Wait for all of a job, as long as its client does. Raises ApiError: it has left."""

    async def read() -> None:
        async for event in subscription:
            answers.add(event)

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.ensure_future(read()), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(499, "The client has left.")
        reading.result()
    finally:
        subscription.close()
        for task in reading, leaving:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class _Stream(StreamingResponse):
    """Server-sent events. However they end, the job is given up: a client's leaving may cancel what sends them before
    the first was asked for."""

    def __init__(self, subscription: Subscription, answers: Answers, with_usage: bool) -> None:
        # Proxies that gather what they pass on would hold the tokens back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        chunks = _chunks(subscription, answers, with_usage)
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._subscription.close()


async def _chunks(subscription: Subscription, answers: Answers, with_usage: bool) -> AsyncIterator[bytes]:
    for chunk in answers.begin_stream():
        yield chunk
    try:
        async for event in subscription:
            assert isinstance(event, Event)
            for chunk in answers.stream(event):
                yield chunk
    except Exception:
        # Raised, it would break the connection off, and a browser drops what it has not read of a broken stream.
        logging.getLogger("uvicorn.error").exception("The generator failed.")
        yield sent(ApiError(500, "The server failed.", "failed").body)
        return
    for chunk in answers.end_stream(with_usage):
        yield chunk


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(error.status_code, f"{error.detail}.").body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if tuple(first["loc"]) == ("body",) and isinstance(error.body, bytes):  # FastAPI reads no body of other types
            kind = request.headers.get("content-type", "")
            came = f"as {kind}" if kind else "without a type"
            message = f"The body came {came}. Send it with the header Content-Type: application/json."
            return JSONResponse(ApiError(400, message).body, 400)
        place = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, (str, int)))
        return JSONResponse(ApiError(400, f"{place or 'body'}: {first['msg']}. Correct it.").body, 400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "The server failed.", "failed").body, 500)
