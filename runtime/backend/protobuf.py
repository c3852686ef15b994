"""Reads the fields of protocol buffers, the encoding of ONNX files, without trusting them."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class RejectedError(Exception):
    """The reason why a file is rejected."""


def read_fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message as (number, wire type, start, end); for an integer, start is its value and end 0."""
    while at < end:
        tag, at = read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == BYTES:
            length, at = read_varint(data, at)
            if at + length > end:
                raise RejectedError("it is truncated")
            yield number, wire, at, at + length
            at += length
        elif wire == VARINT:
            value, at = read_varint(data, at)
            yield number, wire, value, 0
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
            yield number, wire, at, at + size
            at += size
        else:
            raise RejectedError("it is damaged")
    if at != end:
        raise RejectedError("it is truncated")


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer in base 128, and the position after it."""
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise RejectedError("it is damaged")


def read_varints(data: bytes, at: int, end: int) -> list[int]:
    """All integers in base 128 up to `end`."""
    values = []
    while at < end:
        value, at = read_varint(data, at)
        values.append(value)
    return values
