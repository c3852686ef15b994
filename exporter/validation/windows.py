"""The windows of text that a model is validated on, and its runs over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from llm_edge.exporter.texts import Window
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS

_MAX_LOGITS_BYTES = 2 << 30  # of the text on disk; models with large vocabularies are scored on less text
_MAX_STEP_BYTES = 128 << 20  # of the logits of one step
_MAX_WINDOWS = 128
_MIN_TOKENS = 5 * MAX_STEP_TOKENS
_MAX_PRODUCTS = 400_000_000_000  # tokens times weights: small models are scored on more text than `_MIN_TOKENS`
_CACHED_TOKENS = 256
_SINGLE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of each step of a run from an empty context, and the `offset` of its first position in the logits file."""

    chunks: tuple[tuple[int, ...], ...]
    offset: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens."""
        return tuple(token for chunk in self.chunks for token in chunk)

    def starts(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield each chunk with its first position in the logits file."""
        start = self.offset
        for chunk in self.chunks:
            yield start, chunk
            start += len(chunk)


Forward = Callable[[Sequence[Run]], Iterator[Tensor]]
"""Runs a model, and yields the logits [tokens, V] of each chunk of each run in order; the next may overwrite them."""


def select_windows(windows: Sequence[Window], vocab_size: int, parameters: int) -> list[Window]:
    """Return as many windows as time and disk allow, chosen from each kind in turn, in their order; at least one."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for number, window in enumerate(windows):
        by_kind[window.kind].append(number)
    turns = [numbers[turn] for turn in range(len(windows)) for numbers in by_kind.values() if turn < len(numbers)]
    tokens = max(_MAX_PRODUCTS // parameters, _MIN_TOKENS)
    tokens = min(tokens, max(_MAX_LOGITS_BYTES // (4 * vocab_size), 2 * MAX_STEP_TOKENS))
    chosen: list[int] = []
    for number in turns[:_MAX_WINDOWS]:
        tokens -= len(windows[number].tokens)
        if chosen and tokens < 0:
            break
        chosen.append(number)
    return [windows[number] for number in sorted(chosen)]


def logits_bytes(windows: Sequence[Window], vocab_size: int) -> int:
    """Return the size of the file of logits."""
    return 4 * vocab_size * sum(len(window.tokens) for window in windows)


def step_rows(vocab_size: int) -> int:
    """Return the number of tokens in a step whose logits are all computed."""
    return min(max(_MAX_STEP_BYTES // (4 * vocab_size) // 64 * 64, 64), MAX_STEP_TOKENS)


def scoring_runs(windows: Sequence[Window], vocab_size: int) -> tuple[Run, ...]:
    """Return one run per window, in as few steps as the size of their logits allows."""
    rows, runs, offset = step_rows(vocab_size), [], 0
    for window in windows:
        starts = range(0, len(window.tokens), rows)
        runs.append(Run(tuple(window.tokens[start : start + rows] for start in starts), offset))
        offset += len(window.tokens)
    return tuple(runs)


def cached_run(window: Window, limits: Sequence[int] = ()) -> Run:
    """Return a run over the begin of a window: a prompt, then single tokens, then the rest in one step.

    Its logits are those of the window at once, unless the angles of cached keys depend on the length: such a run stays
    within the `limits` up to which they do not.
    """
    tokens = window.tokens[: min(_CACHED_TOKENS, *limits) if limits else _CACHED_TOKENS]
    half = max(len(tokens) // 2, 1)
    single = tokens[half : half + min(_SINGLE_TOKENS, max(len(tokens) - half - 1, 1))]
    rest = tokens[half + len(single) :]
    return Run((tokens[:half], *((token,) for token in single), *((rest,) if rest else ())), 0)
