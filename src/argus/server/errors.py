"""Errors in the OpenAI API's format."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from argus.server.schema import ArgusOptions


class ApiError(HTTPException):
    """An error answer. `param` names the field to correct, `code` the kind of error for
    programs."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.detail,
                "type": _KINDS.get(self.status_code, kind),
                "param": self.param,
                "code": self.code,
            }
        }


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def invalid(message: str, param: str | None) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, "invalid_value", param)


def unknown_field(path: str, of: type[BaseModel]) -> ApiError:
    known = ", ".join(of.model_fields)
    return invalid(f"{path}: there is no such field; the fields are {known}.", path)


def answer_errors(app: FastAPI) -> None:
    """Answer every error of the app in OpenAI's format."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status_code, headers=error.headers)

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason, at = first.get("ctx", {}).get("error", ""), first["loc"][-1]
            message = f"The body is not valid JSON: {reason} (character {at})."
            return answer(ApiError(400, message, "invalid_json"))
        if first["type"] in ("model_attributes_type", "model_type") and len(first["loc"]) == 1:
            message = "The body is not a JSON object; send one with Content-Type: application/json."
            return answer(ApiError(400, message, "invalid_json"))
        path = ".".join(str(part) for part in first["loc"] if part != "body")
        message = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "extra_forbidden":
            return answer(unknown_field(path, ArgusOptions))
        return answer(invalid(f"{path or 'The body'}: {message}.", path or None))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code, message = "http_error", f"{error.detail}: see /docs for the routes."
        if error.status_code == 404:
            code = "not_found"
        elif error.status_code == 400:  # FastAPI's answer to a body that is not UTF-8
            code, message = "invalid_json", "The body is not valid JSON."
        headers = dict(error.headers or {})
        return answer(ApiError(error.status_code, message, code, headers=headers))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        del error  # uvicorn logs it with its traceback
        headers = {"x-request-id": str(getattr(request.state, "request_id", ""))}
        message = "The server failed; its log has the error."
        return answer(ApiError(500, message, "internal_error", headers=headers))
