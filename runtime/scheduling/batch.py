"""Several conversations in one graph: rows of keys and values, and steps over some of them. Knows no text or sampling.

A row is one conversation's cache. A step over one token each takes rows that lie side by side, of whatever lengths; a
step over several tokens takes one row, as onnxruntime's GroupQueryAttention does on a CPU. Where they lie on the host
the largest context is reserved as addresses only: memory is taken page by page as tokens come.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from llm_edge.runtime.backend.session import NUM_HIDDEN_STATES, Logits, Session, check_step, one_line
from llm_edge.runtime.errors import MachineError
from llm_edge.runtime.scheduling.slot_memory import Array, DeviceSlots, HostSlots, SlotMemory

_RESERVED = 2**36  # bytes of addresses at most to begin with; rows double from there
_FEWEST = 256  # tokens a row holds to begin with
_BINDINGS = 64  # kept


class Batch:
    """Rows of keys and values over a session's graph.

    Args:
        session: of a fused graph; its own cache stays unused.
        rows: how many conversations there is room for.

    Attributes:
        device: `cpu` or `cuda`, where the rows lie.
        lengths: tokens in the cache of each row; may be set lower, which forgets the last ones.
        run_seconds: time spent inside onnxruntime so far.
    """

    def __init__(self, session: Session, rows: int) -> None:
        self._session = session
        self._graph = session.graph
        self._has_hidden_states = session.has_hidden_states
        self._shape = session.shape
        self.dtype = session.cache_dtype
        self._names = session.cache_names
        self.rows = rows
        self.limit = session.limit
        self.lengths = [0] * rows
        self.run_seconds = 0.0
        self._bindings: dict[tuple[int, int], Any] = {}
        self._keep = np.zeros((), dtype=np.int64)
        self._one = np.ones((), dtype=np.int64)
        self._ones = np.ones((1, self.limit), dtype=np.int64)
        self._options = session.run_options()
        self.device = session.cache_device
        possible = _RESERVED // (self.token_bytes * rows) if self.device == "cpu" else 0
        self._memory = self._reserve(min(self.limit, max(1 << max(possible.bit_length() - 1, 0), _FEWEST)))

    @property
    def capacity(self) -> int:
        """Tokens a row has room for now."""
        return self._memory.shape[2]

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values a token takes."""
        return len(self._names) * self._shape.num_key_value_heads * self._shape.head_dim * self.dtype.itemsize

    def decode(self, first: int, tokens: Sequence[int], active: Sequence[bool]) -> Logits:
        """One token more in each of the rows that lie side by side from `first` on.

        Args:
            first: the first row.
            tokens: one a row.
            active: which rows go on; others are computed for nothing and stay as they are.

        Returns:
            logits [rows, V], of the rows that go on; the next step overwrites nothing of it.
        """
        totals = np.empty(len(tokens), dtype=np.int64)
        for index in range(len(tokens)):
            length = self.lengths[first + index]
            if active[index]:
                check_step(1, length, 1, self.limit)
            elif length >= self.limit:  # what is computed for nothing lands on the last place
                self.lengths[first + index] = length = self.limit - 1
            totals[index] = length + 1
        longest = int(totals.max())
        self._grow(longest)
        mask = (np.arange(longest) < totals[:, None]).astype(np.int64)
        logits = self._run(first, np.array(tokens, dtype=np.int64)[:, None], mask, 1)
        for index, goes in enumerate(active):
            if goes:
                self.lengths[first + index] += 1
        return cast("Logits", logits[:, 0])

    def extend(self, row: int, tokens: Sequence[int], num_logits: int = 1) -> Logits:
        """Tokens more in one row; see `Session.step`.

        Returns:
            logits [n, V] of the last n of them; 0 gives all.
        """
        past, new = self.lengths[row], len(tokens)
        check_step(new, past, num_logits, self.limit)
        self._grow(past + new)
        logits = self._run(row, np.array([tokens], dtype=np.int64), self._ones[:, : past + new], num_logits)
        self.lengths[row] = past + new
        return cast("Logits", logits[0])

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of a row into another one."""
        self._memory.copy(source, target, length)
        self.lengths[target] = length

    def read(self, row: int, length: int) -> list[Array]:
        """Copies of the first tokens' keys and values, layer by layer, [K, length, D] each."""
        return self._memory.read(row, length)

    def write(self, row: int, values: Sequence[Array]) -> None:
        """Put in what `read` gave."""
        length = values[0].shape[1]
        self._grow(length)
        self._memory.write(row, values)
        self.lengths[row] = length

    def release(self, row: int) -> None:
        """Forget a row and give its memory back."""
        self.lengths[row] = 0
        self._memory.release(row)

    def terminate(self) -> None:
        """End the step that runs now, from another thread; it and all after it raise MachineError until `resume`."""
        self._options.terminate = True

    def resume(self) -> None:
        """Steps may run again."""
        self._options.terminate = False

    def _run(self, first: int, ids: Array, mask: Array, num_logits: int) -> Array:
        rows, new = ids.shape
        binding = self._binding(first, rows)
        self._keep[...] = num_logits
        mask = np.ascontiguousarray(mask)
        logits = np.empty((rows, num_logits or new, self._shape.vocab_size), dtype=np.float32)
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("num_logits_to_keep", self._keep)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        began = time.perf_counter()
        try:
            self._graph.run_with_iobinding(binding, self._options)
        except MemoryError as error:
            raise MachineError(f"not enough memory for a step over {rows} x {new} tokens") from error
        except Exception as error:
            raise MachineError(f"a step over {rows} x {new} tokens failed ({one_line(error)})") from error
        finally:
            self.run_seconds += time.perf_counter() - began
        return logits

    def _binding(self, first: int, rows: int) -> Any:
        """Keys and values of some rows, bound by address."""
        binding = self._bindings.get((first, rows))
        if binding is not None:
            return binding
        if len(self._bindings) >= _BINDINGS:
            self._bindings.clear()
        binding = self._graph.io_binding()
        if self._has_hidden_states:  # computed, asked for or not
            binding.bind_input(NUM_HIDDEN_STATES, "cpu", 0, np.int64, [], self._one.ctypes.data)
        shape = (rows, *self._memory.shape[1:])
        for name, address in zip(self._names, self._memory.addresses(first), strict=True):
            where = (self._memory.device, 0, self.dtype.type, shape, address)
            binding.bind_input(f"past_key_values.{name}", *where)
            binding.bind_output(f"present.{name}", *where)
        self._bindings[first, rows] = binding
        return binding

    def _grow(self, needed: int) -> None:
        """Room for so many tokens a row: twice as many as before, up to the limit."""
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
        shape = (self.rows, self._shape.num_key_value_heads, capacity, self._shape.head_dim)
        return (HostSlots if self.device == "cpu" else DeviceSlots)(self._session, shape)
