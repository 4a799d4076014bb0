"""OpenAI's answers: log-probabilities, usage and errors in its shapes."""

import json

from fastapi.exceptions import RequestValidationError

from moonwhale.infer.detokenizer import TokenBytes
from moonwhale.infer.scheduler import Request
from moonwhale.serve.middleware import APIError


class Logprobs:
    """Log-probabilities in OpenAI's two shapes."""

    def __init__(self, token_bytes: TokenBytes):
        self._bytes = token_bytes

    def of_chat(self, request: Request, first: int, last: int) -> dict | None:
        if request.top_logprobs is None:
            return None
        content = []
        for token, (logprob, top) in zip(request.token_ids[first:last], request.logprobs[first:last], strict=True):
            likeliest = [self._entry(other, value) for other, value in top.items()]
            content.append(self._entry(token, logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def of_completion(self, request: Request, first: int, last: int) -> dict | None:
        if request.top_logprobs is None:
            return None
        ids, logprobs = request.token_ids[first:last], request.logprobs[first:last]
        before = sum(len(self._text(token)) for token in request.token_ids[:first])
        offsets = []
        for token in ids:
            offsets.append(before)
            before += len(self._text(token))
        return {
            "tokens": [self._text(token) for token in ids],
            "token_logprobs": [logprob for logprob, _ in logprobs],
            "top_logprobs": [{self._text(other): value for other, value in top.items()} for _, top in logprobs],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self._bytes[token])}

    def _text(self, token: int) -> str:
        return self._bytes[token].decode("utf-8", "replace")


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def usage(requests: list[Request], choices: int) -> dict:
    """Tokens read and written; a prompt counts once however many `choices`, one after the other, it has."""
    prompt = sum(len(request.prompt) for request in requests[::choices])
    written = sum(len(request.token_ids) for request in requests)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def invalid(error: RequestValidationError) -> APIError:
    """The first fault of a body, and where it is."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "list[", "str")))
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server does not know this field: leave it out"
    return APIError(400, f"{where or 'the body'}: {message[:1].lower()}{message[1:]}", param=where or None)
