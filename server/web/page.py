"""Serves the page's files, with a policy that lets it load nothing from elsewhere."""

from __future__ import annotations

import functools
import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request, Response

router = APIRouter(include_in_schema=False)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "webmanifest": "application/manifest+json",
}
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'self'",
    )
)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    compressed: bytes
    etag: str
    type: str


@functools.cache
def _files() -> dict[str, _File]:
    """The files of the page by name; no other names are served."""
    found = {}
    for each in resources.files("llm_edge.server.web").joinpath("static").iterdir():
        kind = _TYPES.get(each.name.rpartition(".")[2])
        if kind is not None:
            content = each.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
            found[each.name] = _File(content, gzip.compress(content, 9, mtime=0), etag, kind)
    return found


@router.get("/")
def index(request: Request) -> Response:
    """The page."""
    return _respond(request, "index.html")


@router.get("/favicon.ico")
@router.get("/favicon.svg")
def icon(request: Request) -> Response:
    """The page's icon."""
    return _respond(request, "icon.svg")


@router.get("/static/{name}")
def static(name: str, request: Request) -> Response:
    """A file of the page."""
    return _respond(request, name)


def _respond(request: Request, name: str) -> Response:
    file = _files().get(name)
    if file is None:
        return Response("Not Found", 404, media_type="text/plain")
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "ETag": file.etag,
        "Vary": "Accept-Encoding",
        "X-Frame-Options": "DENY",
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.compressed, headers={**headers, "Content-Encoding": "gzip"}, media_type=file.type)
    return Response(file.content, headers=headers, media_type=file.type)
