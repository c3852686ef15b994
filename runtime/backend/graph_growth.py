"""`Growth`: follows the values of an untrusted graph that decide how large its results can become."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llm_edge.runtime.backend.protobuf import VARINT, RejectedError, read_fields, read_varints

MAX_RANK = 8
"""Of a tensor."""
_INT64 = 7
# Concat nodes that feed one another double their result; a layer joins few values before its next projection, whose
# weight fixes the size again. A Range counts tokens: from zero or a size up to a size.
_MAX_JOINED = 64
_MAX_REPEATED = 1 << 20  # times that a value may be repeated by constants, such as the number of experts
_SHAPES = {"ConstantOfShape": 0, "Expand": 1, "Pad": 1, "Tile": 1}
"""The input of an operator that decides how large its result is: numbers of elements, or how often to repeat them."""
_PROJECTIONS = frozenset({"Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits"})
_ATTENTION = frozenset({"Attention", "GroupQueryAttention"})


class Growth:
    """Follows the values that decide how large results can become.

    Args:
        constants: names of all values that are constant; nodes may add to it.
        numbers: the integers in small ones; empty for other values.
    """

    def __init__(self, constants: set[bytes], numbers: Mapping[bytes, list[int]]) -> None:
        self.constants = constants
        self._joined: dict[bytes, int] = {}  # values that were concatenated to make up a value; 1 if missing
        self._repeated: dict[bytes, int] = {}  # how often constants repeat a value; 1 if missing
        self._sizes: set[bytes] = set()  # int64 numbers of elements
        self._zeros = {name for name, values in numbers.items() if values and not any(values)}
        self._factors = {name: _product(values) for name, values in numbers.items() if values}  # of shapes

    def follow(self, name: str, inputs: list[bytes], outputs: list[bytes], attributes: list[bytes]) -> None:
        """Take in a node; `attributes` are those of a Constant."""
        if self._is_size(name, inputs):
            self._sizes.update(outputs)
        elif name == "Constant":
            self._follow_constant(outputs, attributes)
        elif name == "Range" and not (
            self._sizes.issuperset(inputs[1:2]) and (self._sizes | self._zeros).issuperset(inputs[:1])
        ):
            raise RejectedError("a Range that does not count tokens")
        if self._joined or name == "Concat":
            joined = self._number_of_joined(name, inputs)
            if joined > _MAX_JOINED:
                raise RejectedError(f"more than {_MAX_JOINED} values are concatenated")
            self._joined.update(dict.fromkeys(outputs, joined) if joined > 1 else {})
        self._follow_shape(name, inputs, outputs)
        if self._repeated or name in _SHAPES:
            repeated = self._times_repeated(name, inputs)
            if repeated > _MAX_REPEATED:
                raise RejectedError(f"operator {name!r} repeats a value more than {_MAX_REPEATED:,} times")
            self._repeated.update(dict.fromkeys(outputs, repeated) if repeated > 1 else {})

    def _follow_constant(self, outputs: list[bytes], attributes: list[bytes]) -> None:
        if all(map(_is_zero, attributes)):
            self._zeros.update(outputs)
        values = [value for attribute in attributes for value in _attribute_integers(attribute)]
        if values:
            self._factors.update(dict.fromkeys(outputs, _product(values)))

    def _follow_shape(self, name: str, inputs: list[bytes], outputs: list[bytes]) -> None:
        """Take in what computes a shape: from sizes and constants, without arithmetic on them."""
        if self._sizes.issuperset(outputs):
            self._factors.update(dict.fromkeys(outputs, 1))
        elif name in ("Unsqueeze", "Cast", "Reshape", "Identity") and inputs[0] in self._factors:
            self._factors.update(dict.fromkeys(outputs, self._factors[inputs[0]]))
        elif name == "Concat" and self._factors.keys() >= set(inputs):
            self._factors.update(dict.fromkeys(outputs, math.prod(self._factors[each] for each in inputs)))

    def _times_repeated(self, name: str, inputs: list[bytes]) -> int:
        if self._has_own_size(name, inputs):
            return 1
        most = max((self._repeated.get(each, 1) for each in inputs), default=1)
        if name not in _SHAPES:
            return most
        factor = self._factors.get(inputs[_SHAPES[name]])
        if factor is None:
            raise RejectedError(f"operator {name!r} with a computed shape")
        return most * factor

    def _has_own_size(self, name: str, inputs: list[bytes]) -> bool:
        """Whether a weight or the cache decides how large a result is."""
        return name in _ATTENTION or (name in _PROJECTIONS and not self.constants.isdisjoint(filter(None, inputs)))

    def _is_size(self, name: str, inputs: list[bytes]) -> bool:
        if name in ("Squeeze", "Identity", "Gather", "Slice"):
            return self._sizes.issuperset(inputs[:1])
        if name == "CastLike":  # a zero becomes the type of a size
            return self._sizes.issuperset(inputs[1:]) and (self._sizes | self._zeros).issuperset(inputs[:1])
        return name == "Shape" or (name == "Sub" and self._sizes.issuperset(inputs))

    def _number_of_joined(self, name: str, inputs: list[bytes]) -> int:
        if self._has_own_size(name, inputs):
            return 1
        counts = [self._joined.get(each, 1) for each in inputs]
        return sum(counts) if name == "Concat" else max(counts, default=1)


def _product(values: list[int]) -> int:
    """The product of the sizes in a constant shape; -1 and 0 stand for sizes of an input."""
    return math.prod(max(abs(value), 1) for value in values)


def read_integers(data: bytes, start: int, end: int) -> list[int]:
    """The values of an int64 tensor in the graph itself, if there are at most `MAX_RANK * 2`; empty for others."""
    kind, values = 0, []
    for number, wire, a, b in read_fields(data, start, end):
        if number == 2 and wire == VARINT:
            kind = a
        elif number == 7:  # packed or not
            values += [a] if wire == VARINT else read_varints(data, a, b)
        elif number == 9 and b - a <= 16 * MAX_RANK:
            values += [int.from_bytes(data[at : at + 8], "little", signed=True) for at in range(a, b, 8)]
    values = [value - 2**64 if value >= 2**63 else value for value in values]
    return values if kind == _INT64 and len(values) <= 2 * MAX_RANK else []


def _attribute_integers(attribute: bytes) -> list[int]:
    """The integers in the attribute of a Constant: `value_int`, `value_ints` or `value`; empty for others."""
    found = []
    for number, wire, start, end in read_fields(attribute, 0, len(attribute)):
        if number == 3 or (number == 8 and wire == VARINT):
            found.append(start)
        elif number == 8:
            found += read_varints(attribute, start, end)
        elif number == 5:
            found += read_integers(attribute, start, end)
    return [value - 2**64 if value >= 2**63 else value for value in found]


def _is_zero(attribute: bytes) -> bool:
    """Whether an attribute that passed `_check_attribute` holds nothing but zeros: an integer, or a tensor's bytes."""
    for number, _, start, end in read_fields(attribute, 0, len(attribute)):
        if number == 3:
            return start == 0
        if number == 5:
            values = [
                attribute[a:b] for field, _, a, b in read_fields(attribute, start, end) if field in (4, 5, 7, 9, 10, 11)
            ]
            return not any(map(any, values))
    return False
