"""The parts of the documentation that are read from the code: settings, HTTP API and error codes.

`hooks.py` puts them into the pages while the site is built, so that they cannot drift.
"""

from __future__ import annotations

import ast
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from argus.config import FILE_VARIABLE, PREFIX, Settings

Rows = list[tuple[str, ...]]  # the first is the head

SERVER = Path(__file__).parents[2] / "src" / "argus" / "server"


def settings_table() -> str:
    """Every setting: variable, type, default and meaning; then the objects that settings hold."""
    rows: Rows = [("setting", "type", "default", "meaning")]
    inner: dict[str, type[BaseModel]] = {}
    for name, field in Settings.model_fields.items():
        inner |= {model.__name__: model for model in _models(field.annotation)}
        meaning = field.description or ""
        if field.examples:
            meaning += f" In the environment, for example: `{field.examples[0]}`."
        rows.append(
            (
                f'<span id="{name}">`{name}`</span><br><small>`{PREFIX}{name.upper()}`</small>',
                _type_of(field.annotation),
                _default_of(field),
                meaning,
            )
        )
    parts = [_table(rows)]
    for model in inner.values():
        parts += [f"### {model.__name__}", _described(model), _fields(model)]
    return "\n\n".join(parts)


def file_variable() -> str:
    """The environment variable that names the configuration file."""
    return f"`{FILE_VARIABLE}`"


def api_reference() -> str:
    """Every route of the HTTP API with its parameters, body and answers; then the bodies."""
    schema = api_schema()
    bodies = schema["components"]["schemas"]
    parts = ["## Routes"]
    for path, operations in sorted(schema["paths"].items()):
        for method, operation in operations.items():
            parts += list(_operation(method.upper(), path, operation))
    parts.append("## Bodies")
    for name, body in bodies.items():
        parts += [f"### {name}", _plain(body.get("description", "")), _properties(body)]
    return "\n\n".join(part for part in parts if part)


def api_schema() -> dict[str, Any]:
    """The OpenAPI schema of a server of the bundled family."""
    from argus.server.app import new_app  # here, because torch takes seconds to import
    from argus.server.service import Service

    with tempfile.TemporaryDirectory() as folder:
        service = Service(Settings(data=Path(folder), device="cpu", workers=1))
        try:
            return new_app(service).openapi()
        finally:
            service.kill()


