"""`TorchScriptSession`: the interface of `Session` over a TorchScript module.

torch is imported when a session is created, and nowhere else in the runtime. A TorchScript file is a program of torch
operators, so `check_program` inspects it before torch loads it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.providers import check_provider, check_threads
from llm_edge.runtime.backend.session import Logits, check_step
from llm_edge.runtime.backend.torchscript_check import check_program
from llm_edge.runtime.backend.watchdog import check_step_seconds
from llm_edge.runtime.errors import BundleError, InputError, MachineError, ProviderError, one_line
from llm_edge.runtime.process import ProcessBound

_NO_MEMORY = ("not enough memory", "out of memory", "alloc")


class TorchScriptSession(ProcessBound):
    """One conversation's cache over a TorchScript module; attributes as in `Session`.

    Raises:
        InputError: torch is not installed.
        BundleError: the file does not load, or is not a decoder with the dimensions in the manifest.
        ProviderError: CUDA was requested and is not available.
    """

    def __init__(self, file: GraphFile, execution: ExecutionOptions) -> None:
        super().__init__()
        check_provider(execution.provider)
        check_threads(execution.threads)
        check_step_seconds(execution.step_seconds)
        path, shape = file.path, file.shape
        try:
            import torch
        except ImportError as error:
            raise InputError(f"{path}: a TorchScript bundle needs torch: pip install torch") from error
        self._torch: Any = torch
        self.shape = shape
        self.provider = self._resolve_provider(execution.provider)
        self.length = 0
        self.run_seconds = 0.0
        check_program(path)
        if execution.threads is not None:
            torch.set_num_threads(execution.threads)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit.load` is (deprecated|not supported)", DeprecationWarning)
                self._module = self._torch.jit.load(path, map_location=self.provider).eval()
        except Exception as error:
            if _is_memory(error):
                raise MachineError(f"{path}: not enough memory to load it") from error
            raise BundleError(f"{path}: torch cannot load it ({one_line(error)}): export the bundle again") from error
        heads, _, width = shape.caches[0].sized(0)  # of all layers
        empty = torch.zeros(1, heads, 0, width, device=self.provider)
        self._empty = [(empty, empty) for _ in range(shape.num_hidden_layers)]
        self._past = self._empty
        self._check(path)

    @property
    def limit(self) -> int:
        """Maximum number of tokens in the context."""
        return self.shape.max_position_embeddings

    def step(self, tokens: Sequence[int] | npt.NDArray[np.int64], num_logits: int = 1) -> Logits:
        """Run new tokens after the cached ones and add them to the cache; see `Session.step`."""
        self.check_process()
        new, past = len(tokens), self.length
        check_step(new, past, num_logits, self.limit)
        ids = self._torch.tensor([[*tokens]], dtype=self._torch.int64, device=self.provider)
        began = time.perf_counter()
        try:
            logits, presents = self._run(ids, num_logits)
        except Exception as error:
            if _is_memory(error):
                raise MachineError(f"not enough memory for a step over {new} tokens after {past}") from error
            raise MachineError(f"a step over {new} tokens after {past} failed ({one_line(error)})") from error
        self.run_seconds += time.perf_counter() - began
        self._past, self.length = presents, past + new
        return logits

    rewinds_in_place = False

    def cancel_steps_if(self, unwanted: Callable[[], bool]) -> None:
        """Nothing: torch cannot terminate a step."""

    def rewind(self, length: int) -> int:
        """Keep only the first `length` tokens in the cache; returns how many."""
        parts = [(key[:, :, :length], value[:, :, :length]) for key, value in self._past]
        self._past, self.length = parts if length else self._empty, length
        return length

    def keep_states(self) -> None:
        """Nothing: such bundles have no states."""

    def clear_cache(self) -> None:
        """Remove all tokens from the cache."""
        self.rewind(0)

    def _run(self, ids: Any, num_logits: int) -> tuple[Logits, Any]:
        """Logits [n, V] of ids [1, S] and the present keys and values."""
        torch = self._torch
        mask = torch.ones(1, self.length + ids.shape[1], dtype=torch.int64, device=self.provider)
        # Every step has other shapes, so compiling for one would not pay. It is no slower on CPUs.
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            logits, presents = self._module(ids, mask, self._past, num_logits)
            found: Logits = logits[0].to("cpu", torch.float32).numpy()
        return found, presents

    def _check(self, path: Path) -> None:
        """Run one token and compare the shapes of the outputs with the manifest."""
        problem = "it is not a decoder with the dimensions in the manifest: export the bundle again"
        try:
            logits, presents = self._run(self._torch.zeros(1, 1, dtype=self._torch.int64, device=self.provider), 1)
            found = {tuple(part.shape) for present in presents for part in present}
        except Exception as error:
            if _is_memory(error):
                raise MachineError(f"{path}: not enough memory to run it") from error
            raise BundleError(f"{path}: {problem} ({one_line(error)})") from error
        shape = self.shape
        if logits.shape != (1, shape.vocab_size) or found != {(1, *tensor.sized(1)) for tensor in shape.caches}:
            raise BundleError(f"{path}: {problem}")

    def _resolve_provider(self, provider: str) -> str:
        available = self._torch.cuda.is_available()
        if provider == "cuda" and not available:
            raise ProviderError("provider cuda: this torch has no CUDA; use provider='cpu' or 'auto'")
        if provider == "auto":
            return "cuda" if available else "cpu"
        return provider


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _NO_MEMORY)
