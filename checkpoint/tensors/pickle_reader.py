"""`unpickle`: a restricted pickle interpreter for files of torch.save, which never runs code from the file.

A pickle is a program for a stack machine. This one implements only the opcodes that build plain values, and accepts
only the globals of `pickle_globals.py`. It produces:

    numbers, strings, lists, tuples, dicts   as such (a dict key that is not a string becomes an `Opaque`)
    tensors                                  `StoredTensor`: storage, offset, shape, strides
    bytes, sets, devices, …                  `OPAQUE`

Any other opcode or global is an error. Values are never traversed, compared, hashed or printed, because they may be
shared or contain themselves; memory and time stay proportional to the size of the pickle. The opcodes are those of
PEP 307 (protocol 2), PEP 3154 (4) and PEP 574 (5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from llm_edge.checkpoint.tensors.pickle_globals import (
    DAMAGED,
    GLOBALS,
    ONLY_WEIGHTS,
    OPAQUE,
    Opaque,
    Storage,
    describe_call,
    describe_storage,
)
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import short_repr

MAX_PICKLE = 1 << 26  # bytes; about 130 per tensor
MAX_STEPS = 1 << 21  # opcodes; about 45 per tensor


@dataclass(frozen=True, slots=True)
class Pickled:
    """The value of a pickle, and the storages it refers to by key."""

    value: Any
    storages: Mapping[str, Storage]


def unpickle(stream: BinaryIO, available: int, where: str) -> Pickled:
    """Read one pickle of at most `available` bytes, and leave the stream after its end.

    Raises:
        CheckpointError: the pickle is damaged, too large, or contains more than plain values and tensors.
    """
    machine = _Machine(stream, available, where)
    try:
        value = machine.run()
    except (IndexError, UnicodeDecodeError):  # an opcode with missing or invalid operands
        machine.fail(f"contains an invalid pickle: {DAMAGED}")
    except OSError as e:
        machine.fail(f"cannot be read: {e.strerror or e}")
    return Pickled(value, machine.storages)


class _Machine:
    """The interpreter: a stack, marks in it, and a memo of shared values."""

    def __init__(self, stream: BinaryIO, available: int, where: str) -> None:
        self.storages: dict[str, Storage] = {}
        self._stream = stream
        self._left = min(available, MAX_PICKLE)
        self._complete = available <= MAX_PICKLE
        self._where = where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            if not self._left:
                break
            code = self._take(1)
            if code == b".":
                return self._result()
            step = _OPCODES.get(code)
            if step is None:
                self.fail(f"contains the pickle opcode {code[0]:#04x}, which is not supported: {ONLY_WEIGHTS}")
            step(self)
        if not self._left and self._complete:
            self.fail("ends within its pickle; the file is truncated: download it again")
        return self.fail(f"its pickle is too long: {ONLY_WEIGHTS}")

    def _result(self) -> Any:
        value = self._stack.pop()
        if self._stack or self._marks:
            self.fail(f"its pickle leaves more than one value: {DAMAGED}")
        return value

    def fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._where}: {reason}")

    # ---- bytes

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise IndexError
        self._left -= count
        data = self._stream.read(count)
        if len(data) != count:
            raise IndexError
        return data

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    # ---- plain values

    def proto(self) -> None:
        version = self._number(1)
        if not 2 <= version <= 5:
            self.fail(f"uses pickle protocol {version}; 2 to 5 are supported: save it with torch.save again")

    def frame(self) -> None:
        if self._number(8) > self._left:
            raise IndexError

    def push(self, value: object) -> None:
        self._stack.append(value)

    def signed(self, count: int) -> None:
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def long(self) -> None:
        self.signed(self._number(1))

    def unsigned(self, count: int) -> None:
        self._stack.append(self._number(count))

    def floating(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def text(self, count: int) -> None:
        self._stack.append(self._take(self._number(count)).decode("utf-8", "surrogatepass"))

    def skip_bytes(self, count: int) -> None:
        self._take(self._number(count))
        self._stack.append(OPAQUE)

    # ---- containers

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        begin = self._marks.pop()
        if begin > len(self._stack):
            raise IndexError
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def tuple_of(self, count: int) -> None:
        if count > len(self._stack):
            raise IndexError
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(items)

    def tuple_since_mark(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif target is not OPAQUE:  # a set
            raise IndexError

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise IndexError
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if isinstance(key, str) else Opaque()] = value

    def frozen_set(self) -> None:
        self._since_mark()
        self._stack.append(OPAQUE)

    def one(self) -> list[Any]:
        return [self._stack.pop()]

    def pair(self) -> list[Any]:
        value = self._stack.pop()
        return [self._stack.pop(), value]

    def many(self) -> list[Any]:
        return self._since_mark()

    def put(self, count: int) -> None:
        index = self._number(count)
        if index < len(self._memo):
            self._memo[index] = self._stack[-1]
        elif index == len(self._memo):  # picklers number values consecutively
            self._memo.append(self._stack[-1])
        else:
            raise IndexError

    def memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def get(self, count: int) -> None:
        self._stack.append(self._memo[self._number(count)])

    # ---- globals

    def global_from_line(self) -> None:
        module, name = self._line(), self._line()
        self._push_global(module, name)

    def global_from_stack(self) -> None:
        module, name = self.pair()
        if not isinstance(module, str) or not isinstance(name, str):
            raise IndexError
        self._push_global(module, name)

    def _line(self) -> str:
        line = self._stream.readline(min(256, self._left))
        if not line.endswith(b"\n"):
            raise IndexError
        self._left -= len(line)
        return line[:-1].decode("utf-8")

    def _push_global(self, module: str, name: str) -> None:
        full_name = f"{module[:256]}.{name[:256]}"
        found = GLOBALS.get(full_name)
        if found is None:
            if module == "torch._utils" and name.startswith("_rebuild_"):
                self.fail(
                    f"contains an unsupported kind of tensor ({short_repr(full_name)}): save plain, dense tensors"
                )
            self.fail(f"refers to {short_repr(full_name)}; only plain tensors and values are supported: {ONLY_WEIGHTS}")
        self._stack.append(found)

    def reduce(self) -> None:
        function, arguments = self.pair()
        self._stack.append(describe_call(function, arguments, self.fail))

    def build(self) -> None:
        self._stack.pop()  # attributes, such as the _metadata of a state dict
        if not isinstance(self._stack[-1], dict):
            self.fail(f"sets the state of an object: {ONLY_WEIGHTS}")

    def persistent(self) -> None:
        storage = describe_storage(self._stack.pop(), self.fail)
        if self.storages.setdefault(storage.key, storage) != storage:
            self.fail(f"describes storage {short_repr(storage.key)} inconsistently: save it with torch.save again")
        self._stack.append(storage)


_OPCODES: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.proto,
    b"\x95": _Machine.frame,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.unsigned(1),
    b"M": lambda m: m.unsigned(2),
    b"J": lambda m: m.signed(4),
    b"\x8a": _Machine.long,
    b"G": _Machine.floating,
    b"\x8c": lambda m: m.text(1),
    b"X": lambda m: m.text(4),
    b"\x8d": lambda m: m.text(8),
    b"C": lambda m: m.skip_bytes(1),
    b"B": lambda m: m.skip_bytes(4),
    b"\x8e": lambda m: m.skip_bytes(8),
    b"\x96": lambda m: m.skip_bytes(8),  # a bytearray
    b"(": _Machine.mark,
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": _Machine.tuple_since_mark,
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append(m.one()),
    b"e": lambda m: m.append(m.many()),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.set_items(m.pair()),
    b"u": lambda m: m.set_items(m.many()),
    b"\x8f": lambda m: m.push(OPAQUE),  # a set
    b"\x90": lambda m: m.append(m.many()),
    b"\x91": _Machine.frozen_set,
    b"q": lambda m: m.put(1),
    b"r": lambda m: m.put(4),
    b"\x94": _Machine.memoize,
    b"h": lambda m: m.get(1),
    b"j": lambda m: m.get(4),
    b"c": _Machine.global_from_line,
    b"\x93": _Machine.global_from_stack,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
