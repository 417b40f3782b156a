"""What a client did wrong or cannot have now, in the shape of OpenAI's errors."""

from __future__ import annotations

import sys
import traceback

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from cvxq.errors import ArgumentError, ContextError

INVALID, DENIED, SERVER, LIMIT = (
    "invalid_request_error",
    "authentication_error",
    "server_error",
    "rate_limit_error",
)


class ApiError(Exception):
    """A failure to tell the client: status, one line, and what OpenAI's clients look at."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Say `message`; retry_after: seconds."""
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, object]:
        """Return the JSON of the answer."""
        message = " ".join(str(self).split())
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Return what to tell the client; what is our own fault goes to stderr instead."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ArgumentError):
        return ApiError(400, str(error))
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "internal error; the server's log has more", kind=SERVER)


def _of_validation(error: ValidationError) -> ApiError:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server does not know it; leave it out"
    name = ".".join(map(str, first["loc"]))
    return ApiError(400, f"{name}: {message}" if name else message, param=name or None)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a failure of a route in OpenAI's shape."""
    return as_api_error(error).response()


HANDLED = dict.fromkeys((ApiError, ArgumentError, ValidationError, HTTPException), answer_error)
