"""The names that a pickle of torch.save may use, and what each stands for. It knows no pickle and no file.

A name stays a word; "calling" one makes a description from the arguments. Nothing is imported by these names, no
function they belong to is called, and no argument is walked, compared or printed but the few that describe a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from llm_edge.checkpoint.tensors.tensor_bytes import MAX_ELEMENTS, is_shape

Fail = Callable[[str], NoReturn]

ONLY_WEIGHTS = "save only the weights: torch.save(model.state_dict(), …)"
DAMAGED = "the file is damaged: download it again"


class Opaque:
    """Something that is there but of no use here."""

    __slots__ = ()


OPAQUE = Opaque()


@dataclass(frozen=True, slots=True)
class Name:
    """One of the names of this module, as a word."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers outside of the pickle."""

    key: str
    dtype: torch.dtype
    items: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return self.items * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage; offset and strides count numbers of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def describe_storage(claim: object, fail: Fail) -> Storage:
    """The storage that ("storage", type, key, device, number of items) refers to; the old format adds None."""
    if not isinstance(claim, tuple) or len(claim) not in (5, 6) or claim[0] != "storage":
        fail(f"refers to something that is no storage of a tensor: {ONLY_WEIGHTS}")
    if any(view is not None for view in claim[5:]):  # of torch before 0.2; None ever since
        fail("describes a storage as a view of another: save it with torch.save again")
    _, kind, key, device, items = claim[:5]
    dtype = _STORAGES.get(kind.text) if isinstance(kind, Name) else None
    if dtype is None or not isinstance(key, str) or not isinstance(device, str) or not _is_count(items):
        fail(f"describes a storage that cannot be: {DAMAGED}")
    return Storage(key, dtype, items)


def describe_call(function: object, arguments: object, fail: Fail) -> object:
    """What `function(*arguments)` stands for."""
    call = _CALLS.get(function.text) if isinstance(function, Name) else None
    if call is None or not isinstance(arguments, tuple):
        fail(f"calls something that is no function: {ONLY_WEIGHTS}")
    return call(fail, arguments)


# ---- calls


def _inert(_fail: Fail, _arguments: tuple[Any, ...]) -> Opaque:
    return OPAQUE


def _ordered_dict(fail: Fail, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        fail(f"builds a dict from something else than its items: {ONLY_WEIGHTS}")
    return {}


def _size(fail: Fail, arguments: tuple[Any, ...]) -> object:
    _count(fail, arguments, 1, 1)
    return arguments[0]


def _tensor_v1(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 4, 4)
    return _tensor(fail, arguments, None)


def _tensor_v2(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 6, 7)  # …, requires_grad, hooks, metadata
    _no_metadata(fail, arguments[6:])
    return _tensor(fail, arguments[:4], None)


def _tensor_v3(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 7, 8)  # …, requires_grad, hooks, dtype, metadata
    _no_metadata(fail, arguments[7:])
    return _tensor(fail, arguments[:4], arguments[6])


def _parameter(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 3, 4)  # tensor, requires_grad, hooks, state
    if not isinstance(arguments[0], StoredTensor):
        fail(f"wraps a parameter around something that is no tensor: {DAMAGED}")
    return arguments[0]


def _typed_tensor(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 4, 4)  # function, class, arguments of the function, state
    function, kind, inner, _ = arguments
    rebuild = _REBUILDS.get(function.text) if isinstance(function, Name) else None
    if rebuild is None or not isinstance(kind, Name) or kind.text not in _TYPES or not isinstance(inner, tuple):
        fail("holds a tensor of a class of its own: save plain tensors")
    return rebuild(fail, inner)


def _tensor(fail: Fail, arguments: tuple[Any, ...], kind: object) -> StoredTensor:
    storage, offset, shape, strides = arguments
    dtype = storage.dtype if isinstance(storage, Storage) else None
    if kind is not None:
        dtype = _DTYPES.get(kind.text) if isinstance(kind, Name) else None
    if (
        not isinstance(storage, Storage)
        or dtype is None
        or not _is_count(offset)
        or not isinstance(shape, tuple)
        or not is_shape(shape)
        or not isinstance(strides, tuple)
        or len(strides) != len(shape)
        or not all(_is_count(stride) for stride in strides)
    ):
        fail(f"describes a tensor that cannot be: {DAMAGED}")
    return StoredTensor(storage, dtype, offset, shape, strides)


def _no_metadata(fail: Fail, metadata: tuple[Any, ...]) -> None:
    if metadata and metadata[0]:
        fail("holds a tensor that is conjugated or negated only when read: save a clone of it")


def _count(fail: Fail, arguments: tuple[Any, ...], least: int, most: int) -> None:
    if not least <= len(arguments) <= most:
        fail(f"rebuilds a tensor from {len(arguments)} values: {DAMAGED}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS


# ---- names

_STORAGES: Mapping[str, torch.dtype] = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.UntypedStorage": torch.uint8,
    "torch.storage.UntypedStorage": torch.uint8,
}
_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter"})  # never called
_INERT = (
    "_codecs.encode",  # bytes, in protocol 2
    "__builtin__.bytearray",
    "__builtin__.complex",
    "__builtin__.frozenset",
    "__builtin__.set",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.set",
    "collections.Counter",  # in the state of a learning rate's schedule
    "torch.device",
)
_REBUILDS: Mapping[str, Callable[[Fail, tuple[Any, ...]], StoredTensor]] = {
    "torch._utils._rebuild_tensor": _tensor_v1,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_CALLS: Mapping[str, Callable[[Fail, tuple[Any, ...]], object]] = {
    **_REBUILDS,
    **dict.fromkeys(_INERT, _inert),
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
NAMES: Mapping[str, Name] = {text: Name(text) for text in (*_CALLS, *_STORAGES, *_DTYPES, *_TYPES)}
