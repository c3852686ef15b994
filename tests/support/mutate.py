"""Deterministic damage to files for fuzz tests."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

EXTREMES = (0, 1, 2**7 - 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63)
EXTREMES += (2**64 - 1, 2**64 - 8)


def mutations(content: bytes, count: int, seed: int, headers: Sequence[range] = ()) -> Iterator[bytes]:
    """`count` damaged copies of a file.

    Args:
        content: the file.
        count: how many copies.
        seed: the same seed yields the same damage.
        headers: ranges with sizes and offsets; three quarters of the damage is there.
    """
    rng = random.Random(seed)
    kinds = (_flip_bits, _flip_bits, _set_integer, _set_integer, _set_integer, _fill_run, _cut, _repeat, _remove, _swap)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            if damaged:
                inside = rng.choice(headers) if headers and rng.random() < 0.75 else range(len(damaged))
                position = min(rng.choice(inside), len(damaged) - 1)
                rng.choice(kinds)(damaged, position, rng)
        yield bytes(damaged)


def _flip_bits(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _set_integer(data: bytearray, at: int, rng: random.Random) -> None:
    """Change an integer of 1 to 8 bytes slightly or to an extreme; the length is unchanged."""
    width = rng.choice((1, 2, 4, 8))
    at -= at % rng.choice((1, 2, 4))
    field = data[at : at + width]
    order = rng.choice(("little", "little", "big"))
    near = int.from_bytes(field, order) + rng.choice((-8, -1, 1, 8))
    value = rng.choice((near, rng.choice(EXTREMES), rng.getrandbits(8 * width)))
    data[at : at + width] = (value % (1 << 8 * len(field))).to_bytes(len(field), order)


def _fill_run(data: bytearray, at: int, rng: random.Random) -> None:
    length = len(data[at : at + rng.choice((1, 2, 4, 16, 64))])
    data[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))


def _cut(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at:]


def _repeat(data: bytearray, at: int, rng: random.Random) -> None:
    chunk = data[at : at + rng.choice((1, 4, 8, 30, 100))]
    data[at:at] = chunk * rng.choice((1, 1, 1, 50))


def _remove(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.choice((1, 4, 8, 30, 100))]


def _swap(data: bytearray, at: int, rng: random.Random) -> None:
    """Overwrite bytes with others from elsewhere in the file."""
    length = rng.choice((1, 4, 8, 30))
    other = rng.randrange(len(data))
    data[at : at + length] = data[other : other + length]


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Within the block, this process can allocate at most `extra` further bytes (on Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
