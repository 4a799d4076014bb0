"""The errors that the server sends, in OpenAI's shape.

middleware.py refuses with 401, 403, 408 and 413; limits.py with 429; requests.py and this file with 400 and 404.
"""

import json
import re

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException

from moonwhale.errors import UserError
from moonwhale.serve.fields import shown

TYPES = {401: "authentication_error", 408: "timeout", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class APIError(HTTPException):
    """An error that reaches the client as OpenAI's error object.

    It is an HTTPException because FastAPI lets only those pass when `receive` raises them.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **keywords):
        super().__init__(status, message, **keywords)
        type = TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> Response:
        # The message may repeat half of a surrogate pair, which JSON escapes and UTF-8 cannot hold.
        return Response(json.dumps(self.body), self.status_code, self.headers, media_type="application/json")


def require_model(asked: str, served: str) -> None:
    """Raises a 404 if a client asks for another model than the one that is served."""
    if asked != served:
        message = f"there is no model {asked!r} here: ask for {served!r}"
        raise APIError(404, message, param="model", code="model_not_found")


def api_error(error: Exception, headers: Headers | None = None) -> APIError:
    """Returns what the client learns of an error: APIErrors, bad values and bodies, unknown routes, and bugs.

    headers: those of the request, which can explain why its body cannot be read.
    """
    match error:
        case APIError():
            return error
        case UserError():
            message = str(error)
            field = re.match(r"`([\w.]+)`", message)  # the field that the message names first
            return APIError(400, message.replace("`", ""), param=field and field[1])
        case RequestValidationError():
            return _bad_body(error, headers or Headers())
        case StarletteHTTPException(status_code=400):  # bytes that are no text, or a number of thousands of digits
            return _bad_headers(headers or Headers()) or APIError(400, "the body cannot be read: send JSON in UTF-8")
        case StarletteHTTPException():
            known = {
                404: "there is nothing at this path: see /v1/models and /health",
                405: "this path does not take this method: see /v1/models and /health",
            }
            message = known.get(error.status_code, str(error.detail))
            return APIError(error.status_code, message, headers=error.headers)  # a 405 says which methods are allowed
        case _:
            return APIError(500, "the server made a mistake; its log says which")


def _bad_headers(headers: Headers) -> APIError | None:
    """A 400 if the headers say that the body is not plain JSON."""
    encoding, kind = headers.get("content-encoding", "identity"), headers.get("content-type", "")
    if encoding != "identity":
        return APIError(400, f"the body has the content-encoding {shown(encoding)}: send it uncompressed")
    if not re.fullmatch(r"application/(.+\+)?json", kind.partition(";")[0].strip().lower()):
        given = f"the content-type is {shown(kind)}" if kind else "there is no content-type"
        return APIError(400, f"{given}: send the header `content-type: application/json`")
    return None


def _bad_body(error: RequestValidationError, headers: Headers) -> APIError:
    """A 400 that describes the first invalid field of a body."""
    if (refused := _bad_headers(headers)) is not None:
        return refused
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # about fields that do not fit each other
        return api_error(cause)
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return APIError(400, f"the body is not JSON: {reason}")

    path = ".".join(str(step) for step in first["loc"][1:])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server does not know this field: leave it out"
    elif first["type"] not in ("value_error", "missing"):
        message += f", not {shown(first['input'])}"
    return APIError(400, f"{path or 'the body'}: {message[:1].lower()}{message[1:]}", param=path or None)


def add_error_handlers(app: FastAPI) -> None:
    """Sends whatever an endpoint raises as OpenAI's error object."""

    async def send_error(http: Request, error: Exception) -> Response:
        return api_error(error, http.headers).response()

    for kind in (UserError, RequestValidationError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, send_error)
