"""`moonwhale serve`: OpenAI's API and a chat page over one engine, for one machine."""

import asyncio
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from starlette.exceptions import HTTPException

from moonwhale import __version__
from moonwhale.errors import UserError
from moonwhale.infer.answers import Logprobs, event, invalid, usage
from moonwhale.infer.checkpoint import open_checkpoint
from moonwhale.infer.engine import Engine
from moonwhale.infer.guard import APIError, Guard, Limits, Metrics, Stopwatch
from moonwhale.infer.protocol import ChatRequest, CompletionRequest, XrayRequest
from moonwhale.infer.sampling import SamplingOptions
from moonwhale.infer.scheduler import Request
from moonwhale.infer.worker import Failed, Gain, Job, Worker
from moonwhale.xray import xray as draw

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
NOTHING = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
PAGE_POLICY = f"{NOTHING}script-src 'self'; style-src 'self'; connect-src 'self'; frame-src 'self'"
XRAY_POLICY = f"{NOTHING}script-src 'unsafe-inline'; style-src 'unsafe-inline'"
KEPT_XRAYS = 16
# What a choice says besides index and finish_reason: of a request, its text, and its tokens from the first to the last.
Part = Callable[[Request, str, int, int], dict]


def create_app(
    engine: Engine,
    name: str,
    folder: Path,
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: set[str] | None = None,
) -> FastAPI:
    """The ASGI application: `name` is the model's, `folder` its checkpoint, `hosts` the only names it answers to (None:
    any).
    """
    limits, metrics, worker = limits or Limits(), Metrics(), Worker(engine.scheduler)
    created = int(time.time())
    for gauge, help, value in (
        ("running", "Sequences in the batch", lambda: worker.running),
        ("waiting", "Prompts that wait for a slot", lambda: worker.waiting),
        ("cache_bytes", "Bytes of the latent cache", lambda: engine.scheduler.cache.bytes),
    ):
        Gauge(f"moonwhale_{gauge}", help, registry=metrics.registry).set_function(value)

    @asynccontextmanager
    async def lifespan(_):
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="moonwhale", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.worker, logprobs = worker, Logprobs(engine.token_bytes)

    def known(model: str) -> None:
        if model != name:
            message = f"there is no model {model!r} here: ask for {name!r}"
            raise APIError(404, message, param="model", code="model_not_found")

    def submit(body: ChatRequest | CompletionRequest, prompts: list, default_tokens: int) -> Job:
        """The body's requests, n of each prompt, on their way."""
        known(body.model)
        if body.stream_options and not body.stream:
            raise APIError(400, "stream_options: set stream to true with it", param="stream_options")
        options = SamplingOptions(**body.sampling(default_tokens))
        requests: list[Request] = []
        for prompt in map(engine.encode, prompts):
            for _ in range(body.n or 1):
                seed = None if options.seed is None else options.seed + len(requests)
                requests.append(engine.request(prompt, options, seed, body.alternatives))
        if worker.waiting + len(requests) > limits.queue:
            raise APIError(429, f"{limits.queue} prompts wait already: try again soon", "rate_limit_error")
        metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        return worker.submit(requests)

    async def gains(job: Job) -> AsyncIterator[Gain]:
        """What a job gains, timed and counted, within the time there is; leaving it frees the slots."""
        watch = Stopwatch(metrics)
        try:
            async with aclosing(job.gains(limits.answer)) as all_gains:
                async for gain in all_gains:
                    watch.token()
                    yield gain
            watch.end()
        except TimeoutError:
            raise APIError(408, f"the answer took more than {limits.answer:g} seconds", "timeout") from None
        except Failed as error:
            raise APIError(503, f"the model had to stop: {error}", "server_error") from None
        finally:
            worker.cancel(job)
            for request in job.requests:
                metrics.generated_tokens.inc(len(request.token_ids))
                for depth, (tested, held) in enumerate(zip(request.drafted, request.accepted, strict=True), start=1):
                    metrics.drafts_tested.labels(depth).inc(tested)
                    metrics.drafts_accepted.labels(depth).inc(held)

    async def finished(job: Job, http: HTTPRequest) -> None:
        """Waits for a job's end, unless the client goes away."""

        async def to_the_end() -> None:
            async with aclosing(gains(job)) as all_gains:
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

    def stream(job: Job, head: dict, part: Part, body: ChatRequest | CompletionRequest) -> StreamingResponse:
        """Server-sent events: a chunk for each gain."""
        told = [0] * len(job.requests)

        async def events() -> AsyncIterator[str]:
            try:
                async with aclosing(gains(job)) as all_gains:
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

    async def whole(job: Job, http: HTTPRequest, head: dict, part: Part, body: ChatRequest | CompletionRequest) -> dict:
        """The answer once all of it is there."""
        await finished(job, http)
        choices = [
            {
                "index": i,
                **part(request, request.text.text, 0, len(request.token_ids)),
                "finish_reason": FINISH[request.finish_reason],
            }
            for i, request in enumerate(job.requests)
        ]
        return head | {"choices": choices, "usage": usage(job.requests, body.n or 1)}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HTTPRequest):
        messages = [message.model_dump(include={"role", "content"}) for message in body.messages]
        job = submit(body, [messages], engine.context)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

        def delta(request: Request, text: str, first: int, last: int) -> dict:
            opening = {} if first else {"role": "assistant"}
            return {"delta": opening | {"content": text}, "logprobs": logprobs.of_chat(request, first, last)}

        def message(request: Request, text: str, first: int, last: int) -> dict:
            said = {"role": "assistant", "content": text, "refusal": None}
            return {"message": said, "logprobs": logprobs.of_chat(request, first, last)}

        if body.stream:
            return stream(job, head | {"object": "chat.completion.chunk"}, delta, body)
        return await whole(job, http, head | {"object": "chat.completion"}, message, body)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, http: HTTPRequest):
        job = submit(body, body.prompts, 16)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        head["object"] = "text_completion"

        def text_of(request: Request, text: str, first: int, last: int) -> dict:
            if body.echo and not first:
                text = engine.tokenizer.decode(request.prompt, skip_special_tokens=True) + text
            return {"text": text, "logprobs": logprobs.of_completion(request, first, last)}

        if body.stream:
            return stream(job, head, text_of, body)
        return await whole(job, http, head, text_of, body)

    card = {"id": name, "object": "model", "created": created, "owned_by": "moonwhale", "context": engine.context}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model}")
    async def model(model: str):
        known(model)
        return card

    @app.get("/health")
    async def health():
        return {"status": "ok", "model": name, "running": worker.running, "waiting": worker.waiting}

    @app.get("/metrics")
    async def prometheus():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    pages = {
        "/": ("index.html", "text/html"),
        "/page.js": ("page.js", "text/javascript"),
        "/page.css": ("page.css", "text/css"),
    }
    for path, (file, kind) in pages.items():
        text = (files("moonwhale.infer") / "web" / file).read_text(encoding="utf-8")
        app.get(path, include_in_schema=False)(partial(_page, text, kind, PAGE_POLICY))

    xrays: dict[str, str] = {}
    looking = asyncio.Lock()

    @app.post("/xray")
    async def xray(body: XrayRequest):
        known(body.model)
        messages = [message.model_dump() for message in body.messages]
        async with looking:
            page = await asyncio.to_thread(_look, folder, engine, messages)
        number = uuid.uuid4().hex
        xrays[number] = page
        while len(xrays) > KEPT_XRAYS:
            del xrays[next(iter(xrays))]
        return {"url": f"/xray/{number}"}

    @app.get("/xray/{number}", include_in_schema=False)
    async def xray_page(number: str):
        if number not in xrays:
            raise APIError(404, "this X-ray is gone: make it again")
        return _page(xrays[number], "text/html", XRAY_POLICY)

    @app.exception_handler(APIError)
    async def _(_, error: APIError):
        headers = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(UserError)
    async def _(_, error: UserError):
        message = str(error)
        param = message.partition(":")[0].removeprefix("--").replace("-", "_") if message.startswith("--") else None
        return JSONResponse(APIError(400, message.removeprefix("--"), param=param).body, 400)

    @app.exception_handler(RequestValidationError)
    async def _(_, error: RequestValidationError):
        return JSONResponse(invalid(error).body, 400)

    @app.exception_handler(HTTPException)
    async def _(http: HTTPRequest, error: HTTPException):
        what = {404: "there is nothing at this path", 405: "this path does not take this method"}
        message = what.get(error.status_code, str(error.detail))
        return JSONResponse(
            APIError(error.status_code, f"{message}: see /v1/models and /health").body, error.status_code
        )

    @app.exception_handler(Exception)
    async def _(_, error: Exception):
        return JSONResponse(APIError(500, "the server made a mistake; its log says which", "server_error").body, 500)

    paths = {route.path for route in app.routes}
    app.add_middleware(Guard, limits=limits, metrics=metrics, api_key=api_key, hosts=hosts, paths=paths)
    return app


