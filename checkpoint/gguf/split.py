"""Finds and checks the further parts of a model that llama.cpp's gguf-split divided into several files.

The first part has the metadata of the model. Every part states its number (`split.no`, from 0), how many there are
(`split.count`) and how many tensors they have together; names end with `-00001-of-00003.gguf`.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from llm_edge.checkpoint.gguf.header import GGUFTensor, Header
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import short_repr

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 10_000


def base_name(path: Path) -> str:
    """Return the name of a file without its suffix and the number of its part."""
    named = _NAME.fullmatch(path.name)
    return named[1] if named else path.stem


def other_parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Return the paths of all parts but the first, which `path` has to be; none for a model in one file.

    Raises:
        CheckpointError: a part is missing, or `path` is another part or has another name.
    """
    count = metadata.get("split.count", 1)
    if count in (0, 1) and not isinstance(count, bool):
        return []
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= _MAX_PARTS:
        _fail(path, f"split.count is {short_repr(count)}, not a number of files: download it again")
    named, number = _NAME.fullmatch(path.name), metadata.get("split.no")
    if named is None or int(named[3]) != count:
        _fail(path, f"is one of {count} files of a split model: give it the name …-00001-of-{count:05d}.gguf again")
    parts = [path.with_name(f"{named[1]}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    if number != 0 or parts[0] != path:
        shown = number + 1 if isinstance(number, int) else int(named[2])
        _fail(path, f"is part {shown} of {count} of a split model: give the first one, {parts[0]}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        _fail(path, f"the model has {count} parts; missing: {', '.join(missing[:3])}{more}: download them too")
    return parts[1:]


def read_part(path: Path, data: mmap.mmap, number: int, first: Mapping[str, Any]) -> dict[str, GGUFTensor]:
    """Return the tensors of a further part.

    Raises:
        CheckpointError: the part is damaged, or belongs to another model or place.
    """
    header = Header(path, data)
    found = header.metadata.get("split.no"), header.metadata.get("split.count")
    if found != (number, first["split.count"]):
        shown = ", ".join(map(short_repr, found))
        _fail(path, f"split.no and split.count are {shown}, not {number}, {first['split.count']}: download it again")
    return header.tensors


def _fail(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path}: {reason}")