def error_table() -> str:
    """Every error code that the server's source answers with: its status and its message."""
    found: dict[tuple[str, int], list[str]] = {}
    for file in sorted(SERVER.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "ApiError":
                for code, status, message in _error(call):
                    found.setdefault((code, status), []).append(message)
    rows: Rows = [("code", "status", "message")]
    for (code, status), messages in sorted(found.items(), key=lambda one: (one[0][1], one[0])):
        rows.append((f"`{code}`", str(int(status)), "<br>".join(dict.fromkeys(messages))))
    return _table(rows)


def _error(call: ast.Call) -> Iterator[tuple[str, int, str]]:
    """Code, status and message of an `ApiError(...)` whose status and code are written out."""
    given = dict(zip(("status", "message", "code"), call.args, strict=False))
    given |= {one.arg: one.value for one in call.keywords if one.arg is not None}
    status, message, code = given["status"], given["message"], given["code"]
    if isinstance(code, ast.Constant):
        if isinstance(status, ast.Constant) and isinstance(status.value, int):
            yield str(code.value), status.value, _message(message)
        elif isinstance(status, ast.Attribute):
            yield str(code.value), HTTPStatus[status.attr], _message(message)


def _message(node: ast.expr) -> str:
    """A message, with an ellipsis for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_message(part) for part in node.values)
    return "…"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"### `{method} {path}`"
    yield _sentence(operation.get("description") or operation.get("summary") or "")
    parameters = operation.get("parameters", [])
    if parameters:
        rows: Rows = [("parameter", "in", "type", "default", "meaning")]
        for one in parameters:
            rows.append(
                (
                    f"`{one['name']}`",
                    one["in"],
                    _schema_type(one["schema"]),
                    _schema_default(one["schema"], one.get("required", False)),
                    one.get("description", ""),
                )
            )
        yield _table(rows)
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        yield f"Body: {_schema_type(content['schema'])}."
    rows = [("status", "answer")]
    answers: dict[str, list[str]] = {}
    for status, answer in sorted(operation["responses"].items()):
        answers.setdefault(_answer(status, answer), []).append(status)
    rows += [(", ".join(statuses), what) for what, statuses in answers.items()]
    yield _table(rows)


def _answer(status: str, answer: Mapping[str, Any]) -> str:
    """What an answer holds, and what the schema says of it beyond its status."""
    kinds = []
    for media, content in answer.get("content", {}).items():
        body = _schema_type(content["schema"]) if content.get("schema") else ""
        kinds.append(body if media == "application/json" else f"`{media}`")
    said = answer["description"]
    known = "" if said in ("Successful Response", _phrase(status)) else f"{said} "
    return known + ", ".join(kind for kind in kinds if kind)


def _phrase(status: str) -> str:
    return HTTPStatus(int(status)).phrase


def _properties(body: Mapping[str, Any]) -> str:
    rows: Rows = [("field", "type", "default", "meaning")]
    required = body.get("required", [])
    for name, one in body.get("properties", {}).items():
        rows.append(
            (
                f"`{name}`",
                _schema_type(one),
                _schema_default(one, name in required),
                one.get("description", ""),
            )
        )
    return _table(rows) if len(rows) > 1 else ""


def _schema_type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [_schema_type(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(one)}`" for one in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_schema_type(schema.get('items', {}))}"
    values = schema.get("additionalProperties")
    if kind == "object" and isinstance(values, dict):
        return f"object of {_schema_type(values)}"
    limits = _limits(schema)
    return f"{schema.get('format') or kind}{limits}"


def _limits(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None or high is not None:
        if high is None:
            return f" ≥ {low}"
        return f" ≤ {high}" if low is None else f" from {low} to {high}"
    if "maxLength" in schema:
        return f" of at most {schema['maxLength']} characters"
    return ""


def _schema_default(schema: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default is None else f"`{json.dumps(default)}`"


def _fields(model: type[BaseModel]) -> str:
    rows: Rows = [("field", "type", "default")]
    for name, field in model.model_fields.items():
        rows.append((f"`{name}`", _type_of(field.annotation), _default_of(field)))
    return _table(rows)


def _described(model: type[BaseModel]) -> str:
    return _plain(model.__doc__ or "")


def _plain(text: str) -> str:
    """A docstring without its indentation."""
    return "\n\n".join(
        " ".join(line.strip() for line in part.splitlines()) for part in text.split("\n\n")
    ).strip()


def _sentence(text: str) -> str:
    text = _plain(text)
    return text if not text or text.endswith(".") else f"{text}."


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, ByteSize):
        return f"`{value.human_readable(decimal=True, separator='')}`"
    if isinstance(value, dict):
        plain = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in value.items()}
        return f"`{json.dumps(plain)}`"
    if isinstance(value, list | tuple | bool):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _type_of(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_of(inner[0])
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_of(one) for one in inner if one is not NoneType))
    if origin in (list, tuple):
        return f"list of {_type_of(inner[0])}"
    if origin is dict:
        return f"object of {_type_of(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _WORDS.get(annotation, getattr(annotation, "__name__", "any"))


_WORDS: dict[Any, str] = {
    str: "text", int: "integer", float: "number", bool: "true or false", Path: "path",
    ByteSize: "bytes", Any: "any",
}  # fmt: skip


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for one in get_args(annotation):
        yield from _models(one)


def _table(rows: Rows) -> str:
    head, *body = [[_cell(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")
