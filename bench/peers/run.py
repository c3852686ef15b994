"""`python -m llm_edge.bench.peers.run`: other engines and a bundle, with the same weights, interleaved."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_edge.runtime.command import run

if TYPE_CHECKING:
    from llm_edge.bench.peers.engines import Contender, Source
    from llm_edge.bench.peers.fidelity import Fidelity
    from llm_edge.runtime.bundle import Bundle

HERE = Path(__file__).resolve().parent
TEXT = HERE.parents[1] / "exporter" / "data" / "validation" / "prose.txt"
TOKENS, WINDOW = 2048, 512
_QUIET = 0.2  # CPUs that other processes may use
_MAX_CHARACTERS = 64 * TOKENS  # of a text; no tokenizer averages more characters per token
_EXPORT = "from llm_edge.exporter.cli import main; main()"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2 = "from llm_edge.checkpoint.download.smollm2 import smollm2_gguf; print(smollm2_gguf())"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def peers(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders from llm-export.")],
    source: Annotated[
        list[Path] | None,
        typer.Option(help="GGUF that a bundle was exported from; repeat it. Default: SmolLM2's, from the cache."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Comma-separated: ours, llama.cpp, genai, openvino, or engine/precision.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Fresh processes of each; medians are reported.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Measurements in each process, interleaved.")] = 5,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads per engine.")] = 2,
    without_amx: Annotated[bool, typer.Option("--without-amx", help="Disable AMX, which laptops lack.")] = False,
    text: Annotated[Path | None, typer.Option(help="Text for KL. Default: the shipped validation text.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for environments and converted models.")] = Path(".peers"),
    markdown: Annotated[Path | None, typer.Option(help="Write a section for bench/RESULTS.md.")] = None,
) -> None:
    """Measure speed, memory, size and KL of llama.cpp, onnxruntime-genai, OpenVINO GenAI and bundles, interleaved.

    Prints two tables per bundle, one of all bundles next to llama.cpp, and one JSON object as the last line. The first
    run installs the peers, which takes minutes.
    """
    options = Options(rounds, repeats, threads, without_amx, text or TEXT, work, markdown)
    raise typer.Exit(run(partial(_peers, bundles, source or [], only, options), native_output=True))


@dataclass(frozen=True, slots=True)
class Options:
    """How models are measured; see `peers`."""

    rounds: int
    repeats: int
    threads: int
    without_amx: bool
    text: Path
    work: Path
    markdown: Path | None


@dataclass(frozen=True, slots=True)
class Task:
    """A bundle to measure: names of the contenders, tokens of the text, and its source if it is needed."""

    bundle: Bundle
    names: list[str]
    tokens: list[int]
    source: Source | None


def _peers(paths: Sequence[Path], sources: Sequence[Path], only: str | None, options: Options) -> None:
    from llm_edge.bench.peers import report as tables
    from llm_edge.bench.peers import without_amx as amx
    from llm_edge.bench.peers.machine import busy_cpus
    from llm_edge.runtime.errors import InputError

    if options.without_amx and (reason := amx.problem()) is not None:
        raise InputError(f"--without-amx: {reason}")
    tasks = [_task(path, sources, only, options.text) for path in paths]
    options = replace(options, work=options.work.resolve())
    options.work.mkdir(parents=True, exist_ok=True)
    busy = busy_cpus()
    if busy is not None and busy > _QUIET:
        say(f"warning: others keep {busy:.1f} CPUs busy; engines whose threads wait for each other suffer most")
    reports = []
    for task in tasks:
        report = {**_measure(task, options), "busy_cpus": busy}
        reports.append(report)
        print_table(tables.engine_table(report["engines"]))
        if report["ratios"]:
            print()
            print_table(tables.ratio_table(report["ratios"]))
        print()
    if len(summary := tables.summary_table(reports)) > 1:
        print_table(summary)
    if options.markdown is not None:
        options.markdown.write_text(tables.markdown_of_all(reports), encoding="utf-8")
    print(json.dumps({"models": reports}))


def _task(path: Path, sources: Sequence[Path], only: str | None, text: Path) -> Task:
    """Check a bundle and find its source, before anything is measured."""
    from llm_edge.bench.driver import MIN_CONTEXT
    from llm_edge.bench.peers.engines import choose
    from llm_edge.bench.peers.environments import ENVIRONMENTS
    from llm_edge.runtime.bundle import Bundle
    from llm_edge.runtime.errors import InputError

    bundle = Bundle.open(path)
    names = choose(only, list(bundle.precisions))
    if bundle.shape.max_position_embeddings < MIN_CONTEXT:
        raise InputError(f"{path}: its context of {bundle.shape.max_position_embeddings} is shorter than {MIN_CONTEXT}")
    tokens = tokens_of(bundle, text)
    has_peers = any(name.startswith(f"{peer}/") for name in names for peer in ENVIRONMENTS)
    source = source_of(sources, bundle) if has_peers or "fp32" not in bundle.precisions else None
    bundle.verify()
    return Task(bundle, names, tokens, source)


def _measure(task: Task, options: Options) -> dict[str, Any]:
    """Measure the contenders of a bundle; see `report.markdown` for the result."""
    from llm_edge.bench.cli import machine
    from llm_edge.bench.driver import measure
    from llm_edge.bench.peers import report as tables
    from llm_edge.bench.peers.engines import make
    from llm_edge.bench.peers.environments import ENVIRONMENTS
    from llm_edge.bench.peers.machine import has_amx

    bundle, work = task.bundle, options.work
    prefix = (sys.executable, "-I", "-S", str(HERE / "without_amx.py")) if options.without_amx else ()
    made = make(task.names, bundle, task.source, work, options.threads, say)
    contenders = [contender.with_prefix(prefix) for contender in made]
    reference = _reference(bundle, task.source, work, options.threads)
    sizes = {contender.name: contender.size for contender in contenders}
    speeds = {each.name: each.speed for each in contenders}
    figures = measure(speeds, task.tokens, options.rounds, options.repeats, say)
    fidelities = _fidelities(contenders, reference, task.tokens, bundle.shape.vocab_size, work)
    peers_asked = [peer for peer in ENVIRONMENTS if any(name.startswith(f"{peer}/") for name in task.names)]
    return {
        "bundle": bundle.name,
        "machine": machine(),
        "amx": not options.without_amx if has_amx() else None,
        "threads": options.threads,
        "rounds": options.rounds,
        "repeats": options.repeats,
        "text": options.text.name,
        "positions": min(len(task.tokens), TOKENS),
        "versions": {peer: ENVIRONMENTS[peer].version for peer in peers_asked},
        "engines": tables.summarise(sizes, figures, fidelities),
        "ratios": tables.ratios(sizes, figures),
    }


def tokens_of(bundle: Bundle, path: Path) -> list[int]:
    """Tokens of a text, enough to measure with."""
    from llm_edge.runtime.errors import InputError
    from llm_edge.runtime.safe_io import MIB, read_text
    from llm_edge.runtime.text.tokenizer import Tokenizer

    text = read_text(path, 16 * MIB, error=InputError)[:_MAX_CHARACTERS]
    tokenizer = Tokenizer.from_files(bundle.file("tokenizer.json"), bundle.json("tokenizer_config.json"), None)
    tokens = tokenizer.encode(text)
    if len(tokens) < WINDOW:
        raise InputError(f"--text: {path} has {len(tokens)} tokens, {WINDOW} are needed: give a longer text")
    return tokens


def source_of(paths: Sequence[Path], bundle: Bundle) -> Source:
    """The GGUF that a bundle was exported from, among the given ones and SmolLM2's."""
    from llm_edge.bench.peers.engines import Source
    from llm_edge.runtime.errors import InputError

    for path in paths:
        if not path.is_file():
            raise InputError(f"--source: {path} is no file: give the GGUF that the bundle was made of")
    made_of = bundle.manifest.get("source")
    files = made_of.get("files") if isinstance(made_of, dict) else None
    entries = [entry for entry in files if type(entry) is dict] if isinstance(files, list) else []
    hashes = {entry.get("sha256") for entry in entries}
    is_smollm2 = any(entry.get("name") == _SMOLLM2_FILE for entry in entries)
    candidates = [*paths, *([_smollm2()] if is_smollm2 or not paths else [])]
    for path in candidates:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest in hashes:
            return Source(path.resolve(), digest[:12], bundle.path.resolve())
    given = ", ".join(map(str, candidates))
    raise InputError(f"{bundle.path} was not made of {given}: give the GGUF it was made of by --source")


