"""Defines custom operators, which traces keep whole, from the named tuple of their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "llm_edge"

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])


def define_operator(
    name: str,
    inputs: type[Inputs],
    outputs: int,
    compute: Callable[[Inputs], Any],
    fake: Callable[[Inputs], Any],
) -> Callable[..., Any]:
    """Register `llm_edge::<name>`, whose arguments are the fields of a named tuple.

    Args:
        name: of the operator.
        inputs: the named tuple; its annotations are the types of the operator's schema.
        outputs: number of tensors that the operator returns; a tuple if there are several.
        compute: the reference in plain PyTorch.
        fake: returns empty tensors of the right shapes, for tracing.
    """
    returned: Any = Tensor if outputs == 1 else tuple.__class_getitem__((Tensor,) * outputs)

    def operator(*arguments: Any) -> Any:
        return compute(inputs(*arguments))

    # The schema is derived from a signature.
    operator.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
            for field, annotation in get_type_hints(inputs).items()
        ],
        return_annotation=returned,
    )
    defined = torch.library.custom_op(f"{NAMESPACE}::{name}", operator, mutates_args=())
    defined.register_fake(lambda *arguments: fake(inputs(*arguments)))
    return defined
