"""What affects a comparison on this machine: AMX, and load from other processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)  # of the first line of /proc/stat: user, nice, system, irq, softirq, steal


def has_amx() -> bool:
    """Whether Linux shows the processor's tile registers."""
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def busy_cpus(seconds: float = 1.0) -> float | None:
    """Number of busy CPUs while this process waits; None without /proc."""
    try:
        before = _busy_seconds()
        time.sleep(seconds)
        return (_busy_seconds() - before) / seconds
    except (OSError, ValueError, IndexError):
        return None


def _busy_seconds() -> float:
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    return sum(int(fields[number]) for number in _BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
