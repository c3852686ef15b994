"""Settings of a person in one JSON file, a section for each thing that is kept. Knows no widgets and no models.

The file is `settings.json` in the folder that LLM_EDGE_CONFIG names, or else in the user's configuration folder. It is
replaced as a whole, so that whoever reads it finds the old one or the new one, and read again before each change, so
that what another program wrote meanwhile stays. Sections that nobody here knows stay too. A file or section that cannot
be used is told (`Settings.trouble`), and kept under another name before anything is written in its place.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from llm_edge.runtime.errors import InputError, MachineError
from llm_edge.runtime.safe_io import MIB, read_json, write_atomically

FILE: Final = "settings.json"
_LIMIT = 4 * MIB
_MOST_KEPT = 1000  # damaged files

T = TypeVar("T")


@dataclass(frozen=True)
class Section(Generic[T]):
    """One of the things that are kept.

    Attributes:
        name: its key in the file.
        empty: gives what it is where the file does not have it.
        read: from a JSON value; raises ValueError, with what was expected, where it cannot be used.
        write: to a JSON value.
    """

    name: str
    empty: Callable[[], T]
    read: Callable[[Any], T]
    write: Callable[[T], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text was expected")
    return value


def texts(value: Any) -> list[str]:
    """A list of texts, for sections that are one.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("a list of texts was expected")
    return list(value)


THEME: Final = Section[str]("theme", str, _text, str)


class Settings:
    """See the module. May be used from any thread.

    Args:
        folder: where the file is; None = where the module says.

    Attributes:
        path: of the file.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or default_folder()) / FILE
        self._lock = threading.RLock()
        self._values: dict[str, Any] = {}
        self._file_trouble = ""
        self._section_troubles: dict[str, str] = {}
        self._read()

    @property
    def trouble(self) -> str:
        """A line on what in the file cannot be used; "" where all can."""
        with self._lock:
            return self._file_trouble or next(iter(self._section_troubles.values()), "")

    def get(self, section: Section[T]) -> T:
        """What stands in a section; what it is when empty, where that cannot be used (see `trouble`)."""
        with self._lock:
            self._section_troubles.pop(section.name, None)
            if section.name not in self._values:
                return section.empty()
            try:
                return section.read(self._values[section.name])
            except ValueError as error:
                self._section_troubles[section.name] = (
                    f"{self.path}: {section.name}: {error}; it counts as empty until that is repaired"
                )
                return section.empty()

    def set(self, section: Section[T], value: T) -> None:
        """Keep a section; what is damaged and would be lost by that is kept under another name first.

        Raises:
            MachineError: the file cannot be written.
        """
        self.change(section, lambda _before: value)

    def change(self, section: Section[T], change: Callable[[T], T]) -> T:
        """Keep what a function makes of a section as it is in the file now; returns that.

        Raises:
            MachineError: the file cannot be written.
        """
        with self._lock:
            self._read()
            value = change(self.get(section))
            values = {**self._values, section.name: section.write(value)}
            text = json.dumps(values, ensure_ascii=True, indent=1, allow_nan=False) + "\n"
            try:
                if self._file_trouble or section.name in self._section_troubles:
                    self._keep_damaged()
                path = Path(os.path.realpath(self.path))  # so that a link stays one
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text.encode(), private=True)
            except OSError as e:
                raise MachineError(f"{self.path}: cannot be written: {e.strerror or e}: make room, or allow it") from e
            self._values = values
            self._file_trouble = ""
            self._section_troubles.pop(section.name, None)
            return value

    def _read(self) -> None:
        self._values, self._file_trouble = {}, ""
        if not os.path.lexists(self.path):
            return
        try:
            self._values = read_json(self.path, _LIMIT, error=InputError)
        except InputError as error:
            self._file_trouble = (
                f"{error}; no settings are used, and it moves to {self._free_name().name} once one is kept"
            )

    def _free_name(self) -> Path:
        """Where a damaged file goes."""
        for number in range(1, _MOST_KEPT):
            kept = self.path.with_name(f"settings.damaged-{number}.json")
            if not os.path.lexists(kept):
                break
        return kept

    def _keep_damaged(self) -> None:
        kept = self._free_name()
        if self._file_trouble:
            self.path.replace(kept)
        else:
            shutil.copyfile(self.path, kept)


def default_folder() -> Path:
    """Where settings are stored: in the folder that LLM_EDGE_CONFIG names, or in the user's configuration folder.

    Raises:
        InputError: LLM_EDGE_CONFIG is not a folder, or platformdirs is not installed.
    """
    return user_folder("LLM_EDGE_CONFIG", "user_config_path")


def user_folder(variable: str, function: str) -> Path:
    """The folder that an environment variable names, or else what a function of platformdirs returns.

    Raises:
        InputError: the variable is not a folder, or platformdirs is needed and not installed.
    """
    folder = os.environ.get(variable, "")
    try:
        if folder:
            return Path(folder).expanduser()
    except RuntimeError as e:  # a home folder of an unknown user
        raise InputError(f"{variable}: {folder}: {e}: set it to a folder") from e
    try:
        import platformdirs
    except ImportError as e:
        raise InputError("saving needs platformdirs: pip install 'llm-edge[tui]'") from e
    path: Path = getattr(platformdirs, function)("llm-edge", appauthor=False)
    return path
