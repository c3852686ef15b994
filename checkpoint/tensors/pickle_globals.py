"""Globals that a pickle of torch.save may refer to, and the descriptions that calls of them produce.

Nothing is imported and no function is called: a global is kept as its name, and a call of one produces a description
such as `StoredTensor`. Only arguments that describe a tensor are inspected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from llm_edge.checkpoint.tensors.tensor_data import MAX_ELEMENTS, is_shape

Fail = Callable[[str], NoReturn]

ONLY_WEIGHTS = "save only the weights: torch.save(model.state_dict(), …)"
DAMAGED = "the file is damaged: download it again"


class Opaque:
    """A value that is not used."""

    __slots__ = ()


OPAQUE = Opaque()


@dataclass(frozen=True, slots=True)
class Global:
    """One of `GLOBALS`, by its full name."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A contiguous array outside the pickle."""

    key: str
    dtype: torch.dtype
    items: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.items * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage; offset and strides are in elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def describe_storage(reference: object, fail: Fail) -> Storage:
    """Return the storage of ("storage", type, key, device, number of items); the legacy format adds None."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
        fail(f"refers to something other than a tensor storage: {ONLY_WEIGHTS}")
    if any(view is not None for view in reference[5:]):  # used before torch 0.2
        fail("describes a storage as a view of another: save it with torch.save again")
    _, kind, key, device, items = reference[:5]
    dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None or not isinstance(key, str) or not isinstance(device, str) or not _is_count(items):
        fail(f"describes an invalid storage: {DAMAGED}")
    return Storage(key, dtype, items)


def describe_call(function: object, arguments: object, fail: Fail) -> object:
    """Return the description of `function(*arguments)`."""
    call = _CALLS.get(function.name) if isinstance(function, Global) else None
    if call is None or not isinstance(arguments, tuple):
        fail(f"calls something other than a supported function: {ONLY_WEIGHTS}")
    return call(fail, arguments)


# ---- calls


def _opaque(_fail: Fail, _arguments: tuple[Any, ...]) -> Opaque:
    return OPAQUE


def _ordered_dict(fail: Fail, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        fail(f"builds a dict from unsupported arguments: {ONLY_WEIGHTS}")
    return {}


def _size(fail: Fail, arguments: tuple[Any, ...]) -> object:
    _count(fail, arguments, 1, 1)
    return arguments[0]


def _tensor_v1(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 4, 4)
    return _tensor(fail, arguments, None)


def _tensor_v2(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 6, 7)  # …, requires_grad, hooks, metadata
    _reject_metadata(fail, arguments[6:])
    return _tensor(fail, arguments[:4], None)


def _tensor_v3(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 7, 8)  # …, requires_grad, hooks, dtype, metadata
    _reject_metadata(fail, arguments[7:])
    return _tensor(fail, arguments[:4], arguments[6])


def _parameter(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 3, 4)  # tensor, requires_grad, hooks, state
    if not isinstance(arguments[0], StoredTensor):
        fail(f"wraps something other than a tensor in a parameter: {DAMAGED}")
    return arguments[0]


def _typed_tensor(fail: Fail, arguments: tuple[Any, ...]) -> StoredTensor:
    _count(fail, arguments, 4, 4)  # function, class, arguments of the function, state
    function, kind, inner, _ = arguments
    rebuild = _REBUILDS.get(function.name) if isinstance(function, Global) else None
    if rebuild is None or not isinstance(kind, Global) or kind.name not in _TYPES or not isinstance(inner, tuple):
        fail("contains a tensor of a custom class: save plain tensors")
    return rebuild(fail, inner)


def _tensor(fail: Fail, arguments: tuple[Any, ...], kind: object) -> StoredTensor:
    storage, offset, shape, strides = arguments
    dtype = storage.dtype if isinstance(storage, Storage) else None
    if kind is not None:
        dtype = _DTYPES.get(kind.name) if isinstance(kind, Global) else None
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
        fail(f"describes an invalid tensor: {DAMAGED}")
    return StoredTensor(storage, dtype, offset, shape, strides)


def _reject_metadata(fail: Fail, metadata: tuple[Any, ...]) -> None:
    if metadata and metadata[0]:
        fail("contains a lazily conjugated or negated tensor: save a clone of it")


def _count(fail: Fail, arguments: tuple[Any, ...], minimum: int, maximum: int) -> None:
    if not minimum <= len(arguments) <= maximum:
        fail(f"rebuilds a tensor from {len(arguments)} values: {DAMAGED}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS


# ---- supported globals

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
_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter"})
_OPAQUE_CALLS = (
    "_codecs.encode",  # bytes, in protocol 2
    "__builtin__.bytearray", "__builtin__.complex", "__builtin__.frozenset", "__builtin__.set",
    "builtins.bytearray", "builtins.complex", "builtins.frozenset", "builtins.set",
    "collections.Counter",  # in the state of learning-rate schedulers
    "torch.device",
)  # fmt: skip
_REBUILDS: Mapping[str, Callable[[Fail, tuple[Any, ...]], StoredTensor]] = {
    "torch._utils._rebuild_tensor": _tensor_v1,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_CALLS: Mapping[str, Callable[[Fail, tuple[Any, ...]], object]] = {
    **_REBUILDS,
    **dict.fromkeys(_OPAQUE_CALLS, _opaque),
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._tensor._rebuild_from_type_v2": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
GLOBALS: Mapping[str, Global] = {name: Global(name) for name in (*_CALLS, *_STORAGES, *_DTYPES, *_TYPES)}
