"""Starts the jobs that add models: from an upload, or from the Hugging Face Hub; shared by all protocols."""

from __future__ import annotations

import re

from fastapi import Request

from llm_edge.server.errors import ApiError, invalid
from llm_edge.server.jobs import Job
from llm_edge.server.state import ServerState
from llm_edge.server.uploads import receive_upload, slug

SMOLLM2 = "smollm2"  # a word that llm-export knows
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}(?:@[A-Za-z0-9_][\w.-]{{0,99}})?", re.ASCII)
_ADDRESS = re.compile(r"[\d.]+/", re.ASCII)
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".gguf", ".json", ".zip", ".git", ".onnx")
_PRECISIONS = re.compile(r"[a-z0-9,-]{1,100}", re.ASCII)
_MAX_UPLOADS = 4  # received at the same time
_YES, _NO = ("", "1", "true", "yes"), ("0", "false", "no")


async def add_upload(request: Request, state: ServerState) -> Job:
    """Receive an upload and start its export.

    The form's fields `name`, `precision` and `validation` are optional.

    Raises:
        ApiError: uploads are off, or this one cannot be used.
    """
    if not state.config.jobs.uploads:
        raise ApiError(403, "uploads are off: start llm-serve with --allow-uploads", "uploads_disabled")
    if state.uploading >= _MAX_UPLOADS:
        raise ApiError(429, "too many uploads at the same time: try again later", "queue_full", retry_after=60)
    state.uploading += 1
    try:
        upload = await receive_upload(request, state.jobs.uploads)
    finally:
        state.uploading -= 1
    try:
        given = upload.fields
        validation = given.get("validation", "").lower()
        if validation not in (*_YES, *_NO):
            raise invalid("validation: use true or false", "validation")
        precision = _checked_precision(given.get("precision", ""))
        name, title = given.get("name", ""), upload.title
        return state.jobs.add(upload, name=name, precision=precision, validate=validation in _YES, title=title)
    except BaseException:
        upload.remove()
        raise


def add_download(state: ServerState, source: str, name: str, precision: str, *, validate: bool = True) -> Job:
    """Start the export of a model of the Hub.

    Args:
        state: of the server.
        source: `owner/name`, optionally with `@revision`; or `smollm2`.
        name: of the model; "" = the Hub's.
        precision: comma-separated; "" = int8.
        validate: measure how far the precisions are from PyTorch.

    Raises:
        ApiError: downloads are off, the source is anything else, or there is a model of that name.
    """
    if not state.config.jobs.downloads:
        raise ApiError(403, "downloads are off: start llm-serve with --allow-downloads", "downloads_disabled")
    if not is_hub_id(source):
        raise invalid("source: give the id of a model on the Hugging Face Hub (owner/name), or smollm2", "source")
    wanted = name or hub_model_name(source)
    return state.jobs.add(source, name=wanted, precision=_checked_precision(precision), validate=validate)


def is_hub_id(text: str) -> bool:
    """Whether a text is `owner/name`, `owner/name@revision` or `smollm2`; no URL, path or file name is."""
    if text == SMOLLM2:
        return True
    if _HUB_ID.fullmatch(text) is None or ".." in text or "--" in text or _ADDRESS.match(text):
        return False
    return not text.partition("@")[0].lower().endswith(_FILE_SUFFIXES)


def hub_model_name(source: str) -> str:
    """The name that a model of the Hub gets here by default."""
    return "smollm2-135m" if source == SMOLLM2 else slug(source.rpartition("/")[2].partition("@")[0])


def _checked_precision(precision: str) -> str:
    if precision and _PRECISIONS.fullmatch(precision) is None:
        raise invalid("precision: give names such as int8 or fp32,int8", "precision")
    return precision
