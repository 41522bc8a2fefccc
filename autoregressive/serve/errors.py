"""Refusals: OpenAI's form of an error with HTTP's status, and the table of what is refused on purpose."""

from collections.abc import Mapping

from pydantic import BaseModel
from starlette.exceptions import HTTPException

# What OpenAI's interface has and this server refuses on purpose, with what to do instead: values of a field, fields, and paths.
REFUSED = {
    "response_format: url": "no pictures are kept for a later download: leave it out, or ask for png",
    "background: transparent": "the model draws opaque pictures: leave background out",
    "output_format: gif": "there are png, jpeg and webp",
    "output_format: svg": "the model draws pixels: there are png, jpeg and webp",
    "svg": "the model draws pixels: leave it out",
    "frame_count": "the model draws still pictures: leave it out",
    "frame_duration_ms": "the model draws still pictures: leave it out",
    "complexity": "a picture always has the model's number of tokens: leave it out",
    "/v1/images/variations": "the model varies no whole picture: fill a part of it at /v1/images/edits, or give another seed",
    "/docs": "such a page loads its scripts from elsewhere: the interface's description is /openapi.json",
    "/redoc": "such a page loads its scripts from elsewhere: the interface's description is /openapi.json",
}

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """The reason of a refusal. param: the field that is wrong. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """A refusal, as OpenAI's clients read it."""

    error: ErrorDetail


class RequestError(HTTPException):
    """An answer that is no image. param: the field that is wrong. code: for programs. headers: further ones."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.status, self.message, self.param, self.code = status, message, param, code

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict:
        """Return the answer, as JSON has it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse(param: str, message: str, code: str = "invalid_value") -> RequestError:
    """Return the refusal of a field's value."""
    return RequestError(400, message, param=param, code=code)
