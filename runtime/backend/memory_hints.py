"""Memory hints to the kernel (madvise(2)); Linux only, elsewhere nothing happens.

Decoding reads all weights for every token; with pages of 4 KiB much of that time is address translation
(bench/RESULTS.md), so `collapse_pages` moves onnxruntime's packed weights to huge pages (MADV_COLLAPSE, Linux 6.1).
onnxruntime also keeps weights mapped that a second operator reads (an embedding shared with the head): `releasing`
frees their pages, which are read from the file again when needed.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PAGE = 2 << 20
_MADV_DONTNEED, _MADV_COLLAPSE = 4, 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FULL = 0.9  # fraction of a region that must be resident: collapsing allocates the rest
_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ (\S+) (\d+) *(.*)$")
_releasing = threading.Lock()


@dataclass(slots=True)
class Region:
    """A region of the address space; sizes in bytes."""

    start: int
    size: int
    access: str  # permissions and whether it is private or shared, such as `rw-p`
    device: str  # of the mapped file; `00:00` if there is none
    inode: int  # of the mapped file; 0 if there is none
    name: str  # path of the mapped file, a name such as `[heap]`, or empty
    resident: int = 0  # in memory
    dirty: int = 0  # private, in memory and modified


def collapse_pages() -> int:
    """Collapse private memory into huge pages if the system allows it; returns how many bytes, and never raises."""
    try:
        if "[never]" in _SETTING.read_text(encoding="ascii"):
            return 0
    except OSError:
        return 0
    return sum(size for start, size in _regions(_read("/proc/self/smaps")) if advise(start, size, _MADV_COLLAPSE))


def _regions(text: str) -> list[tuple[int, int]]:
    """Start and size, in whole huge pages, of resident private memory in the text of /proc/self/smaps (proc(5))."""
    found: list[tuple[int, int]] = []
    for region in parse_smaps(text):
        own = region.access == "rw-p" and (region.device, region.inode) == ("00:00", 0)
        if not own or region.name not in ("", "[heap]") or region.resident < _FULL * region.size:
            continue
        first = -(-region.start // PAGE) * PAGE
        size = (region.start + region.size) // PAGE * PAGE - first
        if size > 0:
            found.append((first, size))
    return found


@contextmanager
def releasing(path: Path) -> Iterator[None]:
    """After the block, release the clean pages of the mappings of a file that were made in it.

    Older mappings are left alone: another thread may unmap one while this one reads /proc/self/smaps, and memory
    allocated at its address since would be cleared. For the same reason one block runs at a time.
    """
    try:
        name = str(path.resolve())
    except (OSError, RuntimeError):
        yield
        return
    with _releasing:
        older = {region.start for region in parse_smaps(_read("/proc/self/maps"))}
        yield
        for region in parse_smaps(_read("/proc/self/smaps")):
            if region.name == name and not region.dirty and region.start not in older:
                advise(region.start, region.size, _MADV_DONTNEED)


def _read(path: str) -> str:
    """The content of a file of proc(5); empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse_smaps(smaps: str) -> list[Region]:
    """The regions in the content of /proc/self/smaps, or of /proc/self/maps, which lacks what is in memory."""
    found: list[Region] = []
    for line in smaps.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            start, end = int(header[1], 16), int(header[2], 16)
            found.append(Region(start, end - start, header[3], header[4], int(header[5]), header[6]))
        elif found and line.startswith("Rss:"):
            found[-1].resident = int(line.split()[1]) * 1024
        elif found and line.startswith("Private_Dirty:"):
            found[-1].dirty = int(line.split()[1]) * 1024
    return found


def advise(start: int, size: int, advice: int) -> bool:
    """Call madvise(2); returns whether it succeeded."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # Windows refuses None
        return False
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(start, size, advice) == 0)
