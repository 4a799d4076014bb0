"""The errors that the server sends, in OpenAI's shape."""

import json
import re

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from moonwhale.errors import UserError
from moonwhale.serve.fields import shown

TYPES = {401: "authentication_error", 408: "timeout", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}

CLIENT_GONE = 499, "the client went away"  # nginx's status; only the metrics see it


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
        message = f"there is no model {shown(asked)} here: ask for {served!r}"
        raise APIError(404, message, param="model", code="model_not_found")


def busy(reason: str) -> APIError:
    """Returns a 429, which asks the client to try again."""
    return APIError(429, f"{reason}: try again soon", headers={"retry-after": "1"})


def api_error(error: Exception) -> APIError:
    """Returns what the client learns of an error: APIErrors, bad values, unknown routes, and bugs."""
    match error:
        case APIError():
            return error
        case UserError():
            message = str(error)
            field = re.match(r"`([\w.]+)`", message)  # the field that the message names first
            return APIError(400, message.replace("`", ""), param=field and field[1])
        case StarletteHTTPException():
            known = {
                404: "there is nothing at this path: see /v1/models and /health",
                405: "this path does not take this method: see /v1/models and /health",
            }
            message = known.get(error.status_code, str(error.detail))
            return APIError(error.status_code, message, headers=error.headers)  # a 405 says which methods are allowed
        case _:
            return APIError(500, "the server made a mistake; its log says which")


def add_error_handlers(app: FastAPI) -> None:
    """Sends whatever an endpoint raises as OpenAI's error object."""

    async def send_error(_: Request, error: Exception) -> Response:
        return api_error(error).response()

    for kind in (UserError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, send_error)
