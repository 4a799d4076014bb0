"""The endpoints of OpenAI's API: chat completions, completions and models."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moonwhale.errors import UserError
from moonwhale.infer.chat_session import forget_oldest
from moonwhale.infer.engine import Engine, Prompt
from moonwhale.infer.request import Request
from moonwhale.serve.body import Preparation, body_of
from moonwhale.serve.errors import CLIENT_GONE, APIError, api_error, require_model
from moonwhale.serve.limits import Limits
from moonwhale.serve.metrics import Metrics
from moonwhale.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from moonwhale.serve.responses import ChatFormat, CompletionFormat, ResponseFormat, event
from moonwhale.serve.worker import GenerationJob, TokenChunk, Worker, WorkerError

DROPPED_HEADER = "moonwhale-dropped-messages"


class EventStream(StreamingResponse):
    """A stream of events that calls `at_end` also if its client has gone before the first event is asked for."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()


class OpenAIEndpoints:
    """One model behind OpenAI's API.

    Raises:
        APIError: see `moonwhale.serve.errors`.
        UserError: a value is impossible, or a prompt is too long.
    """

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        worker: Worker,
        preparation: Preparation,
        limits: Limits,
        metrics: Metrics,
    ):
        self.engine, self.model_name, self.worker = engine, model_name, worker
        self.preparation, self.limits, self.metrics = preparation, limits, metrics
        self.model_card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "moonwhale",
            "context": engine.context,
        }

    def add_routes(self, app: FastAPI) -> None:
        app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))(self.chat)
        app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))(self.complete)
        app.api_route("/v1/models", methods=["GET", "HEAD"])(self.models)
        app.api_route("/v1/models/{model:path}", methods=["GET", "HEAD"])(self.model)  # a name may hold slashes

    async def chat(self, http: HTTPRequest):
        """Answers a conversation.

        With `truncation` "auto" its oldest turns are dropped if they outgrow the context. A header then counts the
        messages that were dropped.
        """
        body = await self.preparation.read(http, ChatRequest)
        messages = [message.for_template() for message in body.messages]
        max_new_tokens = body.max_new_tokens or self.engine.context
        n_dropped = 0

        def requests() -> list[Request]:
            nonlocal n_dropped
            if body.truncation != "auto":
                return self._requests(body, [messages], max_new_tokens)
            kept, ids = forget_oldest(self.engine, messages, max_new_tokens)
            n_dropped = len(messages) - len(kept)
            return self._requests(body, [ids], max_new_tokens)

        job = await self._submit(requests, http)
        response = await self._respond(job, ChatFormat(self.engine, self.model_name, body), http)
        if body.truncation == "auto":
            response.headers[DROPPED_HEADER] = str(n_dropped)
        return response

    async def complete(self, http: HTTPRequest):
        """Continues one or more texts."""
        body = await self.preparation.read(http, CompletionRequest)

        def requests() -> list[Request]:
            return self._requests(body, body.prompt, body.max_new_tokens, scores_prompt=bool(body.echo))

        job = await self._submit(requests, http)
        return await self._respond(job, CompletionFormat(self.engine, self.model_name, body), http)

    async def models(self):
        """Lists the one model."""
        return {"object": "list", "data": [self.model_card]}

    async def model(self, model: str):
        """Describes the model."""
        if not model:
            return await self.models()
        require_model(model, self.model_name)
        return self.model_card

    def _requests(
        self, body: GenerationRequest, prompts: list[Prompt], max_new_tokens: int, scores_prompt: bool = False
    ) -> list[Request]:
        """Returns `body.num_choices` requests for each prompt."""
        require_model(body.model, self.model_name)
        if body.stream_options and not body.stream:
            raise UserError("`stream_options`: set stream to true with it")
        self.limits.check_queue(self.worker.num_waiting, len(prompts), body.num_choices)
        options = body.sampling_options(max(max_new_tokens, 1))
        requests: list[Request] = []
        for ids in map(self.engine.encode, prompts):
            for _ in range(body.num_choices):
                request = self.engine.request(ids, options, len(requests), body.num_top_logprobs)
                request.limit = min(request.limit, max_new_tokens)
                request.scores_prompt = scores_prompt and request.top_logprobs is not None
                self.engine.scheduler.check_memory(request)  # a stream could no longer answer with a 400
                requests.append(request)
        return requests

    async def _submit(self, make_requests: Callable[[], list[Request]], http: HTTPRequest) -> GenerationJob:
        """Submits what `make_requests` returns, which takes time, to the worker, unless the client has gone before."""
        await _require_client(http)
        requests = await self.preparation.run(make_requests)
        await _require_client(http)
        self.limits.check_queue(self.worker.num_waiting, len(requests), 1)  # others may have come meanwhile
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        return self.worker.submit(requests)

    async def _respond(self, job: GenerationJob, format: ResponseFormat, http: HTTPRequest) -> Response:
        """Returns a stream of events if the body asks for one, else the whole response once it is complete."""
        if format.body.stream:
            return EventStream(self._events(job, format), lambda: self.worker.cancel(job))
        await self._wait_for_end(job, http)
        content = await self.preparation.run(lambda: json.dumps(format.whole(job.requests)))
        return Response(content, media_type="application/json")

    async def _events(self, job: GenerationJob, format: ResponseFormat) -> AsyncIterator[str]:
        """Yields the server-sent events of each chunk. An error is an event as well: the status has been sent."""
        options = format.body.stream_options
        echoes = getattr(format.body, "echo", False)  # a chunk may then be as long as the prompt
        try:
            async with aclosing(self._chunks(job)) as chunks:
                async for chunk in chunks:
                    bodies = await self.preparation.run(format.chunks, chunk) if echoes else format.chunks(chunk)
                    yield "".join(map(event, bodies))
            if options and options.include_usage:
                yield event(format.usage_chunk(job.requests))
        except (APIError, UserError) as error:
            yield event(api_error(error).body)
        yield "data: [DONE]\n\n"

    async def _wait_for_end(self, job: GenerationJob, http: HTTPRequest) -> None:
        """Waits until a job has ended. Raises a 499 if the client disconnects first."""

        async def exhaust_chunks() -> None:
            async for _ in self._chunks(job):
                pass

        async def wait_for_disconnect() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        answer, gone = asyncio.ensure_future(exhaust_chunks()), asyncio.ensure_future(wait_for_disconnect())
        try:
            await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise APIError(*CLIENT_GONE)
            answer.result()
        finally:
            answer.cancel()
            gone.cancel()

    async def _chunks(self, job: GenerationJob) -> AsyncIterator[TokenChunk]:
        """Yields a job's chunks within the time limit, and measures them. Closing the iterator frees its slots."""
        start, is_first = time.perf_counter(), True
        try:
            async with aclosing(job.chunks(self.limits.answer)) as chunks:
                async for chunk in chunks:
                    if is_first:
                        self.metrics.first_token.observe(time.perf_counter() - start)
                        is_first = False
                    yield chunk
            self.metrics.answer.observe(time.perf_counter() - start)
        except TimeoutError:
            raise APIError(408, f"the answer took more than {self.limits.answer:g} seconds") from None
        except WorkerError as error:
            raise APIError(503, f"the model had to stop: {error}") from None
        finally:
            self.worker.cancel(job)
            for request in job.requests:
                self.metrics.count_tokens(request)


async def _require_client(http: HTTPRequest) -> None:
    """Raises a 499 if the client has disconnected."""
    if await http.is_disconnected():
        raise APIError(*CLIENT_GONE)
