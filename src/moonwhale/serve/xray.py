"""The X-ray routes: POST /xray draws what happened inside the model, and GET /xray/ID shows the page."""

import asyncio
import uuid
from functools import cached_property
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from moonwhale.checkpoint import open_checkpoint
from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.inspect.xray import xray
from moonwhale.serve.errors import APIError, require_model
from moonwhale.serve.page import LOAD_NOTHING, security_headers
from moonwhale.serve.requests import XrayRequest

PAGES_KEPT = 16
XRAY_POLICY = f"{LOAD_NOTHING}script-src 'unsafe-inline'; style-src 'unsafe-inline'"


class XrayEndpoints:
    """Draws X-rays one at a time, and keeps the last ones in memory."""

    def __init__(self, engine: Engine, model_name: str, folder: Path):
        self.engine, self.model_name, self.folder = engine, model_name, folder
        self._pages: dict[str, str] = {}
        self._lock = asyncio.Lock()

    def add_routes(self, app: FastAPI) -> None:
        app.post("/xray")(self.create)
        app.get("/xray/{page_id}", include_in_schema=False)(self.show)

    async def create(self, body: XrayRequest):
        """Draws the X-ray of a conversation, and returns its URL."""
        require_model(body.model, self.model_name)
        messages = [message.for_template() for message in body.messages]
        async with self._lock:
            page = await asyncio.to_thread(self._draw, messages)
        page_id = uuid.uuid4().hex
        self._pages[page_id] = page
        while len(self._pages) > PAGES_KEPT:
            del self._pages[next(iter(self._pages))]  # the oldest
        return {"url": f"/xray/{page_id}"}

    async def show(self, page_id: str):
        if page_id not in self._pages:
            raise APIError(404, "this X-ray is gone: make it again")
        return HTMLResponse(self._pages[page_id], headers=security_headers(XRAY_POLICY))

    @cached_property
    def _model(self):
        """The model as it was trained, opened at the first X-ray. The engine keeps only its decoder."""
        return open_checkpoint(self.folder)[0]

    def _draw(self, messages: list[dict]) -> str:
        if messages[-1]["role"] != "assistant":
            raise UserError("`messages`: the last one has to be the assistant's: an X-ray looks into its answer")
        prompt = self.engine.encode(messages[:-1])
        tokenizer = self.engine.tokenizer
        answer = tokenizer(messages[-1]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return xray(self._model, tokenizer, prompt + answer, len(prompt))
