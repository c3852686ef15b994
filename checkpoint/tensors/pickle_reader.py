"""Reads the pickle inside of what torch.save writes, without pickle. It knows no file and reads no tensor's values.

A pickle is a program for a small stack machine. This one knows only the instructions that build plain values, and
the few names that torch.save uses; a name stays a word, and "calling" one makes a description (`torch_names.py`):

    numbers, texts, lists, tuples, dicts     themselves (a key of a dict that is no text becomes an Opaque)
    tensors                                  StoredTensor: which storage, from where, which shape
    bytes, sets, devices and the like        OPAQUE

Nothing is imported, called or built that the program names, and nothing it builds is walked, compared, hashed or
printed here: values may be shared or contain themselves, and cost what the bytes cost that made them. Instructions:
PEP 307 (protocol 2), PEP 3154 (4) and PEP 574 (5). Any other instruction or name ends the reading.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from llm_edge.checkpoint.tensors.torch_names import (
    DAMAGED,
    NAMES,
    ONLY_WEIGHTS,
    OPAQUE,
    Opaque,
    Storage,
    describe_call,
    describe_storage,
)
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.show import show

MAX_PICKLE = 1 << 26  # bytes; a tensor takes about 130
MAX_STEPS = 1 << 21  # instructions; a tensor takes about 45


@dataclass(frozen=True, slots=True)
class Pickled:
    """What a pickle holds, and the storages it refers to, by key."""

    value: Any
    storages: Mapping[str, Storage]


def unpickle(stream: BinaryIO, left: int, where: str) -> Pickled:
    """Read one pickle; the stream is left behind its end.

    Args:
        stream: bytes from the beginning of the pickle on.
        left: how many bytes there are at most.
        where: the file, for messages.

    Raises:
        CheckpointError: it is damaged, too large, or asks for more than plain values and tensors.
    """
    machine = _Machine(stream, left, where)
    try:
        value = machine.run()
    except (IndexError, UnicodeDecodeError):  # an instruction takes what is not there
        machine.fail(f"the pickle in it cannot be followed: {DAMAGED}")
    except OSError as e:
        machine.fail(f"cannot be read: {e.strerror or e}")
    return Pickled(value, machine.storages)


class _Machine:
    """A stack, marks in it, and a memo of values to come back to."""

    def __init__(self, stream: BinaryIO, left: int, where: str) -> None:
        self.storages: dict[str, Storage] = {}
        self._stream = stream
        self._left = min(left, MAX_PICKLE)
        self._whole = left <= MAX_PICKLE
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
            step = _STEPS.get(code)
            if step is None:
                self.fail(
                    f"has the pickle instruction {code[0]:#04x}, which plain tensors do not need and which is not "
                    f"followed: {ONLY_WEIGHTS}"
                )
            step(self)
        if not self._left and self._whole:
            self.fail("ends within the pickle in it; the file is cut short: download it again")
        return self.fail(f"the pickle in it goes on for too long: {ONLY_WEIGHTS}")

    def _result(self) -> Any:
        value = self._stack.pop()
        if self._stack or self._marks:
            self.fail(f"the pickle in it ends with something left over: {DAMAGED}")
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
            self.fail(f"holds pickle protocol {version}, 2 to 5 are read: save it with torch.save again")

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
        elif index == len(self._memo):  # picklers count up
            self._memo.append(self._stack[-1])
        else:
            raise IndexError

    def memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def get(self, count: int) -> None:
        self._stack.append(self._memo[self._number(count)])

    # ---- names

    def line_name(self) -> None:
        module, name = self._line(), self._line()
        self._name(module, name)

    def stack_name(self) -> None:
        module, name = self.pair()
        if not isinstance(module, str) or not isinstance(name, str):
            raise IndexError
        self._name(module, name)

    def _line(self) -> str:
        line = self._stream.readline(min(256, self._left))
        if not line.endswith(b"\n"):
            raise IndexError
        self._left -= len(line)
        return line[:-1].decode("utf-8")

    def _name(self, module: str, name: str) -> None:
        text = f"{module[:256]}.{name[:256]}"
        known = NAMES.get(text)
        if known is None:
            if module == "torch._utils" and name.startswith("_rebuild_"):
                self.fail(f"holds a tensor of a kind that is not read ({show(text)}): save plain, dense tensors")
            self.fail(f"asks for {show(text)}, and nothing but plain tensors and values is read: {ONLY_WEIGHTS}")
        self._stack.append(known)

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
            self.fail(f"describes storage {show(storage.key)} in two ways: save it with torch.save again")
        self._stack.append(storage)


_STEPS: Mapping[bytes, Callable[[_Machine], None]] = {
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
    b"c": _Machine.line_name,
    b"\x93": _Machine.stack_name,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
