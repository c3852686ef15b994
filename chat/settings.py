"""`Settings`: the user's settings, a JSON file with a section for each kind.

The file is `settings.json` in the folder that LLM_EDGE_CONFIG names, or in the user's configuration folder. It is
replaced atomically, and read again before each change, so that changes of other programs are kept; so are unknown
sections. A damaged file or section is reported by `Settings.trouble`, and copied before it is overwritten.
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
from llm_edge.runtime.installation import install_hint
from llm_edge.runtime.safe_io import MIB, read_json, write_atomically

FILE: Final = "settings.json"
_LIMIT = 4 * MIB
_MAX_COPIES = 1000  # of damaged files

T = TypeVar("T")


@dataclass(frozen=True)
class Section(Generic[T]):
    """A section of the settings. Its value is stored as JSON."""

    name: str  # key in the file
    empty: Callable[[], T]  # returns the value if the file does not have the section
    read: Callable[[Any], T]  # checks a JSON value; raises ValueError with what it expected


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a string")
    return value


def texts(value: Any) -> list[str]:
    """Check that a JSON value is a list of strings.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError("expected a list of strings")
    return list(value)


THEME: Final = Section[str]("theme", str, _text)


class Settings:
    """The user's settings, in the default folder or another one. Thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or default_folder()) / FILE
        self._lock = threading.RLock()
        self._values: dict[str, Any] = {}
        self._file_trouble = ""
        self._section_troubles: dict[str, str] = {}
        self._read()

    @property
    def trouble(self) -> str:
        """Why the file or a section cannot be used, as one line; "" if it can."""
        with self._lock:
            return self._file_trouble or next(iter(self._section_troubles.values()), "")

    def get(self, section: Section[T]) -> T:
        """The value of a section; its empty value if it cannot be used, see `trouble`."""
        with self._lock:
            self._section_troubles.pop(section.name, None)
            if section.name not in self._values:
                return section.empty()
            try:
                return section.read(self._values[section.name])
            except ValueError as error:
                self._section_troubles[section.name] = (
                    f"{self.path}: {section.name}: {error}; ignored until it is repaired"
                )
                return section.empty()

    def set(self, section: Section[T], value: T) -> None:
        """Write a section. If the file or section is damaged, a copy of the file is kept.

        Raises:
            MachineError: the file cannot be written.
        """
        self.change(section, lambda _before: value)

    def change(self, section: Section[T], change: Callable[[T], T]) -> T:
        """Write the result of a function of the section's current value; returns the result.

        Raises:
            MachineError: the file cannot be written.
        """
        with self._lock:
            self._read()
            value = change(self.get(section))
            values = {**self._values, section.name: value}
            text = json.dumps(values, ensure_ascii=True, indent=1, allow_nan=False) + "\n"
            try:
                if self._file_trouble or section.name in self._section_troubles:
                    self._save_damaged()
                path = Path(os.path.realpath(self.path))  # so that a link stays one
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text.encode(), private=True)
            except OSError as e:
                raise MachineError(
                    f"{self.path}: cannot be written: {e.strerror or e}: free disk space or check its permissions"
                ) from e
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
            self._file_trouble = f"{error}; ignored, and renamed to {self._free_name().name} when settings are saved"

    def _free_name(self) -> Path:
        """The name for a damaged file."""
        for number in range(1, _MAX_COPIES):
            kept = self.path.with_name(f"settings.damaged-{number}.json")
            if not os.path.lexists(kept):
                break
        return kept

    def _save_damaged(self) -> None:
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
        raise InputError(f"saving needs platformdirs: {install_hint('tui')}") from e
    path: Path = getattr(platformdirs, function)("llm-edge", appauthor=False)
    return path
