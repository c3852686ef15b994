"""What two texts begin with alike. Knows ids alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(one), len(other))
    unequal = np.flatnonzero(np.array(one[:length], dtype=np.int64) != np.array(other[:length], dtype=np.int64))
    return int(unequal[0]) if len(unequal) else length
