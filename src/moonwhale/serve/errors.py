"""The errors that the server sends, in OpenAI's shape.

middleware.py refuses with 401, 403, 408 and 413; limits.py with 429; requests.py and this file with 400 and 404.
"""

import re

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from moonwhale.errors import UserError

TYPES = {401: "authentication_error", 408: "timeout", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class APIError(HTTPException):
    """An error that reaches the client as OpenAI's error object.

    It is an HTTPException because FastAPI lets only those pass when `receive` raises them.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **keywords):
        super().__init__(status, message, **keywords)
        type = TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def require_model(asked: str, served: str) -> None:
    """Raises a 404 if a client asks for another model than the one that is served."""
    if asked != served:
        message = f"there is no model {asked!r} here: ask for {served!r}"
        raise APIError(404, message, param="model", code="model_not_found")


def api_error(error: Exception) -> APIError:
    """Returns what the client learns of an error: APIErrors, bad values and bodies, unknown routes, and bugs."""
    match error:
        case APIError():
            return error
        case UserError():
            message = str(error)
            field = re.match(r"`([\w.]+)`", message)  # the field that the message names first
            return APIError(400, message.replace("`", ""), param=field and field[1])
        case RequestValidationError():
            return _bad_body(error)
        case StarletteHTTPException():
            known = {404: "there is nothing at this path", 405: "this path does not take this method"}
            message = known.get(error.status_code, str(error.detail))
            return APIError(error.status_code, f"{message}: see /v1/models and /health")
        case _:
            return APIError(500, "the server made a mistake; its log says which")


def _bad_body(error: RequestValidationError) -> APIError:
    """A 400 that describes the first invalid field of a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return APIError(400, f"the body is not JSON: {reason}")

    # Pydantic adds steps for validators and for members of a union; they are not part of the field's path.
    steps = [str(step) for step in first["loc"][1:]]
    path = ".".join(step for step in steps if not step.startswith(("function-", "list[", "str")))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server does not know this field: leave it out"
    return APIError(400, f"{path or 'the body'}: {message[:1].lower()}{message[1:]}", param=path or None)


def add_error_handlers(app: FastAPI) -> None:
    """Sends whatever an endpoint raises as OpenAI's error object."""

    async def send_error(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    for kind in (UserError, RequestValidationError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, send_error)
