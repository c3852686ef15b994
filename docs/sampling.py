"""Prints docs/sampling.md from the table of sampling parameters: `python docs/sampling.py > docs/sampling.md`."""

from __future__ import annotations

from collections.abc import Iterator

from llm_edge.runtime.sampling.parameter_spec import ParameterSpec
from llm_edge.runtime.sampling.params import PARAMETERS
from llm_edge.runtime.sampling.presets import DESCRIPTIONS, PRESETS

INTRODUCTION = """# Sampling parameters

Every parameter of `SamplingParams`, in the order in which they act on the logits of a token. The same names work in
Python, as `llm-chat` options (`--top-p 0.9`), in the chat's parameter panel (F3) and with `/set`. This page is
generated from [runtime/sampling/params.py](../runtime/sampling/params.py) by `make docs`.

Order: processors (constraint, newlines, reasoning), biases and bans, penalties, temperature, filters, the draw. At
temperature 0 the filters are skipped. Token ids outside the vocabulary are ignored. `OpenAI`, `llama.cpp` and
`generation_config.json` are the names in those interfaces.
"""


def number(value: float) -> str:
    """A limit, large ones as powers of two."""
    return {2**31 - 1: "2^31 - 1", 2**64 - 1: "2^64 - 1"}.get(int(value), f"{value:g}")


def entry(spec: ParameterSpec) -> Iterator[str]:
    """Lines on one parameter."""
    values = f"{number(spec.between[0])} to {number(spec.between[1])}" if spec.between else spec.kind.replace("_", " ")
    default = "off" if spec.default is None else repr(spec.default)
    names = {
        "OpenAI": spec.api.openai,
        "llama.cpp": spec.api.llamacpp,
        "generation_config.json": spec.api.generation_config,
    }
    yield f"### `{spec.name}`"
    yield ""
    sentences = f"{spec.help[0].upper()}{spec.help[1:]}. {spec.detail}"
    yield sentences.strip()
    yield ""
    listed = [f"{kind} `{name}`" for kind, name in names.items() if name]
    yield " · ".join([f"Values: {values}", f"default: `{default}`", *listed])
    yield ""


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, *(line for spec in PARAMETERS.values() for line in entry(spec))]
    lines += ["## Presets", ""]
    for name, values in PRESETS.items():
        settings = ", ".join(f"`{parameter}` {value:g}" for parameter, value in values.items())
        lines.append(f"- **{name}** ({settings}): {DESCRIPTIONS[name]}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
