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
    from llm_edge.runtime.bundle import Bundle as Bundle
    from llm_edge.runtime.bundle import Guards as Guards
    from llm_edge.runtime.bundle import ReasoningTokens as ReasoningTokens
    from llm_edge.runtime.generate import FinishReason as FinishReason
    from llm_edge.runtime.generate import Generation as Generation
    from llm_edge.runtime.generate import Model as Model
    from llm_edge.runtime.generate import Piece as Piece
    from llm_edge.runtime.generate import Result as Result
    from llm_edge.runtime.generate import Timings as Timings
    from llm_edge.runtime.sampler import LogitsProcessor as LogitsProcessor
    from llm_edge.runtime.sampler import SamplingParams as SamplingParams

_HOME = {
    "Bundle": "bundle",
    "FinishReason": "generate",
    "Generation": "generate",
    "Guards": "bundle",
    "LogitsProcessor": "sampler",
    "Model": "generate",
    "Piece": "generate",
    "ReasoningTokens": "bundle",
    "Result": "generate",
    "SamplingParams": "sampler",
    "Timings": "generate",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
