"""How the server answers: a request's jobs on the worker, and what they gain as one body or as a stream of events."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse

from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.infer.scheduler import Request
from moonwhale.serve.middleware import APIError, Limits, Metrics, Stopwatch
from moonwhale.serve.requests import ChatRequest, CompletionRequest
from moonwhale.serve.responses import Logprobs, event, usage
from moonwhale.serve.worker import Failed, Gain, Job, Worker

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
# What a choice says besides index and finish_reason: of a request, its text, and its tokens from the first to the last.
Part = Callable[[Request, str, int, int], dict]


class Answering:
    """One model, called `name`, behind OpenAI's two ways to ask it.

    Raises:
        APIError: another model, too many prompts waiting, too long an answer, a client gone.
        UserError: an impossible value, or a prompt that is too long.
    """

    def __init__(self, engine: Engine, name: str, worker: Worker, limits: Limits, metrics: Metrics):
        self.engine, self.name, self.worker, self.limits, self.metrics = engine, name, worker, limits, metrics
        self.logprobs = Logprobs(engine.token_bytes)

    async def chat(self, body: ChatRequest, http: HTTPRequest):
        """An answer to a conversation: a dict, or a stream of chunks."""
        messages = [message.model_dump(include={"role", "content"}) for message in body.messages]
        job = self._submit(body, [messages], self.engine.context)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}

        def delta(request: Request, text: str, first: int, last: int) -> dict:
            opening = {} if first else {"role": "assistant"}
            return {"delta": opening | {"content": text}, "logprobs": self.logprobs.of_chat(request, first, last)}

        def message(request: Request, text: str, first: int, last: int) -> dict:
            said = {"role": "assistant", "content": text, "refusal": None}
            return {"message": said, "logprobs": self.logprobs.of_chat(request, first, last)}

        if body.stream:
            return self._stream(job, head | {"object": "chat.completion.chunk"}, delta, body)
        return await self._whole(job, http, head | {"object": "chat.completion"}, message, body)

    async def complete(self, body: CompletionRequest, http: HTTPRequest):
        """What follows a text, likewise."""
        job = self._submit(body, body.prompts, 16)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        head["object"] = "text_completion"

        def text_of(request: Request, text: str, first: int, last: int) -> dict:
            if body.echo and not first:
                text = self.engine.tokenizer.decode(request.prompt, skip_special_tokens=True) + text
            return {"text": text, "logprobs": self.logprobs.of_completion(request, first, last)}

        if body.stream:
            return self._stream(job, head, text_of, body)
        return await self._whole(job, http, head, text_of, body)

    def known(self, model: str) -> None:
        """Refuses any other model."""
        if model != self.name:
            message = f"there is no model {model!r} here: ask for {self.name!r}"
            raise APIError(404, message, param="model", code="model_not_found")

    def _submit(self, body: ChatRequest | CompletionRequest, prompts: list, default_tokens: int) -> Job:
        """The body's requests, n of each prompt, on their way."""
        self.known(body.model)
        if body.stream_options and not body.stream:
            raise APIError(400, "stream_options: set stream to true with it", param="stream_options")
        options = SamplingOptions(**body.sampling(default_tokens))
        requests: list[Request] = []
        for prompt in map(self.engine.encode, prompts):
            for _ in range(body.n or 1):
                seed = None if options.seed is None else options.seed + len(requests)
                requests.append(self.engine.request(prompt, options, seed, body.alternatives))
        if self.worker.waiting + len(requests) > self.limits.queue:
            raise APIError(429, f"{self.limits.queue} prompts wait already: try again soon", "rate_limit_error")
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        return self.worker.submit(requests)

    async def _gains(self, job: Job) -> AsyncIterator[Gain]:
        """What a job gains, timed and counted, within the time there is; leaving it frees the slots."""
        watch = Stopwatch(self.metrics)
        try:
            async with aclosing(job.gains(self.limits.answer)) as all_gains:
                async for gain in all_gains:
                    watch.token()
                    yield gain
            watch.end()
        except TimeoutError:
            raise APIError(408, f"the answer took more than {self.limits.answer:g} seconds", "timeout") from None
        except Failed as error:
            raise APIError(503, f"the model had to stop: {error}", "server_error") from None
        finally:
            self.worker.cancel(job)
            for request in job.requests:
                self.metrics.generated_tokens.inc(len(request.token_ids))
                for depth, (tested, held) in enumerate(zip(request.drafted, request.accepted, strict=True), start=1):
                    self.metrics.drafts_tested.labels(depth).inc(tested)
                    self.metrics.drafts_accepted.labels(depth).inc(held)

    async def _finished(self, job: Job, http: HTTPRequest) -> None:
        """Waits for a job's end, unless the client goes away."""

        async def to_the_end() -> None:
            async with aclosing(self._gains(job)) as all_gains:
                async for _ in all_gains:
                    pass

        task = asyncio.ensure_future(to_the_end())
        try:
            while not (await asyncio.wait([task], timeout=0.25))[0]:
                if await http.is_disconnected():
                    raise APIError(499, "the client went away")
            task.result()
        finally:
            task.cancel()

    def _stream(self, job: Job, head: dict, part: Part, body: ChatRequest | CompletionRequest) -> StreamingResponse:
        """Server-sent events: a chunk for each gain."""
        told = [0] * len(job.requests)

        async def events() -> AsyncIterator[str]:
            try:
                async with aclosing(self._gains(job)) as all_gains:
                    async for gain in all_gains:
                        request, first = job.requests[gain.index], told[gain.index]
                        told[gain.index] = gain.tokens
                        said = part(request, gain.text, first, gain.tokens)
                        choice = {"index": gain.index, **said, "finish_reason": FINISH.get(gain.finish_reason)}
                        yield event(head | {"choices": [choice]})
                if body.wants_usage:
                    yield event(head | {"choices": [], "usage": usage(job.requests, body.n or 1)})
            except APIError as error:
                yield event(error.body)
            except UserError as error:
                yield event(APIError(400, str(error)).body)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _whole(
        self, job: Job, http: HTTPRequest, head: dict, part: Part, body: ChatRequest | CompletionRequest
    ) -> dict:
        """The answer once all of it is there."""
        await self._finished(job, http)
        choices = [
            {
                "index": i,
                **part(request, request.text.text, 0, len(request.token_ids)),
                "finish_reason": FINISH[request.finish_reason],
            }
            for i, request in enumerate(job.requests)
        ]
        return head | {"choices": choices, "usage": usage(job.requests, body.n or 1)}
