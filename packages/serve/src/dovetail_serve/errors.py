"""Errors as the OpenAI API shows them."""

from typing import Any

import msgspec

__all__ = ["ApiError", "error_body"]

TYPES = {413: "invalid_request_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """What a client is told when a request fails.

    Args:
        status: the HTTP status.
        message: value, expectation and fix, for people.
        param: the field that is wrong, as a path such as ``messages[0].content``.
        code: the reason in one word, for programs.
        retry_after: seconds after which it makes sense to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error object of the OpenAI API."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_body(error: ApiError) -> bytes:
    """Return the error as JSON."""
    return msgspec.json.encode(error.body())
