"""Records the logits of the reference decoder in a file, so that it and an exported model are never in memory together.

The decoder runs layer by layer over the whole text: memory holds one layer, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.progress import ItemProgress
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.windows import Run, cached_run, scoring_runs
from llm_edge.model.config import ModelConfig

_LAYERS_FRACTION = 0.8  # of the time; the rest is the head


@dataclass(frozen=True, slots=True)
class ReferenceLogits:
    """Recorded logits of the reference on the validation text.

    Attributes:
        path: file of the logits, float32 [positions, V].
        vocab_size: V.
        windows: a run for each window of the text.
        kinds: kind of text of each window.
        cached: a run over the begin of the first window in several steps.
        targets: the token after each position, int64 [positions]; -1 at the end of a window.
        top: the most likely token after each position, int64 [positions].
        hidden_states: hidden states of the first window, [tokens, hidden].
    """

    path: Path
    vocab_size: int
    windows: tuple[Run, ...]
    kinds: tuple[str, ...]
    cached: Run
    targets: Tensor
    top: Tensor
    hidden_states: Tensor

    @property
    def prompt(self) -> Run:
        """The first step of the first window."""
        return Run(self.windows[0].chunks[:1], self.windows[0].offset)

    def logits(self, offset: int, count: int) -> Tensor:
        """Return the logits of `count` positions from `offset` on, [count, V]."""
        offset_bytes = 4 * offset * self.vocab_size
        flat = np.fromfile(self.path, dtype="<f4", count=count * self.vocab_size, offset=offset_bytes)
        return torch.from_numpy(flat).view(count, self.vocab_size)


def record_reference(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    windows: Sequence[Window],
    path: Path,
    progress: ItemProgress = lambda *_: None,
) -> ReferenceLogits:
    """Run the reference on the windows of a text, and record its logits in a file."""
    reference = LayerwiseDecoder(config, weights)
    states = reference.run(
        [window.tokens for window in windows], lambda done, item: progress(_LAYERS_FRACTION * done, item)
    )
    runs = scoring_runs(windows, config.vocab_size)
    top = []
    with path.open("wb") as file:
        for number, (run, state) in enumerate(zip(runs, states, strict=True)):
            progress(_LAYERS_FRACTION + (1 - _LAYERS_FRACTION) * number / len(runs), "head")
            for part in torch.split(state, len(run.chunks[0])):
                logits = reference.logits(part)
                top.append(logits.argmax(-1))
                logits.numpy().astype("<f4", copy=False).tofile(file)
    targets = [token for window in windows for token in (*window.tokens[1:], -1)]
    return ReferenceLogits(
        path,
        config.vocab_size,
        runs,
        tuple(window.kind for window in windows),
        cached_run(windows[0], [rope.long_from for rope in config.ropes if rope.long_from]),
        torch.tensor(targets),
        torch.cat(top),
        reference.hidden_states(states[0]),
    )


def reference_logits(config: ModelConfig, weights: Mapping[str, Tensor], tokens: Sequence[int]) -> Tensor:
    """Return the logits [tokens, V] of a few tokens, computed in one step."""
    reference = LayerwiseDecoder(config, weights)
    (state,) = reference.run([tokens])
    return reference.logits(state)
