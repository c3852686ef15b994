"""`ApiError`: a failed request, and how errors of the runtime become one.

Each protocol writes errors in its own shape: `error_route` makes a route class that catches whatever a handler raises.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from llm_edge.runtime.errors import (
    BundleError,
    BusyError,
    ContextLengthError,
    InputError,
    LlmEdgeError,
    MachineError,
)

_log = logging.getLogger("llm_edge.server")
_RETRY_SECONDS = 1


@dataclass
class ApiError(Exception):
    """A request that failed.

    Attributes:
        status: HTTP status.
        message: one line: what is wrong, and the remedy.
        code: machine-readable reason, such as `context_length_exceeded`.
        param: the request's field that is wrong.
        details: further fields of the error object.
        retry_after: seconds after which the client may try again.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the response."""
        return {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error for a request that can never succeed as it is."""
    return ApiError(400, message, code, param)


def api_error(error: BaseException) -> ApiError:
    """The `ApiError` for whatever a handler or a generation raised."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            details = {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.limit}
            return ApiError(400, str(error), "context_length_exceeded", "messages", details)
        case BusyError():
            return ApiError(429, str(error), "queue_full", retry_after=_RETRY_SECONDS)
        case BundleError():
            return ApiError(503, f"the model cannot be loaded: {_logged(error)}", "model_unavailable")
        case InputError():
            return invalid(str(error))
        case MachineError() | MemoryError():
            message = f"the model is not available: {_logged(error)}"
            return ApiError(503, message, "model_unavailable", retry_after=30)
        case LlmEdgeError():
            return ApiError(500, f"the generation failed: {_logged(error)}", "generation_failed")
        case RequestValidationError():
            return _validation_error(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case _:
            return ApiError(500, f"internal error: {_logged(error, traceback=True)}", "internal_error")


def _logged(error: BaseException, *, traceback: bool = False) -> str:
    """Log an error whose text is not for clients, and return where to find it."""
    identifier = secrets.token_hex(4)
    _log.error("error %s: %s", identifier, error, exc_info=error if traceback else None)
    return f"see error {identifier} in the server's log"


def _validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = str(first["msg"])[:500]
    return invalid(f"{place}: {message}" if place else message, place or None)


def error_route(body: Callable[[ApiError], Any], invalid_body: int = 400) -> type[APIRoute]:
    """A route class whose errors are written with `body`, which returns the JSON of an `ApiError`.

    Args:
        body: writes an error.
        invalid_body: status for a body that does not fit the schema.
    """

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                try:
                    return await handler(request)
                except Exception as error:  # noqa: BLE001 (every error becomes a response)
                    failed = api_error(error)
                    if isinstance(error, RequestValidationError):
                        failed.status = invalid_body
                    return JSONResponse(body(failed), failed.status, failed.headers)

            return handle

    return Route
