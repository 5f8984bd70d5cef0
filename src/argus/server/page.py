"""The page at `/ui`, and the API's documentation at `/docs`: static files of this package."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, RedirectResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    "Cache-Control": "no-cache",  # revalidated: a new version's files fit each other at once
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


class Files(StaticFiles):
    """The files of a folder. One that ends in .gz is served as the file it is compressed from."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        plain = Path(path)
        if plain.suffix == ".gz":
            plain = plain.with_suffix("")
            response.headers["Content-Encoding"] = "gzip"
        if plain.suffix in TYPES and response.status_code == 200:
            response.headers["Content-Type"] = f"{TYPES[plain.suffix]}; charset=utf-8"
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page and the documentation. Neither needs an API key."""

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("ui/")

    @app.get("/ui", include_in_schema=False)
    async def ui() -> RedirectResponse:
        return RedirectResponse("ui/")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(FOLDER / "docs.html", headers=HEADERS)

    app.mount("/ui", Files(directory=FOLDER, html=True))
