"""`receive_upload`: writes the files of a multipart request to disk as they arrive.

Names from clients are only compared with known ones: every file is stored under a name of ours, in a folder of ours.
"""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from llm_edge.server.errors import ApiError, invalid

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".gguf")
_SIDE_FILES = frozenset({
    "config.json", "config.yaml", "config.yml", "params.json", "generation_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
})  # fmt: skip
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_STEMS = {".safetensors": "model", ".bin": "pytorch_model", ".gguf": "model", ".pt": "model", ".pth": "model"}
_PREFIX = "upload-"
_MAX_PARTS = 1000
_MAX_HEADER = 8192  # bytes of a part's headers
_MAX_FIELD = 4096  # bytes of a field that is not a file
_BUFFER = 1 << 20
_RESERVE = 1 << 30  # bytes of the disk that stay free
_MAX_AGE = 24 * 3600.0  # seconds after which the folder of an upload was left behind


@dataclass
class Upload:
    """Files that have been received.

    Attributes:
        folder: holds them; whoever has the upload removes it.
        files: their names there.
        fields: other fields of the form.
        title: name of the weights on the client's machine, as letters, digits and dashes.
    """

    folder: Path
    files: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    title: str = ""

    def source(self) -> Path:
        """What `llm-export` reads: a GGUF file, or else the folder.

        Raises:
            ApiError: there are no weights.
        """
        weights = sorted(name for name in self.files if name.endswith(SUFFIXES))
        if not weights:
            raise invalid(f"no weights were uploaded: add a file of the type {', '.join(SUFFIXES)}")
        ggufs = [name for name in weights if name.endswith(".gguf")]
        return self.folder / ggufs[0] if ggufs else self.folder

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def stored_name(client_name: str) -> str | None:
    """Our name for a file of a checkpoint; None if it is not one."""
    name = re.split(r"[/\\]", client_name)[-1].lower()
    if name in _SIDE_FILES:
        return next(known for known in _SIDE_FILES if known == name)
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        return None
    shard = _SHARD.fullmatch(name.removesuffix(suffix))
    if shard is None or not shard[2].isascii() or not shard[3].isascii():
        return f"{_STEMS[suffix]}{suffix}"
    return f"{_STEMS[suffix]}-{int(shard[2]):05}-of-{int(shard[3]):05}{suffix}"


def slug(text: str) -> str:
    """A text as lower-case ASCII letters, digits and single dashes, at most 60."""
    return re.sub(r"[^a-z0-9]+", "-", text[:200].lower()).strip("-")[:60].strip("-")


def remove_old_uploads(parent: Path) -> None:
    """Delete what servers that were killed have left behind."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"{_PREFIX}*"):
            if folder.is_dir() and not folder.is_symlink() and time.time() - folder.stat().st_mtime > _MAX_AGE:
                shutil.rmtree(folder, ignore_errors=True)


async def receive_upload(request: Request, parent: Path) -> Upload:
    """Write the files of a request into a new folder.

    The size of the body is limited by `Guard`.

    Args:
        request: its body is multipart/form-data.
        parent: folder for all uploads; created if missing.

    Raises:
        ApiError: the body is malformed, a file is of an unknown kind, or the disk is full; nothing is left behind.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise invalid("send the files as multipart/form-data")
    expected = int(request.headers.get("content-length", "0"))  # Guard has checked it
    upload = await run_in_threadpool(_new_upload, parent, expected)
    form = _Form(upload, boundary)
    try:
        pending = bytearray()
        async for chunk in request.stream():
            pending += chunk
            if len(pending) >= _BUFFER:
                await run_in_threadpool(form.write, bytes(pending))
                pending.clear()
        await run_in_threadpool(form.write, bytes(pending))
        form.finish()
        upload.source()
    except BaseException:
        form.close()
        await run_in_threadpool(upload.remove)
        raise
    return upload


def _new_upload(parent: Path, expected: int) -> Upload:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(parent).free < expected + _RESERVE:
            raise _disk_full()
        folder = parent / f"{_PREFIX}{secrets.token_hex(12)}"
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ApiError(507, f"uploads cannot be stored: {error.strerror}", "upload_failed") from error
    return Upload(folder)


def _disk_full() -> ApiError:
    return ApiError(507, "the server's disk is full: free some space, or upload a smaller model", "disk_full")


class _Form:
    """Writes the parts of a form; all of them end up in its `Upload`."""

    def __init__(self, upload: Upload, boundary: bytes) -> None:
        self._upload = upload
        self._file: IO[bytes] | None = None
        self._name = ""
        self._value = bytearray()
        self._header, self._header_value = bytearray(), bytearray()
        self._headers: dict[str, bytes] = {}
        self._parts = 0
        self._complete = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open_part,
            "on_part_data": self._on_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)

    def write(self, data: bytes) -> None:
        """Handle the next bytes of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise invalid(f"the body is not multipart/form-data: {str(error)[:200]}") from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _disk_full() from error
            raise ApiError(507, f"the upload cannot be stored: {error.strerror}", "upload_failed") from error

    def finish(self) -> None:
        """Check that the body was complete."""
        self.close()
        if not self._complete:
            raise invalid("the upload ended early: send it again")

    def close(self) -> None:
        """Close the file that is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise invalid(f"the form has more than {_MAX_PARTS} parts")
        self._headers.clear()
        self._value.clear()
        self._name = ""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._header, data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._header_value, data[start:end])

    def _extend(self, header: bytearray, data: bytes) -> None:
        header += data
        if len(header) > _MAX_HEADER:
            raise invalid("a part of the form has too long headers")

    def _end_header(self) -> None:
        if len(self._headers) < 20:
            self._headers[self._header.decode("latin-1").lower()] = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _open_part(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        if b"filename" not in options:
            self._name = options.get(b"name", b"").decode("latin-1")
            return
        client_name = options[b"filename"].decode("utf-8", "replace")
        name = stored_name(client_name)
        if name is None:
            shown = "".join(c for c in client_name[:80] if c.isprintable())
            raise invalid(f"{shown!r} is not a file of a checkpoint: upload {', '.join(SUFFIXES)} and its configs")
        if name in self._upload.files:
            raise invalid(f"two files would be stored as {name}: upload one model at a time")
        if name.endswith(SUFFIXES):
            self._upload.title = self._upload.title or _title(client_name)
        self._upload.files.append(name)
        self._file = (self._upload.folder / name).open("xb")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
        else:
            self._value += data[start:end]
            if len(self._value) > _MAX_FIELD:
                raise invalid(f"a field of the form is longer than {_MAX_FIELD} bytes")

    def _end_part(self) -> None:
        if self._file is not None:
            self.close()
        else:
            self._upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._complete = True


def _title(client_name: str) -> str:
    stem = re.split(r"[/\\]", client_name)[-1].rpartition(".")[0]
    shard = _SHARD.fullmatch(stem)
    found = slug(shard[1] if shard else stem)
    return "" if found in ("model", "pytorch-model", "consolidated-00") else found
