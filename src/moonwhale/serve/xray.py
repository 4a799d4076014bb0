"""The X-ray routes: POST /xray draws what happened inside the model, and GET /xray/ID shows the page.

POST /xray/ID computes the same text with other settings. It needs no API key, as the page does not: only the client
that made an X-ray knows its random name.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from moonwhale.checkpoint import open_checkpoint
from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.inspect.settings import check
from moonwhale.inspect.xray import clip_threshold, content_hashes, record_with, to_json, xray
from moonwhale.serve.body import Preparation, body_of
from moonwhale.serve.errors import APIError, busy, require_model
from moonwhale.serve.limits import Limits
from moonwhale.serve.page import LOAD_NOTHING, security_headers
from moonwhale.serve.requests import XrayRequest, XraySettings

PAGES_KEPT = 16
BYTES_KEPT = 128_000_000  # but always the last page
PIECE = 1 << 16  # bytes


@dataclass(frozen=True)
class Page:
    """An X-ray that was drawn, and the text that it is about."""

    html: bytes
    ids: list[int]


class XrayEndpoints:
    """Draws X-rays one at a time, and keeps the last ones in memory."""

    def __init__(self, engine: Engine, model_name: str, folder: Path, preparation: Preparation, limits: Limits):
        self.engine, self.model_name, self.folder = engine, model_name, folder
        self.preparation, self.limits = preparation, limits
        self._pages: dict[str, Page] = {}
        self._executor = ThreadPoolExecutor(1, "moonwhale-xray")  # one at a time: a recording changes the model
        self._waiting = 0

    def add_routes(self, app: FastAPI) -> None:
        app.post("/xray", openapi_extra=body_of(XrayRequest))(self.create)
        app.get("/xray/{page_id}", include_in_schema=False)(self.show)
        app.post("/xray/{page_id}", openapi_extra=body_of(XraySettings))(self.recompute)

    async def create(self, http: Request):
        """Draws the X-ray of a conversation, and returns its URL."""
        body = await self.preparation.read(http, XrayRequest)
        require_model(body.model, self.model_name)
        ids, prompt_tokens = await self.preparation.run(self._encode, body)
        html = await self._in_turn(self._draw, ids, prompt_tokens)
        page_id = uuid.uuid4().hex
        self._pages[page_id] = Page(html, ids)
        while len(self._pages) > 1 and (
            len(self._pages) > PAGES_KEPT or sum(len(page.html) for page in self._pages.values()) > BYTES_KEPT
        ):
            del self._pages[next(iter(self._pages))]  # the oldest
        return {"url": f"/xray/{page_id}"}

    async def show(self, page_id: str):
        sources = "; ".join(f"{name} {source}" for name, source in content_hashes().items())
        # The elements that it draws set their own styles by script, which a policy allows.
        policy = f"{LOAD_NOTHING}{sources}; connect-src 'self'; frame-ancestors 'self'"
        return _stream(self._page(page_id).html, "text/html", security_headers(policy))

    async def recompute(self, http: Request, page_id: str):
        """Computes the text of an X-ray with other settings, and returns the recording that its page draws."""
        page = self._page(page_id)
        body = await self.preparation.read(http, XraySettings)
        recorded = await self._in_turn(self._record, page.ids, body.model_dump(exclude_none=True))
        return _stream(recorded, "application/json", {})

    def _page(self, page_id: str) -> Page:
        if page_id not in self._pages:
            raise APIError(404, "this X-ray is gone: make it again")
        return self._pages[page_id]

    async def _in_turn(self, work: Callable[..., bytes], *args) -> bytes:
        """Does the work in a thread, after that of earlier requests. Raises a 429 if too many wait already."""
        if self._waiting > self.limits.xrays:
            raise busy(f"{self.limits.xrays} X-rays wait already")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, *args)
        finally:
            self._waiting -= 1

    @cached_property
    def _model(self) -> tuple:
        """The model as it was trained, opened at the first X-ray, and a tokenizer of its own for this thread.

        The engine keeps only its decoder.
        """
        return open_checkpoint(self.folder)

    def _encode(self, body: XrayRequest) -> tuple[list[int], int]:
        """Returns the ids of a conversation, and how many of them are the prompt's."""
        messages = [message.for_template() for message in body.messages]
        if messages[-1]["role"] != "assistant":
            raise UserError("`messages`: the last one has to be the assistant's: an X-ray looks into its answer")
        prompt = self.engine.encode(messages[:-1])
        return prompt + self.engine.encode_text(messages[-1]["content"]), len(prompt)

    def _draw(self, ids: list[int], prompt_tokens: int) -> bytes:
        model, tokenizer = self._model
        return xray(model, tokenizer, ids, prompt_tokens, clip_threshold(self.folder), live=True).encode()

    def _record(self, ids: list[int], asked: dict[str, int]) -> bytes:
        model, tokenizer = self._model
        return to_json(record_with(model, tokenizer, ids, check(model, asked))).encode()


def _stream(content: bytes, media_type: str, headers: dict[str, str]) -> StreamingResponse:
    view = memoryview(content)
    pieces = (bytes(view[start : start + PIECE]) for start in range(0, len(view), PIECE))
    return StreamingResponse(_each(pieces), media_type=media_type, headers=headers | {"content-length": str(len(view))})


async def _each(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yields pieces to a response, which waits for its client after each: an unread page takes no memory of its own."""
    for piece in pieces:
        yield piece