def _smollm2() -> Path:
    from llm_edge.runtime.errors import MachineError

    done = subprocess.run([sys.executable, "-c", _SMOLLM2], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise MachineError("SmolLM2's GGUF cannot be fetched: run llm-export smollm2 once, or give one by --source")
    return Path(done.stdout.strip())


def _reference(bundle: Bundle, source: Source | None, work: Path, threads: int) -> Sequence[str]:
    """Command of a worker that computes fp32 logits: of the bundle, or of one exported and verified for this."""
    from llm_edge.bench.peers.engines import our_logits
    from llm_edge.bench.peers.environments import call

    path = bundle.path
    if "fp32" not in bundle.precisions:
        assert source is not None
        path = work / "fp32" / source.key
        if not path.exists():
            say("exporting fp32 to compare with")
            path.parent.mkdir(exist_ok=True)
            command = [sys.executable, "-c", _EXPORT, str(source.gguf), "--precision", "fp32", "-o", str(path)]
            call(command, path.parent / "export.log", "llm-export")
    return our_logits(path, "fp32", threads)


def _fidelities(
    contenders: Sequence[Contender], reference: Sequence[str], tokens: Sequence[int], vocab_size: int, work: Path
) -> dict[str, Fidelity]:
    """The fidelity of each contender, each in a separate process."""
    from llm_edge.bench.peers.fidelity import compare, windows

    text = windows(tokens, TOKENS, WINDOW)
    found = {}
    with tempfile.TemporaryDirectory(prefix="logits-", dir=work) as folder:
        expected = _logits(reference, text, Path(folder), "fp32")
        for contender in contenders:
            say(f"comparing {contender.name} with fp32")
            files = _logits(contender.logits, text, Path(folder), "other")
            found[contender.name] = compare(expected, files, vocab_size)
    return found


def _logits(command: Sequence[str], text: Sequence[Sequence[int]], folder: Path, stem: str) -> list[Path]:
    """Files of a worker's logits, one per window."""
    from llm_edge.bench.driver import Worker

    files = [folder / f"{stem}-{number}" for number in range(len(text))]
    worker = Worker(command)
    try:
        for window, file in zip(text, files, strict=True):
            worker.ask(logits=window, to=str(file))
    finally:
        worker.close()
    return files


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a title row and rows of cells."""
    from rich.console import Console
    from rich.table import Table

    title, *body = rows
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(title):
        table.add_column(name, justify="right" if number else "left")
    for cells in body:
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def say(text: str) -> None:
    """Print a message on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
