"""Names of tensors without what wrappers of a module add to them.

Wrappers insert their attribute wherever they wrap a module: `model._orig_mod.layers.0.…`. A training loop that holds
the model in an attribute adds that attribute's name in front of all tensors: `net.model.layers.0.…`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import short_repr

# torch.compile, FullyShardedDataParallel (now and before torch 2.0), activation checkpointing, Lightning Fabric
_ATTRIBUTES = "_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module"
_INSERTED = re.compile(rf"(?:^|(?<=\.))(?:{_ATTRIBUTES})\.")
_BASE_LAYER = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)")  # peft: the module beside which adapters are
_LEADING = "module."  # DistributedDataParallel and DeepSpeed


def strip_wrappers(names: Iterable[str], where: str) -> dict[str, str]:
    """Map names without the attributes of wrappers to the names in the file.

    Raises:
        CheckpointError: two tensors of the file `where` would have the same name.
    """
    stored: dict[str, str] = {}
    for name in names:
        clean = _BASE_LAYER.sub("", _INSERTED.sub("", name))
        while clean.startswith(_LEADING):
            clean = clean.removeprefix(_LEADING)
        if clean in stored:
            raise CheckpointError(
                f"{where}: {short_repr(stored[clean])} and {short_repr(name)} differ only in a wrapper's prefix: "
                "save the state_dict of the model itself"
            )
        stored[clean] = name
    return stored


def find_prefix(names: Iterable[str], inner: str, base_prefix: str, where: str) -> str | None:
    """Return the prefix that a model's tensors have in a larger module; None if they are not found.

    Args:
        names: all names of the checkpoint.
        inner: name of a tensor that every such model has, within its base model.
        base_prefix: prefix of the base model's tensors in the model; it may be absent.
        where: path, for messages.

    Returns:
        The prefix with which `inner` begins, including `base_prefix` if it is there.

    Raises:
        CheckpointError: the checkpoint has several models, and none of them at the top level.
    """
    found = sorted({name.removesuffix(inner) for name in names if name == inner or name.endswith(f".{inner}")})
    for plain in (base_prefix, ""):
        if plain in found:
            return plain
    if len(found) > 1:
        shown = " and ".join(short_repr(prefix) for prefix in found[:2])
        raise CheckpointError(
            f"{where}: has several models, with tensors in {shown}: save the state_dict of the one to export"
        )
    return found[0] if found else None
