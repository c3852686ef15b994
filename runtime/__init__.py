"""The runtime: a bundle folder in, text out. Knows neither torch nor onnx nor how bundles are made.

    from llm_edge.runtime import Model, SamplingParams
    model = Model.load("artifacts/smollm2-135m", precision="int8")
    for piece in model.chat([{"role": "user", "content": "Hi"}], SamplingParams(temperature=0.7, seed=1)):
        print(piece.text, end="")

Names are imported when they are first used, so that commands can parse their arguments before anything heavy loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_edge.runtime.answer import FinishReason as FinishReason
    from llm_edge.runtime.answer import Piece as Piece
    from llm_edge.runtime.answer import Result as Result
    from llm_edge.runtime.answer import Timings as Timings
    from llm_edge.runtime.bundle import Bundle as Bundle
    from llm_edge.runtime.bundle import Guards as Guards
    from llm_edge.runtime.bundle import ReasoningTags as ReasoningTags
    from llm_edge.runtime.bundle import ReasoningTokens as ReasoningTokens
    from llm_edge.runtime.constraint import Constraint as Constraint
    from llm_edge.runtime.counters import Counters as Counters
    from llm_edge.runtime.engine import Engine as Engine
    from llm_edge.runtime.errors import BusyError as BusyError
    from llm_edge.runtime.errors import ContextLengthError as ContextLengthError
    from llm_edge.runtime.generate import Generation as Generation
    from llm_edge.runtime.generate import Model as Model
    from llm_edge.runtime.handle import Answer as Answer
    from llm_edge.runtime.logprobs import TokenLogprob as TokenLogprob
    from llm_edge.runtime.presets import PRESETS as PRESETS
    from llm_edge.runtime.presets import apply_preset as apply_preset
    from llm_edge.runtime.sampler import LogitsProcessor as LogitsProcessor
    from llm_edge.runtime.sampling_params import SamplingParams as SamplingParams
    from llm_edge.runtime.score import Score as Score

_HOME = {
    "Answer": "handle",
    "Bundle": "bundle",
    "BusyError": "errors",
    "Constraint": "constraint",
    "ContextLengthError": "errors",
    "Counters": "counters",
    "Engine": "engine",
    "FinishReason": "answer",
    "Generation": "generate",
    "Guards": "bundle",
    "LogitsProcessor": "sampler",
    "Model": "generate",
    "PRESETS": "presets",
    "Piece": "answer",
    "ReasoningTags": "bundle",
    "ReasoningTokens": "bundle",
    "Result": "answer",
    "SamplingParams": "sampling_params",
    "Score": "score",
    "Timings": "answer",
    "TokenLogprob": "logprobs",
    "apply_preset": "presets",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
