"""`read_rows`: the conversations of a JSONL file, and the lines that hold none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from llm_edge.finetune.data.formats import Conversation, parse_row
from llm_edge.finetune.data.problems import Problem, RowError
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.safe_io import MIB

_MAX_LINE = 64 * MIB


def read_rows(path: Path) -> Iterator[tuple[int, Conversation] | Problem]:
    """Line number and conversation of each row, or its problem; blank lines are skipped.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would block
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}: give a JSONL file")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise InputError(f"{path}: line {number} is longer than {_MAX_LINE // MIB} MiB: split it")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    _refuse_array(path, line)
                if line.strip():
                    yield _parsed(number, line)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}: give a JSONL file") from error


def _parsed(number: int, line: bytes) -> tuple[int, Conversation] | Problem:
    try:
        return number, parse_row(json.loads(line.decode("utf-8"), parse_constant=_refuse_constant))
    except RowError as error:
        return Problem(number, str(error))
    except UnicodeDecodeError:
        return Problem(number, "not UTF-8 text")
    except RecursionError:
        return Problem(number, "JSON nested too deeply")
    except ValueError:  # also an integer of thousands of digits
        return Problem(number, "not valid JSON")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_array(path: Path, line: bytes) -> None:
    if line.lstrip()[:1] == b"[":
        raise InputError(f"{path} is a JSON array: write one object per line (jq -c '.[]' {path.name})")
