"""`Batch`: the caches of several sequences over one graph, and steps over some of them.

A slot is the cache of one sequence. A decode step (one token each) covers adjacent slots of any lengths; a step over
several tokens covers one slot, as onnxruntime's GroupQueryAttention does on CPUs. On the host only address space is
reserved for the largest context: memory is taken page by page as tokens arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np

from llm_edge.runtime.backend.graph import ATTENTION_MASK, NUM_HIDDEN_STATES, Graph
from llm_edge.runtime.backend.session import Logits, check_step
from llm_edge.runtime.backend.step_runner import StepRunner
from llm_edge.runtime.backend.window_history import Range, WindowHistory
from llm_edge.runtime.process import ProcessBound
from llm_edge.runtime.scheduling.slot_memory import Array, DeviceSlots, HostSlots, SlotMemory
from llm_edge.runtime.scheduling.state_slots import StateSlots

_RESERVED_BYTES = 2**36  # initial address space; slots double in size from there
_MIN_CAPACITY = 256  # initial capacity of a slot in tokens
_MAX_BINDINGS = 64  # cached
_PATIENCE = 1.0  # seconds before a step is terminated for a cancelled sequence: the others in it would repeat it


class Batch(ProcessBound):
    """Slots for the keys, values and states of several sequences over a fused graph.

    Attributes:
        slots: number of sequences.
        device: `cpu` or `cuda`, where the slots are.
        limit: maximum number of tokens in a slot.
        lengths: number of tokens in each slot; `rewind` drops the last ones.
    """

    def __init__(self, graph: Graph, slots: int) -> None:
        super().__init__()
        self._graph = graph
        self.slots = slots
        self.device = graph.cache_device
        self.limit = graph.limit
        self.lengths = [0] * slots
        self._steps = StepRunner(graph, _PATIENCE)
        self._bindings: dict[tuple[int, int, int], Any] = {}
        self._keep = np.zeros((), dtype=np.int64)
        self._logits: Logits = np.empty((0, graph.shape.vocab_size), dtype=np.float32)
        self._one = np.ones((), dtype=np.int64)
        self._ones = np.ones((1, self.limit), dtype=np.int64)
        affordable = _RESERVED_BYTES // max(self.token_bytes * slots, 1) if self.device == "cpu" else 0
        self._memory = self._reserve(min(self.limit, max(1 << max(affordable.bit_length() - 1, 0), _MIN_CAPACITY)))
        self._states = StateSlots(graph, slots) if graph.shape.has_states else None
        window = graph.shape.window if self.device == "cpu" else 0
        self._windows = [WindowHistory(window) for _ in range(slots)] if window else None

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
        return self._graph.shape.token_numbers * self._graph.cache_dtype.itemsize

    @property
    def dtypes(self) -> list[np.dtype[Any]]:
        """Types of the tensors in `ModelShape.caches`."""
        graph = self._graph
        return [graph.cache_dtype if tensor.grows else graph.state_dtype for tensor in graph.shape.caches]

    @property
    def has_states(self) -> bool:
        """Whether the model has states, which exist for certain lengths only."""
        return self._states is not None

    @property
    def forgets(self) -> bool:
        """Whether a slot can return to certain lengths only: the model has states, or windows in its attention."""
        return self._states is not None or self._windows is not None

    def held_bytes(self, slots: Iterable[int]) -> int:
        """Bytes of what these slots hold."""
        slots = list(slots)
        states = self._states.held_bytes(slots) if self._states is not None else 0
        freed = sum(end - start for slot in slots for start, end in self._freed(slot))
        of_windows = self._graph.shape.windowed_numbers * self._graph.cache_dtype.itemsize
        return sum(self.lengths[slot] for slot in slots) * self.token_bytes + states - freed * of_windows

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
                length = self.rewind(first + index, self.limit - 1)
            totals[index] = length + 1
        longest = int(totals.max())
        self._grow(longest)
        mask = (np.arange(longest) < totals[:, None]).astype(np.int64)
        side = self._states.choose_side(first, active) if self._states is not None and len(active) > 1 else 0
        logits = self._run(first, np.array(tokens, dtype=np.int64)[:, None], mask, 1, side)
        for index, advances in enumerate(active):
            if advances:
                self._advance(first + index, 1)
        return cast("Logits", logits[:, 0])

    def extend(self, slot: int, tokens: Sequence[int], num_logits: int = 1) -> Logits:
        """Add several tokens to one slot; returns logits [n, V] of the last n, 0 = all, as `Session.step`."""
        past, new = self.lengths[slot], len(tokens)
        check_step(new, past, num_logits, self.limit)
        self._grow(past + new)
        logits = self._run(slot, np.array([tokens], dtype=np.int64), self._ones[:, : past + new], num_logits)
        self._advance(slot, new)
        return cast("Logits", logits[0])

    def available(self, slot: int, length: int) -> int:
        """How many of a slot's first `length` tokens can be kept, copied and read; see `rewind`."""
        while True:
            found = length if self._states is None else self._states.available(slot, length)
            found = found if self._windows is None else self._windows[slot].available(found)
            if found == length:
                return length
            length = found

    def rewind(self, slot: int, length: int) -> int:
        """Keep only the first `length` tokens of a slot.

        Returns:
            how many were kept. With states, the most of which there are states: those are before and after the last
            step, if that was over one slot, and where `keep_states` kept them. With windows, the most whose window is
            not freed: lengths up to 48 tokens before the current one and before those that `keep_states` kept.
        """
        length = self.available(slot, length)
        if self._states is not None:
            self._states.rewind(slot, length)
        if self._windows is not None:
            self._windows[slot].rewind(length)
        self.lengths[slot] = length
        return length

    def keep_states(self, slot: int) -> None:
        """Keep what is needed to return to a slot's current length, for prompts that begin with the same tokens."""
        if self._states is not None:
            self._states.keep(slot)
        if self._windows is not None:
            self._memory.release_rows(slot, self._windows[slot].keep(self.lengths[slot]))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a slot, as many as are `available`, to another one."""
        self._memory.copy(source, target, length, self._held(source, length))
        if self._windows is not None:
            self._windows[target].take_over(self._windows[source], length)
        if self._states is not None:
            self._states.copy(source, target, length)
        self.lengths[target] = length

    def read(self, slot: int, length: int) -> list[Array]:
        """Copies of what a slot holds for its first tokens, as many as are `available`.

        Returns:
            keys and values [K, length, D] and states [*shape], in the order of `ModelShape.caches`.
        """
        grown = iter(self._memory.read(slot, length))
        fixed = iter(self._states.read(slot, length) if self._states is not None else ())
        return [next(grown if tensor.grows else fixed) for tensor in self._graph.shape.caches]

    def write(self, slot: int, values: Sequence[Array], length: int) -> None:
        """Fill a slot with what `read` returned."""
        self._grow(length)
        pairs = list(zip(self._graph.shape.caches, values, strict=True))
        self._memory.write(slot, [value for tensor, value in pairs if tensor.grows])
        if self._states is not None:
            self._states.write(slot, [value for tensor, value in pairs if not tensor.grows], length)
        if self._windows is not None:  # `read` may have found others freed
            self._memory.release_rows(slot, self._windows[slot].begin(length))
        self.lengths[slot] = length

    def settle(self, slot: int) -> None:
        """Free what a slot holds for its next step only."""
        if self._states is not None:
            self._states.settle(slot)

    def release(self, slot: int) -> None:
        """Empty a slot and free its memory."""
        self.lengths[slot] = 0
        self._memory.release(slot)
        if self._windows is not None:
            self._windows[slot].rewind(0)
        if self._states is not None:
            self._states.release(slot)

    def cancel_steps_if(self, unwanted: Callable[[], bool]) -> None:
        """Terminate the steps from here on that are no longer wanted; `unwanted` is called from any thread."""
        self._steps.unwanted = unwanted

    def _advance(self, slot: int, tokens: int) -> None:
        """A step has added tokens to a slot."""
        self.lengths[slot] += tokens
        if self._states is not None:
            self._states.advance(slot, self.lengths[slot])
        if self._windows is not None:
            self._memory.release_rows(slot, self._windows[slot].advance(self.lengths[slot]))

    def _freed(self, slot: int) -> Sequence[Range]:
        return () if self._windows is None else self._windows[slot].freed

    def _held(self, slot: int, length: int) -> Sequence[Range]:
        """The ranges of a slot's first tokens that layers with windows hold."""
        return [(0, length)] if self._windows is None else list(self._windows[slot].held(length))

    def _run(self, first: int, ids: Array, mask: Array, num_logits: int, side: int = 0) -> Array:
        self.check_process()
        slots, new = ids.shape
        binding = self._binding(first, slots, side)
        if self._states is not None and slots == 1:
            self._states.bind_one(binding, first)
        self._keep[...] = num_logits
        mask = np.ascontiguousarray(mask)
        logits = self._logits_of(slots * (num_logits or new)).reshape(slots, num_logits or new, -1)
        inputs = [("input_ids", ids), (ATTENTION_MASK, mask), ("num_logits_to_keep", self._keep)]
        for name, array in inputs:
            if name != ATTENTION_MASK or self._graph.reads_mask:
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

    def _binding(self, first: int, slots: int, side: int) -> Any:
        """A binding of the caches of adjacent slots by address; states of a single slot are bound in every step."""
        binding = self._bindings.get((first, slots, side))
        if binding is not None:
            return binding
        if len(self._bindings) >= _MAX_BINDINGS:
            self._bindings.clear()
        binding = self._graph.inference.io_binding()
        if self._graph.has_hidden_states:  # computed in every step
            binding.bind_input(NUM_HIDDEN_STATES, "cpu", 0, np.int64, [], self._one.ctypes.data)
        grown = [tensor for tensor in self._graph.shape.caches if tensor.grows]
        for tensor, address in zip(grown, self._memory.addresses(first), strict=True):
            shape = (slots, *tensor.sized(self.capacity))
            buffer = (self._memory.device, 0, self._graph.cache_dtype.type, shape, address)
            binding.bind_input(f"past_key_values.{tensor.name}", *buffer)
            binding.bind_output(f"present.{tensor.name}", *buffer)
        if self._states is not None and slots > 1:
            self._states.bind_side(binding, first, slots, side)
        self._bindings[first, slots, side] = binding
        return binding

    def _grow(self, needed: int) -> None:
        """Double the capacity, up to the limit, until a slot can hold `needed` tokens."""
        if needed <= self.capacity:
            return
        capacity = self.capacity
        while capacity < needed:
            capacity = min(2 * capacity, self.limit)
        larger = self._reserve(capacity)
        held = [self._held(slot, length) for slot, length in enumerate(self.lengths)]
        larger.take_over(self._memory, self.lengths, held)
        self._bindings.clear()
        self._memory = larger

    def _reserve(self, capacity: int) -> SlotMemory:
        return (HostSlots if self.device == "cpu" else DeviceSlots)(self._graph, self.slots, capacity)
