"""`python -m llm_edge.bench.peers.long_context`: prompts of thousands of tokens, next to llama.cpp, interleaved."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_edge.bench.driver import DECODE_TOKENS, Worker, median
from llm_edge.bench.peers.run import HERE, TEXT, print_table, say, source_of, tokens_of
from llm_edge.runtime.command import run

if TYPE_CHECKING:
    from llm_edge.bench.peers.engines import Contender

_SPARE = 64  # tokens of the context beyond the longest prompt: DECODE_TOKENS and some
_PEERS = ("llama.cpp/Q8_0", "llama.cpp/Q8_0-no-flash", "llama.cpp/Q4_0", "llama.cpp/Q4_0-no-flash")

Samples = dict[str, list[float]]
"""Samples by `prefill N`, `decode @N` and `peak N` of each length N; tokens per second, and MB of 10^6 bytes."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def long_context(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder from llm-export.")],
    source: Annotated[
        Path | None, typer.Option(help="GGUF that the bundle was exported from. Default: SmolLM2's, from the cache.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens; those that the model has no context for are left out.")
    ] = "8000,32000",
    only: Annotated[str | None, typer.Option(help="Comma-separated contenders, as in bench-peers.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Fresh processes of each; medians are reported.")] = 3,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads per engine.")] = 2,
    without_amx: Annotated[bool, typer.Option("--without-amx", help="Disable AMX, which laptops lack.")] = False,
    work: Annotated[Path, typer.Option(help="Folder for environments and converted models.")] = Path(".peers"),
) -> None:
    """Measure prefill, decoding and peak memory after long prompts.

    Prints a table, and one JSON object as the last line.
    """
    command = partial(_long_context, bundle, source, lengths, only, rounds, threads, without_amx, work)
    raise typer.Exit(run(command, native_output=True))


def _long_context(
    path: Path,
    gguf: Path | None,
    lengths: str,
    only: str | None,
    rounds: int,
    threads: int,
    without_amx: bool,
    work: Path,
) -> None:
    from llm_edge.bench.cli import machine
    from llm_edge.bench.peers import without_amx as amx
    from llm_edge.bench.peers.engines import choose, make
    from llm_edge.runtime.bundle import Bundle
    from llm_edge.runtime.errors import InputError

    bundle = Bundle.open(path)
    wanted = _lengths(lengths, bundle.shape.max_position_embeddings)
    if without_amx and (reason := amx.problem()) is not None:
        raise InputError(f"--without-amx: {reason}")
    names = choose(only or ",".join(("ours", *_PEERS)), list(bundle.precisions))
    text = tokens_of(bundle, TEXT)
    tokens = (text * (wanted[-1] // len(text) + 1))[: wanted[-1]]
    weights = source_of([gguf] if gguf else [], bundle) if any(not name.startswith("ours/") for name in names) else None
    (work := work.resolve()).mkdir(parents=True, exist_ok=True)
    prefix = (sys.executable, "-I", "-S", str(HERE / "without_amx.py")) if without_amx else ()
    contenders = [each.with_prefix(prefix) for each in make(names, bundle, weights, work, threads, say)]
    samples = _measure(contenders, tokens, wanted, rounds)
    medians = {name: {key: median(values) for key, values in found.items()} for name, found in samples.items()}
    print_table(_table(medians, wanted))
    print(json.dumps({"bundle": bundle.name, "machine": machine(), "threads": threads, "engines": medians}))


def _lengths(text: str, context: int) -> list[int]:
    """Parse the lengths that a context has room for, in ascending order."""
    from llm_edge.runtime.errors import InputError

    try:
        given = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise InputError(f"--lengths: {text!r} is no list of numbers such as 8000,32000") from error
    found = [length for length in given if 1 <= length <= context - _SPARE]
    if not found:
        raise InputError(f"--lengths: the model's context is {context} tokens: give a length up to {context - _SPARE}")
    return found


def _measure(
    contenders: Sequence[Contender], tokens: Sequence[int], lengths: Sequence[int], rounds: int
) -> dict[str, Samples]:
    """Measure each contender after each length in turn, each round in fresh processes."""
    samples: dict[str, Samples] = {each.name: {} for each in contenders}
    for number in range(rounds):
        workers: dict[str, Worker] = {}
        try:
            for each in contenders:
                workers[each.name] = Worker(_command(each, lengths[-1] + _SPARE))
            for length in lengths:
                for name, worker in workers.items():
                    say(f"round {number + 1} of {rounds}: {name} after {length:,} tokens")
                    _sample(worker, tokens[:length], samples[name])
        finally:
            for worker in workers.values():
                worker.close()
    return samples


def _command(contender: Contender, context: int) -> tuple[str, ...]:
    """Command of a contender's worker with a cache for a context; ours grows as needed."""
    return contender.speed if contender.name.startswith("ours/") else (*contender.speed, f"context={context}")


def _sample(worker: Worker, tokens: Sequence[int], samples: Samples) -> None:
    length = len(tokens)
    reply = worker.ask(tokens=list(tokens), count=DECODE_TOKENS)
    samples.setdefault(f"prefill {length}", []).append(length / reply["first"])
    if reply["count"] > 1:  # otherwise the model ended immediately
        samples.setdefault(f"decode @{length}", []).append((reply["count"] - 1) / reply["rest"])
    samples.setdefault(f"peak {length}", []).append(worker.ask(peak=True)["peak_mb"])


def _table(medians: Mapping[str, Mapping[str, float | None]], lengths: Sequence[int]) -> list[list[str]]:
    """Title and cells: of each length tokens per second of prefill and decoding, and peak memory."""
    columns = [
        (f"{title}{length}", f"{name}{length:,}", form)
        for length in lengths
        for title, name, form in (
            ("prefill ", "prefill ", "{:,.0f} tok/s"),
            ("decode @", "decode @", "{:,.1f} tok/s"),
            ("peak ", "peak memory after ", "{:,.0f} MB"),
        )
    ]
    rows = [["", *(title for _, title, _ in columns)]]
    for name, found in medians.items():
        cells = [(form, found.get(key)) for key, _, form in columns]
        rows.append([name, *("" if value is None else form.format(value) for form, value in cells)])
    return rows


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
