"""The endpoints of OpenAI's API: chat completions, completions and models."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse

from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine, Prompt
from moonwhale.infer.request import Request
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.serve import errors
from moonwhale.serve.limits import Limits
from moonwhale.serve.metrics import Metrics, Stopwatch
from moonwhale.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from moonwhale.serve.responses import ChatFormat, CompletionFormat, ResponseFormat, event
from moonwhale.serve.worker import GenerationJob, TokenChunk, Worker, WorkerError

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
DISCONNECT_POLL = 0.25  # seconds


class OpenAIEndpoints:
    """One model behind OpenAI's API.

    Raises:
        APIError: see `moonwhale.serve.errors`.
        UserError: a value is impossible, or a prompt is too long.
    """

    def __init__(self, engine: Engine, model_name: str, worker: Worker, limits: Limits, metrics: Metrics):
        self.engine, self.model_name, self.worker = engine, model_name, worker
        self.limits, self.metrics = limits, metrics
        self.model_card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "moonwhale",
            "context": engine.context,
        }

    def add_routes(self, app: FastAPI) -> None:
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.complete)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model}")(self.model)

    async def chat(self, body: ChatRequest, http: HTTPRequest):
        """Answers a conversation."""
        messages = [message.model_dump(include={"role", "content"}) for message in body.messages]
        job = self._submit(body, [messages], default_max_tokens=self.engine.context)
        return await self._respond(body, job, ChatFormat(self.engine, self.model_name), http)

    async def complete(self, body: CompletionRequest, http: HTTPRequest):
        """Continues one or more texts."""
        job = self._submit(body, body.prompts, default_max_tokens=COMPLETION_TOKENS)
        return await self._respond(body, job, CompletionFormat(self.engine, self.model_name, bool(body.echo)), http)

    async def models(self):
        """Lists the one model."""
        return {"object": "list", "data": [self.model_card]}

    async def model(self, model: str):
        """Describes the model."""
        self.check_model(model)
        return self.model_card

    def check_model(self, asked: str) -> None:
        """Raises a 404 for any other model's name."""
        if asked != self.model_name:
            raise errors.unknown_model(asked, self.model_name)

    def _submit(self, body: GenerationRequest, prompts: list[Prompt], default_max_tokens: int) -> GenerationJob:
        """Submits `body.num_choices` requests for each prompt to the worker."""
        self.check_model(body.model)
        if body.stream_options and not body.stream:
            raise UserError("`stream_options`: set stream to true with it")
        options = SamplingOptions(**body.sampling_options(default_max_tokens))
        requests: list[Request] = []
        for ids in map(self.engine.encode, prompts):
            for _ in range(body.num_choices):
                requests.append(self.engine.request(ids, options, len(requests), body.num_top_logprobs))
        if self.worker.num_waiting + len(requests) > self.limits.queue:
            raise errors.full_queue(self.limits.queue)
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        return self.worker.submit(requests)

    async def _respond(self, body: GenerationRequest, job: GenerationJob, format: ResponseFormat, http: HTTPRequest):
        """Returns a stream of events if the body asks for one, else the whole response once it is complete."""
        if body.stream:
            events = self._events(body, job, format)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        await self._wait_for_end(job, http)
        return format.whole(job.requests, body.num_choices)

    async def _events(self, body: GenerationRequest, job: GenerationJob, format: ResponseFormat) -> AsyncIterator[str]:
        """Yields a server-sent event for each chunk. An error is an event as well: the status has been sent."""
        num_sent = [0] * len(job.requests)
        try:
            async with aclosing(self._chunks(job)) as chunks:
                async for chunk in chunks:
                    yield event(format.chunk(job.requests[chunk.index], chunk, num_sent[chunk.index]))
                    num_sent[chunk.index] = chunk.num_tokens
            if body.wants_usage:
                yield event(format.usage_chunk(job.requests, body.num_choices))
        except errors.APIError as error:
            yield event(error.body)
        except UserError as error:
            yield event(errors.bad_request(error).body)
        yield "data: [DONE]\n\n"

    async def _wait_for_end(self, job: GenerationJob, http: HTTPRequest) -> None:
        """Waits until a job has ended. Raises a 499 if the client disconnects first."""

        async def exhaust_chunks() -> None:
            async with aclosing(self._chunks(job)) as chunks:
                async for _ in chunks:
                    pass

        task = asyncio.ensure_future(exhaust_chunks())
        try:
            while not (await asyncio.wait([task], timeout=DISCONNECT_POLL))[0]:
                if await http.is_disconnected():
                    raise errors.client_gone()
            task.result()
        finally:
            task.cancel()

    async def _chunks(self, job: GenerationJob) -> AsyncIterator[TokenChunk]:
        """Yields a job's chunks within the time limit, and measures them. Closing the iterator frees its slots."""
        watch = Stopwatch(self.metrics)
        try:
            async with aclosing(job.chunks(self.limits.answer)) as chunks:
                async for chunk in chunks:
                    watch.token()
                    yield chunk
            watch.end()
        except TimeoutError:
            raise errors.slow_answer(self.limits.answer) from None
        except WorkerError as error:
            raise errors.model_stopped(error) from None
        finally:
            self.worker.cancel(job)
            for request in job.requests:
                self.metrics.count_tokens(request)
