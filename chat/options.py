"""`sampling_options`: the command-line options of the sampling parameters, for any Typer command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from llm_edge.runtime.sampling.parameter_spec import ParameterSpec
from llm_edge.runtime.sampling.params import PARAMETERS

_TYPES = {"float": float, "int": int, "bool": bool, "strings": list[str]}


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a Typer command one option per sampling parameter; it receives those that were used as `sampling`.

    Lists of token ids, logit biases and constraints have no option.
    """
    specs = [spec for spec in PARAMETERS.values() if spec.kind in _TYPES]
    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            spec.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _TYPES[spec.kind] | None, typer.Option(spec.option, help=_help(spec), show_default=False)
            ],
        )
        for spec in sorted(specs, key=lambda spec: spec.order)
    ]

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        values = {spec.name: arguments.pop(spec.name) for spec in specs}
        used = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value not in (None, [])
        }
        command(**arguments, sampling=used)

    own = [each for each in signature.parameters.values() if each.name != "sampling"]
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own), *options]
    )
    wrapped.__annotations__ = {each.name: each.annotation for each in [*own, *options]} | {"return": None}
    return wrapped


def _help(spec: ParameterSpec) -> str:
    text = f"{spec.help[0].upper()}{spec.help[1:]}"
    return f"{text}; may be repeated." if spec.kind == "strings" else f"{text}."
