"""The X-ray routes: POST /xray draws what happened inside the model, and GET /xray/ID shows the page."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import cached_property
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from moonwhale.checkpoint import open_checkpoint
from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.inspect.xray import clip_threshold, xray
from moonwhale.serve.body import Preparation, body_of
from moonwhale.serve.errors import APIError, busy, require_model
from moonwhale.serve.limits import Limits
from moonwhale.serve.page import LOAD_NOTHING, security_headers
from moonwhale.serve.requests import XrayRequest

PAGES_KEPT = 16
BYTES_KEPT = 128_000_000  # but always the last page
PIECE = 1 << 16  # bytes
XRAY_POLICY = f"{LOAD_NOTHING}script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'self'"


class XrayEndpoints:
    """Draws X-rays one at a time, and keeps the last ones in memory."""

    def __init__(self, engine: Engine, model_name: str, folder: Path, preparation: Preparation, limits: Limits):
        self.engine, self.model_name, self.folder = engine, model_name, folder
        self.preparation, self.limits = preparation, limits
        self._pages: dict[str, bytes] = {}
        self._lock = asyncio.Lock()
        self._waiting = 0

    def add_routes(self, app: FastAPI) -> None:
        app.post("/xray", openapi_extra=body_of(XrayRequest))(self.create)
        app.get("/xray/{page_id}", include_in_schema=False)(self.show)

    async def create(self, http: Request):
        """Draws the X-ray of a conversation, and returns its URL."""
        body = await self.preparation.read(http, XrayRequest)
        require_model(body.model, self.model_name)
        ids, prompt_tokens = await self.preparation.run(self._encode, body)
        if self._waiting > self.limits.xrays:
            raise busy(f"{self.limits.xrays} X-rays wait already")
        self._waiting += 1
        try:
            async with self._lock:
                page = await asyncio.to_thread(self._draw, ids, prompt_tokens)
        finally:
            self._waiting -= 1
        page_id = uuid.uuid4().hex
        self._pages[page_id] = page
        while len(self._pages) > 1 and (
            len(self._pages) > PAGES_KEPT or sum(map(len, self._pages.values())) > BYTES_KEPT
        ):
            del self._pages[next(iter(self._pages))]  # the oldest
        return {"url": f"/xray/{page_id}"}

    async def show(self, page_id: str):
        if page_id not in self._pages:
            raise APIError(404, "this X-ray is gone: make it again")
        page = memoryview(self._pages[page_id])
        pieces = (bytes(page[start : start + PIECE]) for start in range(0, len(page), PIECE))
        headers = security_headers(XRAY_POLICY) | {"content-length": str(len(page))}
        return StreamingResponse(_each(pieces), media_type="text/html", headers=headers)

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
        return xray(model, tokenizer, ids, prompt_tokens, clip_threshold(self.folder)).encode()


async def _each(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yields pieces to a response, which waits for its client after each: an unread page takes no memory of its own."""
    for piece in pieces:
        yield piece
