"""A TorchScript file at work: `Session`'s door, torch behind it. Knows nothing of text or sampling.

torch is imported when a session is made, and nowhere else in the runtime. A TorchScript file is a program of torch's
operators: it is read by `check_program` before torch loads it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.backend.session import Logits, check_provider, check_step, check_threads, one_line
from llm_edge.runtime.backend.torchscript_check import check_program
from llm_edge.runtime.bundle import ModelShape
from llm_edge.runtime.errors import BundleError, InputError, MachineError, ProviderError

_NO_MEMORY = ("not enough memory", "out of memory", "alloc")


class TorchScriptSession:
    """One conversation's cache over one TorchScript module.

    Args:
        path: the `.pt` file.
        shape: what the module must look like.
        provider: `cpu`, `cuda`, or `auto`: CUDA where this torch has it, else the CPU.
        threads: of torch inside an operator, for the whole process; None leaves it as it is.

    Attributes:
        length: tokens in the cache.
        run_seconds: time spent inside torch so far.

    Raises:
        InputError: torch is not installed.
        BundleError: the file does not load, or is no decoder of the shape the manifest says.
        ProviderError: CUDA was asked for and is not there.
    """

    def __init__(self, path: Path, shape: ModelShape, provider: str = "auto", threads: int | None = None) -> None:
        check_provider(provider)
        check_threads(threads)
        try:
            import torch
        except ImportError as error:
            raise InputError(f"{path}: a TorchScript bundle needs torch: pip install torch") from error
        self._torch: Any = torch
        self.shape = shape
        self.provider = self._choose_provider(provider)
        self.length = 0
        self.run_seconds = 0.0
        check_program(path)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", r"`torch\.jit\.load` is (deprecated|not supported)", DeprecationWarning
                )
                self._module = self._torch.jit.load(path, map_location=self.provider).eval()
        except Exception as error:
            if _is_memory(error):
                raise MachineError(f"{path}: not enough memory to load it") from error
            raise BundleError(f"{path}: torch cannot load it ({one_line(error)}): export the bundle again") from error
        empty = torch.zeros(1, shape.num_key_value_heads, 0, shape.head_dim, device=self.provider)
        self._empty = [(empty, empty) for _ in range(shape.num_hidden_layers)]
        self._past = self._empty
        self._check(path)

    @property
    def limit(self) -> int:
        """Tokens the context holds at most."""
        return self.shape.max_position_embeddings

    def step(self, tokens: Sequence[int] | npt.NDArray[np.int64], num_logits: int = 1) -> Logits:
        """Run new tokens over the cache and keep theirs in it; see `Session.step`."""
        new, past = len(tokens), self.length
        check_step(new, past, num_logits, self.limit)
        ids = self._torch.tensor([[*tokens]], dtype=self._torch.int64, device=self.provider)
        began = time.perf_counter()
        try:
            logits, presents = self._run(ids, num_logits)
        except Exception as error:
            if _is_memory(error):
                raise MachineError(f"not enough memory for a step over {new} tokens behind {past}") from error
            raise MachineError(f"a step over {new} tokens behind {past} failed ({one_line(error)})") from error
        self.run_seconds += time.perf_counter() - began
        self._past, self.length = presents, past + new
        return logits

    rewinds = False
    """See `Session.rewinds`."""

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first ones."""
        parts = [(key[:, :, :length], value[:, :, :length]) for key, value in self._past]
        self._past, self.length = parts if length else self._empty, length

    def reset(self) -> None:
        """Forget the conversation."""
        self.rewind(0)

    def _run(self, ids: Any, num_logits: int) -> tuple[Logits, Any]:
        """Logits [n, V] of ids [1, S] and the present keys and values."""
        torch = self._torch
        mask = torch.ones(1, self.length + ids.shape[1], dtype=torch.int64, device=self.provider)
        # Unoptimized: every step has shapes of its own, which no compiler shall specialize on. It is no slower on CPUs.
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            logits, presents = self._module(ids, mask, self._past, num_logits)
            found: Logits = logits[0].to("cpu", torch.float32).numpy()
        return found, presents

    def _check(self, path: Path) -> None:
        """One token must give what the manifest promises."""
        wanted = "it is no decoder of the shape the manifest says: export the bundle again"
        try:
            logits, presents = self._run(self._torch.zeros(1, 1, dtype=self._torch.int64, device=self.provider), 1)
            found = {tuple(part.shape) for present in presents for part in present}
        except Exception as error:
            if _is_memory(error):
                raise MachineError(f"{path}: not enough memory to run it") from error
            raise BundleError(f"{path}: {wanted} ({one_line(error)})") from error
        shape = self.shape
        if logits.shape != (1, shape.vocab_size) or found != {(1, shape.num_key_value_heads, 1, shape.head_dim)}:
            raise BundleError(f"{path}: {wanted}")

    def _choose_provider(self, provider: str) -> str:
        available = self._torch.cuda.is_available()
        if provider == "cuda" and not available:
            raise ProviderError("provider cuda: this torch has no CUDA here; use provider='cpu' or 'auto'")
        if provider == "auto":
            return "cuda" if available else "cpu"
        return provider


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _NO_MEMORY)
