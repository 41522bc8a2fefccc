"""What a client is told when a request is refused: OpenAI's form of an error, with the status of HTTP.

raise RequestError(400, "n is 0: ask for 1 to 8 images", param="n")
"""


class RequestError(Exception):
    """An answer that is no image. param: the field that is wrong. code: for programs. headers: further ones."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def type(self) -> str:
        """OpenAI's word for this kind of status."""
        if self.status in (401, 429):
            return {401: "authentication_error", 429: "rate_limit_error"}[self.status]
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict:
        """The answer, as JSON has it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
