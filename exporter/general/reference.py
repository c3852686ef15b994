"""Records the logits of transformers' own model in a file; see `exporter.validation.reference`.

The model's code is not changed in any way, so that what the general route replaces is compared with what it replaces.
A small model is also loaded by transformers; of a larger one, layers are loaded one after another; see `lockstep`.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from torch import Tensor

from llm_edge.exporter.general.checkpoint import GeneralCheckpoint
from llm_edge.exporter.general.functions import UnsupportedModelError
from llm_edge.exporter.general.lockstep import LayerwiseModel
from llm_edge.exporter.progress import ItemProgress
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.independent import from_pretrained, silence_transformers
from llm_edge.exporter.validation.reference import ReferenceLogits
from llm_edge.exporter.validation.windows import cached_run, scoring_runs
from llm_edge.runtime.errors import CheckpointError

MAX_BYTES = 4_000_000_000
"""Of the float32 weights of a model that is loaded as a whole."""
_BEYOND = 32  # tokens after the longest window
_WINDOW = re.compile(r"window(_size)?$|attention_chunk_size$")


@dataclass(frozen=True, slots=True)
class LongText:
    """A text that is longer than every window of a model's attention.

    Attributes:
        tokens: of the text.
        logits: of its last positions, [positions, V].
    """

    tokens: tuple[int, ...]
    logits: Tensor


def record_general_reference(
    checkpoint: GeneralCheckpoint,
    windows: Sequence[Window],
    path: Path,
    progress: ItemProgress,
    max_bytes: int = MAX_BYTES,
) -> tuple[ReferenceLogits, LongText | None]:
    """Run transformers' model on the windows of a text, and record its logits in a file.

    If the windows of its attention are longer than those of the text, it also runs on a longer text.

    Raises:
        CheckpointError: transformers cannot load the model.
    """
    long_tokens = _long_text(checkpoint, windows)
    by_layer = 4 * checkpoint.config.parameters > max_bytes
    with path.open("wb") as file, silence_transformers(transformers), torch.inference_mode():
        try:
            top, long_logits = _run(checkpoint, windows, long_tokens, file, progress, by_layer=by_layer)
        except UnsupportedModelError:  # layers are not run one after another
            file.seek(0)
            top, long_logits = _run(checkpoint, windows, long_tokens, file, progress, by_layer=False)
    gc.collect()
    targets = [token for window in windows for token in (*window.tokens[1:], -1)]
    recorded = ReferenceLogits(
        path,
        checkpoint.config.vocab_size,
        scoring_runs(windows, checkpoint.config.vocab_size),
        tuple(window.kind for window in windows),
        cached_run(windows[0]),
        torch.tensor(targets),
        torch.cat(top),
        torch.empty(0),
    )
    return recorded, None if long_logits is None else LongText(long_tokens, long_logits)


def _run(
    checkpoint: GeneralCheckpoint,
    windows: Sequence[Window],
    long_tokens: tuple[int, ...],
    file: BinaryIO,
    progress: ItemProgress,
    *,
    by_layer: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Write the logits of windows to a file; return the best tokens of each window, and the logits of the long text."""
    layerwise = LayerwiseModel(checkpoint, with_head=True) if by_layer else None
    model = load_reference(checkpoint) if layerwise is None else layerwise.model
    if long_tokens:
        with contextlib.suppress(ValueError):  # some have no other attention than "eager", which takes more memory
            model.set_attn_implementation("sdpa")
    keep = {"logits_to_keep": _BEYOND} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    top, last = [], []

    def record(tokens: Sequence[int]) -> None:
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        top.append(logits.argmax(-1))
        logits.float().numpy().astype("<f4", copy=False).tofile(file)

    def record_long_text() -> None:
        logits: Tensor = model(input_ids=torch.tensor([long_tokens]), use_cache=False, **keep).logits
        last.append(logits[0, -_BEYOND:].float())

    calls: list[Callable[[], None]] = [partial(record, window.tokens) for window in windows]
    if long_tokens:
        calls.append(record_long_text)
    if layerwise is None:
        for number, call in enumerate(calls):
            progress(number / len(calls), f"window {number + 1}")
            call()
    else:
        for number, (_, _, run) in enumerate(layerwise.run(calls)):
            progress(number / len(layerwise.layers), f"layer {number + 1}")
            run()
    return top, last[0] if last else None


def longest_window(content: Mapping[str, Any]) -> int:
    """Return the largest window of attention that a config names; 0 if there is none."""
    return max((value for name, value in content.items() if _WINDOW.search(name) and type(value) is int), default=0)


def _long_text(checkpoint: GeneralCheckpoint, windows: Sequence[Window]) -> tuple[int, ...]:
    """Return a text that is longer than every window, if those of the text are not and the context has room."""
    length = longest_window(checkpoint.config.config.to_dict()) + _BEYOND
    if max(len(each.tokens) for each in windows) >= length or length > checkpoint.config.max_position_embeddings:
        return ()
    text = tuple(token for each in windows for token in each.tokens)
    return (text * (length // len(text) + 1))[:length]


def load_reference(checkpoint: GeneralCheckpoint) -> Any:
    """Return the model as transformers loads it, in float32."""
    original = checkpoint.original
    assert original is not None
    config = checkpoint.config.config
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tensors = None if original.folder is not None else {name: original.load(name) for name in original.names}
    try:
        model = from_pretrained(transformers, model_class, config, original.folder, tensors)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"transformers cannot load the model ({reason})") from error
    if model is None:
        raise CheckpointError("transformers does not find all tensors of the model")
    return model.eval()
