"""Compares the reference decoder with transformers' own model of the same checkpoint.

The other comparisons start from the weights that were read; this one finds weights that were read wrongly. It runs if
transformers is installed and knows the architecture. transformers reads the files again, without running any code from
them, and its model is in memory after the reference has been released. Of a model whose weights take more than
`MAX_BYTES` in float32, the first layers are compared, with the real embedding and head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint, OriginalModel
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.compare import Difference
from llm_edge.exporter.validation.reference import ReferenceLogits, record_reference
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import count_parameters
from llm_edge.runtime.errors import ParityError

MAX_BOUND, MEAN_BOUND = 1e-2, 1e-3
"""Bounds of the largest and the mean difference of logits, as fractions of the standard deviation of all logits.

Rounding in float32 stays below a hundredth of them; a wrong tensor exceeds them by far.
"""
MAX_BYTES = 1_600_000_000
"""Of the weights that transformers holds in memory."""
_ROWS = 64  # of logits compared at once
_PROMPT_TOKENS = (None, 64, 64)  # of each prompt; None is a whole window of the validation text
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_LAYER_NUMBER = re.compile(r"\.(\d{1,6})\.")
_MAX_REASON = 200


@dataclass(frozen=True, slots=True)
class IndependentCheck:
    """Result of the comparison with transformers.

    Attributes:
        version: version of transformers; None if it was not compared.
        layers: number of compared layers, from the first on.
        tokens: number of compared positions in all prompts.
        difference: absolute difference of logits as a fraction of their standard deviation; None if not compared.
        reason: why it was not compared; None if it was.
    """

    version: str | None = None
    layers: int = 0
    tokens: int = 0
    difference: Difference | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as stored in the manifest."""
        if self.difference is None:
            return {"compared": False, "reason": self.reason}
        return {
            "compared": True,
            "library": f"transformers {self.version}",
            "layers": self.layers,
            "tokens": self.tokens,
            "max": float(f"{self.difference.max:.3g}"),
            "mean": float(f"{self.difference.mean:.3g}"),
        }


class _NotComparedError(Exception):
    """The comparison is impossible, with the reason."""


def compare_with_transformers(
    checkpoint: Checkpoint, expected: ReferenceLogits, max_bytes: float = MAX_BYTES
) -> IndependentCheck:
    """Compare recorded logits of the reference with those of transformers' model on a few prompts.

    Whatever transformers raises only means that there is no comparison.

    Args:
        checkpoint: what was recorded.
        expected: logits of the reference.
        max_bytes: see `MAX_BYTES`.

    Raises:
        ParityError: transformers computes other logits.
    """
    original = checkpoint.original
    if original is None:
        return IndependentCheck(reason="the source is not a Hugging Face checkpoint")
    if importlib.util.find_spec("transformers") is None:
        return IndependentCheck(reason="transformers is not installed")
    layers = _comparable_layers(checkpoint.config, max_bytes)
    if layers < checkpoint.config.num_hidden_layers and original.adapter is not None:
        return IndependentCheck(reason="only the first layers fit into memory, and an adapter is merged")
    try:
        with _silence():
            transformers = importlib.import_module("transformers")
            with silence_transformers(transformers):
                model = _load(transformers, original, layers)
                with _first_layers(checkpoint, expected, layers) as recorded:
                    difference, tokens = _compare(model, recorded)
    except _NotComparedError as error:
        return IndependentCheck(reason=str(error))
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 (native libraries also raise exceptions outside of Exception)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if original.folder is not None:  # a manifest has no paths
            reason = reason.replace(str(original.folder), original.folder.name)
        reason = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…"
        return IndependentCheck(reason=f"transformers cannot load it ({reason})")
    version = str(transformers.__version__)
    if not (difference.max <= MAX_BOUND and difference.mean <= MEAN_BOUND):  # also for NaN
        raise ParityError(
            f"transformers {version} computes other logits from the same checkpoint: they differ by up to "
            f"{difference.max:.2g} of their standard deviation, the bound is {MAX_BOUND:g}. Nothing was written"
        )
    return IndependentCheck(version, layers, tokens, difference)


def _comparable_layers(config: ModelConfig, max_bytes: float) -> int:
    """Return the number of layers, at least one, whose weights with embedding and head have at most this size."""
    one, two = (4.0 * count_parameters(_truncated(config, layers)) for layers in (1, 2))
    more = int((max_bytes - one) / (two - one)) if max_bytes > one and two > one else 0
    return min(1 + more, config.num_hidden_layers)