def _page(text: str, kind: str, policy: str) -> Response:
    """A page that may load what its policy says, all of it from here."""
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return Response(text, media_type=kind, headers=headers)


@cache
def _model(folder: Path):
    """The model as it was trained, for looking inside; opened when first asked for."""
    return open_checkpoint(folder)[0]


def _look(folder: Path, engine: Engine, messages: list[dict]) -> str:
    """The X-ray of a conversation whose last turn is the assistant's."""
    if messages[-1]["role"] != "assistant":
        raise UserError("messages: the last one has to be the assistant's, whose answer is looked into")
    prompt = engine.encode(messages[:-1])
    answer = engine.tokenizer(messages[-1]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return draw(_model(folder), engine.tokenizer, prompt + answer, len(prompt))


def serve(
    engine: Engine, name: str, listener: socket.socket, limits: Limits, api_key: str | None, local: bool, folder: Path
) -> None:
    """Answers on a bound socket until Ctrl-C or SIGTERM; `local` refuses other names than this machine's."""
    if engine.fits_cache and engine.decoder.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Steps so small are not worth sharing out, and the event loop needs a core: twice the tokens on two of them.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    app = create_app(engine, name, folder, limits, api_key, LOOPBACK if local else None)
    # Else the second packet of an answer waits for the first one's acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = listener.getsockname()[:2]
    at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{name} at {at} (a page to chat) and {at}/v1 (OpenAI's API); Ctrl-C stops", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
