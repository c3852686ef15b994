"""`Session`: one conversation's KV cache over a loaded graph; token ids in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.backend.graph import ATTENTION_MASK, HIDDEN_STATES, NUM_HIDDEN_STATES, Graph
from llm_edge.runtime.backend.kv_cache import GrowingCache, KVCache, SharedCache
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
from llm_edge.runtime.backend.step_runner import StepRunner
from llm_edge.runtime.errors import BundleError, ContextLengthError, MachineError, ParameterError, one_line
from llm_edge.runtime.process import ProcessBound

Logits = npt.NDArray[np.float32]
HiddenStates = npt.NDArray[np.float32]


class Session(ProcessBound):
    """One conversation's cache over a graph.

    Attributes:
        graph: what it runs.
        shape: dimensions of the model.
        length: number of tokens in the cache.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.shape = graph.shape
        self.length = 0
        self._steps = StepRunner(graph)
        self._cache: KVCache = (SharedCache if graph.file.share_buffer else GrowingCache)(graph)
        self._binding = graph.inference.io_binding()
        # Small inputs live in these arrays. A GPU gets a copy when one is bound: whatever changes is bound again.
        self._ids = np.zeros(MAX_STEP_TOKENS, dtype=np.int64)
        self._mask = np.ones(graph.limit, dtype=np.int64)
        self._keep = np.zeros((), dtype=np.int64)
        self._keep_hidden = np.zeros((), dtype=np.int64)
        self._logits: Logits = np.zeros((1, self.shape.vocab_size), dtype=np.float32)
        self._bound: tuple[int, int] = (-1, -1)  # new tokens, logits
        self._output = ""  # the output that steps currently return

    @property
    def provider(self) -> str:
        """`cpu` or `cuda`."""
        return self.graph.provider

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime so far."""
        return self._steps.run_seconds

    def cancel_steps_if(self, unwanted: Callable[[], bool]) -> None:
        """Terminate the steps from here on whose result is no longer wanted; `unwanted` is called from any thread."""
        self._steps.unwanted = unwanted

    @property
    def limit(self) -> int:
        """Maximum number of tokens in the context."""
        return self.graph.limit

    def step(self, tokens: Sequence[int] | npt.NDArray[np.int64], num_logits: int = 1) -> Logits:
        """Run new tokens after the cached ones and add them to the cache.

        Args:
            tokens: 1 to `MAX_STEP_TOKENS` token ids.
            num_logits: return the logits of the last n of them; 0 = all.

        Returns:
            logits [n, V]. The next step with the same n overwrites this array.

        Raises:
            ParameterError: too few or too many tokens, or logits of more positions than there are.
            ContextLengthError: they exceed the context.
            StepTerminatedError, MachineError: the step was terminated, which leaves the cache unchanged, or failed.
        """
        new = len(tokens)
        check_step(new, self.length, num_logits, self.limit)
        self._select_output("logits")
        rows = num_logits or new
        if self._bound != (new, rows):
            self._keep[...] = num_logits
            if rows != len(self._logits):
                self._logits = np.zeros((rows, self.shape.vocab_size), dtype=np.float32)
            self._bind_input("num_logits_to_keep", self._keep, [])
            self._bind_output("logits", self._logits)
            self._bound = (new, rows)
        self._run(tokens)
        return self._logits

    def hidden_states(self, tokens: Sequence[int] | npt.NDArray[np.int64], num_states: int = 0) -> HiddenStates:
        """Run new tokens like `step`, but return the output of the last norm: transformers' `last_hidden_state`.

        Returns:
            hidden states [n, H] of the last `num_states` tokens; 0 = all.

        Raises:
            BundleError: the graph was exported without hidden states.
            ParameterError, ContextLengthError: as in `step`.
        """
        width = self.graph.file.hidden_size
        if width is None:
            raise BundleError("the graph has no hidden states: export it again with llm-export --hidden-states")
        new = len(tokens)
        check_step(new, self.length, num_states, self.limit)
        self._select_output(HIDDEN_STATES)
        self._keep_hidden[...] = num_states
        self._bind_input(NUM_HIDDEN_STATES, self._keep_hidden, [])
        states: HiddenStates = np.empty((num_states or new, width), dtype=np.float32)
        self._bind_output(HIDDEN_STATES, states)
        self._run(tokens)
        return states

    @property
    def rewinds_in_place(self) -> bool:
        """Whether `rewind` costs nothing."""
        return isinstance(self._cache, SharedCache)

    def rewind(self, length: int) -> int:
        """Keep only the first `length` tokens in the cache; buffers stay allocated.

        Returns:
            how many were kept: fewer if the model has states and those at this length are not known any more. They are
            for lengths that `keep_states` marked, and for those before and after the last step.
        """
        self.length = self._cache.rewind(length)
        return self.length

    def keep_states(self) -> None:
        """Mark the current length as one that `rewind` can return to."""
        self._cache.keep_states(self.length)

    def clear_cache(self) -> None:
        """Remove all tokens from the cache; buffers stay allocated."""
        self.rewind(0)

    def _select_output(self, output: str) -> None:
        """Bind for steps that return this output; the other one is computed anyway, so for one position only."""
        if self._output == output:
            return
        self._binding.clear_binding_outputs()
        self._cache.outputs_cleared()
        self._bound = (-1, -1)
        self._keep[...] = self._keep_hidden[...] = 1
        self._bind_input("num_logits_to_keep", self._keep, [])
        if self.graph.has_hidden_states:
            self._bind_input(NUM_HIDDEN_STATES, self._keep_hidden, [])
        self._output = output

    def _run(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Run a step; everything but tokens and cache is bound already."""
        self.check_process()
        new, past = len(tokens), self.length
        self._ids[:new] = tokens
        self._bind_input("input_ids", self._ids, [1, new])
        if self.graph.reads_mask:
            self._bind_input(ATTENTION_MASK, self._mask, [1, past + new])
        try:
            self._cache.bind(self._binding, past, new)
        except MemoryError as error:
            raise MachineError(f"not enough memory for the cache of {past + new} tokens") from error
        except Exception as error:
            raise MachineError(f"the cache of {past + new} tokens failed ({one_line(error)})") from error
        self._steps.run(self._binding, f"a step over {new} tokens after {past}")
        self.graph.release_weights(new)
        self._cache.advance(self._binding, past + new)
        self.length = past + new

    def _bind_input(self, name: str, array: npt.NDArray[Any], shape: list[int]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _bind_output(self, name: str, array: npt.NDArray[np.float32]) -> None:
        self._binding.bind_output(name, "cpu", 0, np.float32, [1, *array.shape], array.ctypes.data)


def check_step(new: int, past: int, num_logits: int, limit: int) -> None:
    """Raise the errors of `Session.step` for a step over `new` tokens after `past`."""
    if not 1 <= new <= MAX_STEP_TOKENS:
        raise ParameterError(f"a step takes 1 to {MAX_STEP_TOKENS} tokens, not {new}")
    if not 0 <= num_logits <= new:
        raise ParameterError(f"num_logits is {num_logits}; a step over {new} tokens has 0 (all) to {new}")
    if past + new > limit:
        raise ContextLengthError(past + new, limit)
