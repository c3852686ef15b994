"""How to install the optional parts of this package, and what to say where one is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llm_edge.runtime.errors import InputError

_NAME = "llm-edge"


@contextlib.contextmanager
def imports_of_extra(command: str, extra: str) -> Iterator[None]:
    """Report a failing import in this block as a missing extra that a command needs.

    Raises:
        InputError: a library is not installed; the message names it and the remedy.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("llm_edge"):
            raise  # our own module: installing the extra would not help
        raise InputError(f"{command} needs {error.name}: {install_hint(extra)}") from error


def install_hint(extra: str) -> str:
    """The command that installs an extra, such as `pip install 'llm-edge[export]'`.

    For a checkout or a local file it names that, because an index may not have this package.
    """
    source, editable = _source()
    if source is None:
        return f"pip install '{_NAME}[{extra}]'"
    place = "." if source == Path.cwd() else str(source)
    return f"pip install {'-e ' if editable else ''}'{place}[{extra}]'"


def _source() -> tuple[Path | None, bool]:
    """The folder or file that this package was installed from, and whether as editable; None = from an index.

    Format of direct_url.json: https://packaging.python.org/specifications/direct-url
    """
    import json
    import urllib.parse
    import urllib.request
    from importlib import metadata

    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "setup.py").is_file():
        return checkout, True
    try:
        recorded = json.loads(metadata.distribution(_NAME).read_text("direct_url.json") or "{}")
        url = urllib.parse.urlsplit(recorded.get("url", ""))
        path = Path(urllib.request.url2pathname(url.path))
    except (metadata.PackageNotFoundError, OSError, ValueError, AttributeError):
        return None, False
    return (path, False) if url.scheme == "file" and path.exists() else (None, False)


def version() -> str:
    """The version of this package."""
    from importlib import metadata

    try:
        return metadata.version(_NAME)
    except metadata.PackageNotFoundError:  # a copy that was not installed
        return "(unknown version)"