def _truncated(config: ModelConfig, layers: int) -> ModelConfig:
    return dataclasses.replace(config, layers=config.layers[:layers])


@contextlib.contextmanager
def _first_layers(checkpoint: Checkpoint, expected: ReferenceLogits, layers: int) -> Iterator[ReferenceLogits]:
    """Give the recorded logits, or those of a model of the first layers, for the compared prompts only."""
    if layers == checkpoint.config.num_hidden_layers:
        yield expected
        return
    path = expected.path.with_name(f"{expected.path.name}-{layers}")
    windows = [Window(run.tokens[:limit]) for run, limit in zip(expected.windows, _PROMPT_TOKENS, strict=False)]
    try:
        yield record_reference(_truncated(checkpoint.config, layers), checkpoint.weights, windows, path)
    finally:
        path.unlink(missing_ok=True)


def _load(transformers: ModuleType, original: OriginalModel, layers: int) -> Any:
    """Return transformers' model in float32, limited to the first layers."""
    model_type = str(original.config.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        raise _NotComparedError(f"transformers {transformers.__version__} does not know model_type {model_type!r}")
    config = transformers.CONFIG_MAPPING[model_type].from_dict(dict(original.config))
    total = config.num_hidden_layers
    if layers < total:
        _truncate(config, layers, total)
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in classes:
        raise _NotComparedError(f"transformers {transformers.__version__} has no causal model of {model_type!r}")
    model = None
    if original.folder is not None:
        model = from_pretrained(transformers, classes[type(config)], config, original.folder, None)
    if model is None:  # the tensors have names of a wrapper or are in another file: pass them with the model's names
        names = [name for name in original.names if max(map(int, _LAYER_NUMBER.findall(name)), default=0) < layers]
        tensors = {name: original.load(name) for name in names}
        model = from_pretrained(transformers, classes[type(config)], config, None, tensors)
    if model is None:
        raise _NotComparedError("transformers does not find all tensors")
    return _merge_adapter(model, original).eval()


def from_pretrained(
    transformers: ModuleType, model_class: Any, config: Any, folder: Path | None, tensors: dict[str, Tensor] | None
) -> Any:
    """Return transformers' model from a folder or from tensors, or None if it lacks some."""
    model, info = model_class.from_pretrained(
        folder,
        state_dict=tensors,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        generation_config=transformers.GenerationConfig(),
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        output_loading_info=True,
    )
    return None if info["missing_keys"] else model


def _truncate(config: Any, layers: int, total: int) -> None:
    """Limit a transformers config to its first layers, including lists with an entry per layer."""
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total and name != "architectures":
            setattr(config, name, value[:layers])
    for name in _LAYER_COUNTS:
        if hasattr(config, name):
            setattr(config, name, layers)


def _merge_adapter(model: Any, original: OriginalModel) -> Any:
    if original.adapter is None:
        return model
    if importlib.util.find_spec("peft") is None:
        raise _NotComparedError("an adapter is merged, and peft is not installed")
    peft = importlib.import_module("peft")
    return peft.PeftModel.from_pretrained(model, original.adapter, local_files_only=True)


@torch.inference_mode()
def _compare(model: Any, expected: ReferenceLogits) -> tuple[Difference, int]:
    """Return the difference relative to the standard deviation of the logits, and the number of compared positions."""
    largest, total, squares, tokens = 0.0, 0.0, 0.0, 0
    for run, limit in zip(expected.windows, _PROMPT_TOKENS, strict=False):
        ids = torch.tensor([run.tokens[:limit]])
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()  # [T, V]
        if logits.shape[-1] != expected.vocab_size:
            raise _NotComparedError(f"its vocabulary has {logits.shape[-1]} tokens instead of {expected.vocab_size}")
        for start in range(0, len(logits), _ROWS):
            part = logits[start : start + _ROWS]
            reference = expected.logits(run.offset + start, len(part))
            if not reference.isfinite().all():
                raise _NotComparedError("logits are NaN or infinity")
            difference = (part - reference).abs()
            largest = max(largest, difference.max().item()) if not difference.isnan().any() else float("nan")
            total += difference.mean(-1).sum().item()
            squares += reference.var(-1, correction=0).sum().item()
        tokens += len(logits)
    scale = max((squares / tokens) ** 0.5, 1e-30)
    return Difference(largest / scale, total / tokens / scale), tokens


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard warnings and what is printed."""
    discarded = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(discarded),
        contextlib.redirect_stderr(discarded),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def silence_transformers(transformers: ModuleType) -> Iterator[None]:
    """Turn off transformers' log, warnings and progress bars."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL + 1)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
