"""The runtime: loads a bundle and generates text. It needs neither torch nor onnx.

    from llm_edge.runtime import Model, SamplingParams
    model = Model.load("artifacts/smollm2-135m", precision="int8")
    for chunk in model.chat([{"role": "user", "content": "Hi"}], SamplingParams(temperature=0.7, seed=1)):
        print(chunk.text, end="")

Names are imported on first use, so that commands can parse their arguments before heavy modules load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_edge.runtime.bundle import Bundle as Bundle
    from llm_edge.runtime.bundle import Guards as Guards
    from llm_edge.runtime.bundle import ReasoningTags as ReasoningTags
    from llm_edge.runtime.bundle import ReasoningTokens as ReasoningTokens
    from llm_edge.runtime.engine import Engine as Engine
    from llm_edge.runtime.errors import BusyError as BusyError
    from llm_edge.runtime.errors import ContextLengthError as ContextLengthError
    from llm_edge.runtime.generation import AsyncGeneration as AsyncGeneration
    from llm_edge.runtime.generation import Generation as Generation
    from llm_edge.runtime.model import Model as Model
    from llm_edge.runtime.results import FinishReason as FinishReason
    from llm_edge.runtime.results import GenerationChunk as GenerationChunk
    from llm_edge.runtime.results import GenerationResult as GenerationResult
    from llm_edge.runtime.results import Timings as Timings
    from llm_edge.runtime.sampling.constraint import Constraint as Constraint
    from llm_edge.runtime.sampling.logprobs import TokenLogprob as TokenLogprob
    from llm_edge.runtime.sampling.params import SamplingParams as SamplingParams
    from llm_edge.runtime.sampling.presets import PRESETS as PRESETS
    from llm_edge.runtime.sampling.presets import apply_preset as apply_preset
    from llm_edge.runtime.sampling.sampler import LogitsProcessor as LogitsProcessor
    from llm_edge.runtime.scheduling.counters import Counters as Counters
    from llm_edge.runtime.score import Score as Score

_NAMES = {
    "bundle": ("Bundle", "Guards", "ReasoningTags", "ReasoningTokens"),
    "engine": ("Engine",),
    "errors": ("BusyError", "ContextLengthError"),
    "generation": ("AsyncGeneration", "Generation"),
    "model": ("Model",),
    "results": ("FinishReason", "GenerationChunk", "GenerationResult", "Timings"),
    "sampling.constraint": ("Constraint",),
    "sampling.logprobs": ("TokenLogprob",),
    "sampling.params": ("SamplingParams",),
    "sampling.presets": ("PRESETS", "apply_preset"),
    "sampling.sampler": ("LogitsProcessor",),
    "scheduling.counters": ("Counters",),
    "score": ("Score",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
