"""OpenAI's response shapes: whole responses, the chunks of a stream, log-probabilities and usage."""

import json
import time
import uuid
from itertools import accumulate

from moonwhale.infer.engine import Engine
from moonwhale.infer.request import Request
from moonwhale.serve.requests import GenerationRequest
from moonwhale.serve.worker import TokenChunk

FINISH_REASON = {None: None, "eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


class ResponseFormat:
    """Formats the answer to one HTTP request. A subclass for each endpoint says what a choice holds.

    Its `message` returns the text of a finished choice, its `delta` the text that a chunk adds, and its `logprobs` the
    log-probabilities of a chunk's tokens.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, engine: Engine, model_name: str, body: GenerationRequest):
        self.engine, self.body = engine, body
        self._header = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, requests: list[Request]) -> dict:
        """Returns the response, once all requests have ended."""
        choices = []
        for i, request in enumerate(requests):
            answer = TokenChunk(request, i, request.text.text, slice(0, None), request.finish_reason)
            choices.append(self._choice(answer, self.message(answer)))
        return self._header | {"object": self.whole_object, "choices": choices, "usage": self._usage(requests)}

    def chunk(self, chunk: TokenChunk) -> dict:
        """Returns a chunk of a stream."""
        choice = self._choice(chunk, self.delta(chunk))
        return self._header | {"object": self.chunk_object, "choices": [choice]}

    def usage_chunk(self, requests: list[Request]) -> dict:
        """Returns the last chunk of a stream with `include_usage`."""
        return self._header | {"object": self.chunk_object, "choices": [], "usage": self._usage(requests)}

    def _choice(self, chunk: TokenChunk, text: dict) -> dict:
        logprobs = None if chunk.request.top_logprobs is None else self.logprobs(chunk)
        reason = FINISH_REASON[chunk.finish_reason]
        return {"index": chunk.index, **text, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self, requests: list[Request]) -> dict:
        """Counts the tokens read and written. The choices of one prompt count its tokens once."""
        prompt = sum(len(request.prompt) for request in requests[:: self.body.num_choices])
        written = sum(len(request.token_ids) for request in requests)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _token_text(self, token: int) -> str:
        return self.engine.token_bytes[token].decode("utf-8", "replace")


class ChatFormat(ResponseFormat):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def message(self, answer: TokenChunk) -> dict:
        return {"message": {"role": "assistant", "content": answer.text, "refusal": None}}

    def delta(self, chunk: TokenChunk) -> dict:
        role = {"role": "assistant"} if chunk.span.start == 0 else {}
        return {"delta": role | {"content": chunk.text}}

    def logprobs(self, chunk: TokenChunk) -> dict:
        content = []
        request, span = chunk.request, chunk.span
        for token, (logprob, top) in zip(request.token_ids[span], request.logprobs[span], strict=True):
            likeliest = [self._entry(other, value) for other, value in top.items()]
            content.append(self._entry(token, logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict:
        return {"token": self._token_text(token), "logprob": logprob, "bytes": list(self.engine.token_bytes[token])}


class CompletionFormat(ResponseFormat):
    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def delta(self, chunk: TokenChunk) -> dict:
        text = chunk.text
        if self.body.echo and chunk.span.start == 0:
            text = self.engine.tokenizer.decode(chunk.request.prompt, skip_special_tokens=True) + text
        return {"text": text}

    message = delta

    def logprobs(self, chunk: TokenChunk) -> dict:
        texts = [self._token_text(token) for token in chunk.request.token_ids[: chunk.span.stop]]
        offsets = list(accumulate(map(len, texts), initial=0))[:-1]
        logprobs = chunk.request.logprobs[chunk.span]
        return {
            "tokens": texts[chunk.span],
            "token_logprobs": [logprob for logprob, _ in logprobs],
            "top_logprobs": [{self._token_text(other): value for other, value in top.items()} for _, top in logprobs],
            "text_offset": offsets[chunk.span],
        }


def event(body: dict) -> str:
    """Encodes a body as a server-sent event.

    sse-starlette runs several tasks per stream, which takes a fifth more CPU time per token with 64 streams, and it
    replaces uvicorn's signal handler. FastAPI's EventSourceResponse is only for endpoints that always stream.
    """
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
