"""`Batch`: the KV caches of several sequences over one graph, and steps over some of them.

A slot is the cache of one sequence. A decode step (one token each) covers adjacent slots of any lengths; a step over
several tokens covers one slot, as onnxruntime's GroupQueryAttention does on CPUs. On the host only address space is
reserved for the largest context: memory is taken page by page as tokens arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from llm_edge.runtime.backend.graph import NUM_HIDDEN_STATES, Graph
from llm_edge.runtime.backend.session import Logits, check_step
from llm_edge.runtime.backend.step_runner import StepRunner
from llm_edge.runtime.process import ProcessBound
from llm_edge.runtime.scheduling.slot_memory import Array, DeviceSlots, HostSlots, SlotMemory

_RESERVED_BYTES = 2**36  # initial address space; slots double in size from there
_MIN_CAPACITY = 256  # initial capacity of a slot in tokens
_MAX_BINDINGS = 64  # cached
_PATIENCE = 1.0  # seconds before a step is terminated for a cancelled sequence: the others in it would repeat it


class Batch(ProcessBound):
    """Slots for the keys and values of several sequences over a fused graph.

    Attributes:
        slots: number of sequences.
        device: `cpu` or `cuda`, where the slots are.
        dtype: type of keys and values.
        limit: maximum number of tokens in a slot.
        lengths: number of tokens in each slot; may be lowered, which drops the last ones.
    """

    def __init__(self, graph: Graph, slots: int) -> None:
        super().__init__()
        self._graph = graph
        self.slots = slots
        self.device = graph.cache_device
        self.dtype = graph.cache_dtype
        self.limit = graph.limit
        self.lengths = [0] * slots
        self._steps = StepRunner(graph, _PATIENCE)
        self._bindings: dict[tuple[int, int], Any] = {}
        self._keep = np.zeros((), dtype=np.int64)
        self._logits: Logits = np.empty((0, graph.shape.vocab_size), dtype=np.float32)
        self._one = np.ones((), dtype=np.int64)
        self._ones = np.ones((1, self.limit), dtype=np.int64)
        affordable = _RESERVED_BYTES // (self.token_bytes * slots) if self.device == "cpu" else 0
        self._memory = self._reserve(min(self.limit, max(1 << max(affordable.bit_length() - 1, 0), _MIN_CAPACITY)))

    @property
    def capacity(self) -> int:
        """Number of tokens that a slot can hold without growing."""
        return self._memory.capacity

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime so far."""
        return self._steps.run_seconds

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token."""
        return self._graph.shape.token_numbers * self.dtype.itemsize

    def decode(self, first: int, tokens: Sequence[int], active: Sequence[bool]) -> Logits:
        """Add one token to each active slot of an adjacent range.

        Args:
            first: the first slot.
            tokens: one per slot.
            active: which slots to advance; the others are computed too, but not changed.

        Returns:
            logits [slots, V], valid for the active ones. Later steps overwrite this array.
        """
        totals = np.empty(len(tokens), dtype=np.int64)
        for index in range(len(tokens)):
            length = self.lengths[first + index]
            if active[index]:
                check_step(1, length, 1, self.limit)
            elif length >= self.limit:  # the unused result overwrites the last position
                self.lengths[first + index] = length = self.limit - 1
            totals[index] = length + 1
        longest = int(totals.max())
        self._grow(longest)
        mask = (np.arange(longest) < totals[:, None]).astype(np.int64)
        logits = self._run(first, np.array(tokens, dtype=np.int64)[:, None], mask, 1)
        for index, advances in enumerate(active):
            if advances:
                self.lengths[first + index] += 1
        return cast("Logits", logits[:, 0])

    def extend(self, slot: int, tokens: Sequence[int], num_logits: int = 1) -> Logits:
        """Add several tokens to one slot; returns logits [n, V] of the last n, 0 = all, as `Session.step`."""
        past, new = self.lengths[slot], len(tokens)
        check_step(new, past, num_logits, self.limit)
        self._grow(past + new)
        logits = self._run(slot, np.array([tokens], dtype=np.int64), self._ones[:, : past + new], num_logits)
        self.lengths[slot] = past + new
        return cast("Logits", logits[0])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a slot to another one."""
        self._memory.copy(source, target, length)
        self.lengths[target] = length

    def read(self, slot: int, length: int) -> list[Array]:
        """Copies of the first tokens' keys and values, layer by layer, [K, length, D] each."""
        return self._memory.read(slot, length)

    def write(self, slot: int, values: Sequence[Array]) -> None:
        """Fill a slot with what `read` returned."""
        length = values[0].shape[1]
        self._grow(length)
        self._memory.write(slot, values)
        self.lengths[slot] = length

    def release(self, slot: int) -> None:
        """Empty a slot and free its memory."""
        self.lengths[slot] = 0
        self._memory.release(slot)

    def cancel_steps_if(self, unwanted: Callable[[], bool]) -> None:
        """Terminate the steps from here on that are no longer wanted; `unwanted` is called from any thread."""
        self._steps.unwanted = unwanted

    def _run(self, first: int, ids: Array, mask: Array, num_logits: int) -> Array:
        self.check_process()
        slots, new = ids.shape
        binding = self._binding(first, slots)
        self._keep[...] = num_logits
        mask = np.ascontiguousarray(mask)
        logits = self._logits_of(slots * (num_logits or new)).reshape(slots, num_logits or new, -1)
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("num_logits_to_keep", self._keep)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._steps.run(binding, f"a step over {slots} x {new} tokens")
        self._graph.release_weights(slots * new)
        return logits

    def _logits_of(self, rows: int) -> Logits:
        """An array [rows, V] for logits; a new one in every step would cost a page fault per 4 KiB."""
        if rows > len(self._logits):
            self._logits = np.empty((rows, self._graph.shape.vocab_size), dtype=np.float32)
        return self._logits[:rows]

    def _binding(self, first: int, slots: int) -> Any:
        """A binding of the keys and values of adjacent slots by address."""
        binding = self._bindings.get((first, slots))
        if binding is not None:
            return binding
        if len(self._bindings) >= _MAX_BINDINGS:
            self._bindings.clear()
        binding = self._graph.inference.io_binding()
        if self._graph.has_hidden_states:  # computed in every step
            binding.bind_input(NUM_HIDDEN_STATES, "cpu", 0, np.int64, [], self._one.ctypes.data)
        for tensor, address in zip(self._graph.shape.caches, self._memory.addresses(first), strict=True):
            shape = (slots, *tensor.sized(self.capacity))
            buffer = (self._memory.device, 0, self.dtype.type, shape, address)
            binding.bind_input(f"past_key_values.{tensor.name}", *buffer)
            binding.bind_output(f"present.{tensor.name}", *buffer)
        self._bindings[first, slots] = binding
        return binding

    def _grow(self, needed: int) -> None:
        """Double the capacity, up to the limit, until a slot can hold `needed` tokens."""
        if needed <= self.capacity:
            return
        capacity = self.capacity
        while capacity < needed:
            capacity = min(2 * capacity, self.limit)
        larger = self._reserve(capacity)
        larger.take_over(self._memory, self.lengths)
        self._bindings.clear()
        self._memory = larger

    def _reserve(self, capacity: int) -> SlotMemory:
        return (HostSlots if self.device == "cpu" else DeviceSlots)(self._graph, self.slots, capacity)
