"""`python -m llm_edge.server.export_command BYTES …`: `llm-export …` with a memory limit and a low priority."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys


def limit_memory(size: int) -> None:
    """Limit the bytes that this process and its children may each allocate, where the system can.

    `RLIMIT_DATA` counts private memory only, so files that are mapped for reading do not count.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = size if hard == resource.RLIM_INFINITY else min(size, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Run `llm-export` with the arguments after the first, the memory limit in bytes."""
    limit_memory(int(sys.argv[1]))
    if hasattr(os, "nice"):
        os.nice(10)  # answers come first
    sys.argv = ["llm-export", *sys.argv[2:]]
    runpy.run_module("llm_edge.exporter", run_name="__main__")


if __name__ == "__main__":
    main()
