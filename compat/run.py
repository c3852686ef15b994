"""`make compat`: a bundle, unmodified, gives the same greedy tokens in other runtimes as in ours.

This creates an environment for each consumer and compares; the `consume_*` scripts call the consumers, offline and
without llm-edge. Environments are in `.compat/`, created on first use and again when their pins change. Exit codes: 0
all equal; 1 something differs; 2 bad usage; 3 an environment could not be created.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_edge.runtime.bundle import Bundle, PrecisionInfo

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent / ".compat"
TEXT = HERE.parent / "exporter" / "data" / "validation" / "prose.txt"
LONG_PROMPT = 300
TIME_LIMIT = 900  # seconds for one consumer and precision

# A consumer's onnxruntime may sum in another order. A token may differ only where its logit is this close to the best
# one in our runtime; 8-bit activations amplify differences of 1e-5 to tenths.
MARGIN_FP32 = 1e-3
MARGIN_QUANTIZED = 0.3

# Warnings of consumers about a valid bundle, and why they are harmless.
HARMLESS: Mapping[str, str] = {
    r"Initializer num_logits_to_keep appears in graph inputs": "meant so: an input with a default; it folds nothing",
    r"legacy ONNX model with no `position_ids` input": "the graph counts positions from attention_mask by itself",
}
FAILURE = re.compile(r"\[E:onnxruntime|Traceback|\berror\b|\bexception\b", re.IGNORECASE)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class InstallError(Exception):
    """A consumer could not be installed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat (`messages`) or a plain text, and the tokens that our runtime generates."""

    name: str
    job: Mapping[str, Any]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Consumer:
    """Another runtime to check.

    Attributes:
        name: in the table and for `--only`.
        pins: files that pin its environment.
        make: creates the environment in an empty folder.
        command: starts its script in that folder.
    """

    name: str
    pins: tuple[str, ...]
    make: Callable[[Path], None]
    command: Callable[[Path], list[str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row of the table.

    Attributes:
        consumer: its name.
        version: of the consumer and of the onnxruntime under it.
        precision: name in the bundle.
        chosen: how the graph was selected.
        equal: number of prompts with exactly our tokens, and of prompts.
        good: no failure, and no difference beyond the margin.
        notes: further remarks.
    """

    consumer: str
    version: str
    precision: str
    chosen: str
    equal: str
    good: bool
    notes: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, compare, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path, help="bundle folder from llm-export")
    parser.add_argument("--only", default=",".join(CONSUMERS), help="consumers, comma-separated (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to generate after each prompt (%(default)s)")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in CONSUMERS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is not known; known: {', '.join(CONSUMERS)}")

    from llm_edge.runtime.errors import LlmEdgeError

    try:
        outcomes = compare([CONSUMERS[name] for name in names], options.bundle.resolve(), options.tokens)
    except LlmEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print_table(outcomes)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def compare(consumers: Sequence[Consumer], path: Path, tokens: int, *, unlisted: bool = False) -> list[Outcome]:
    """Run every consumer on every precision, also `unlisted` ones in the manifest; the bundle must not change."""
    from llm_edge.runtime import Model, SamplingParams
    from llm_edge.runtime.bundle import Bundle

    bundle = Bundle.open(path)
    bundle.verify()
    files = sorted(path.rglob("*"))
    environments = {consumer.name: environment(consumer) for consumer in consumers}

    outcomes = []
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens)
    for info in bundle.precisions.values():
        model = Model.load(path, info.name)
        prompts = make_prompts(model.tokenizer)
        ours = [model.generate(prompt.ids, greedy).result().tokens for prompt in prompts]
        del model
        takers = bundle.manifest["precisions"][info.name].get("runtimes", CONSUMERS)
        for consumer in consumers:
            if consumer.name not in takers and not unlisted:
                outcomes.append(Outcome(consumer.name, "", info.name, "not in the manifest", "", good=True, notes=()))
                continue
            print(f"{info.name} in {consumer.name} …", file=sys.stderr, flush=True)
            outcomes.append(judge(consumer, environments[consumer.name], bundle, info, prompts, ours, tokens))
    bundle.verify()
    assert sorted(path.rglob("*")) == files, f"a consumer left files in {path}"
    return outcomes


def make_prompts(tokenizer: Any) -> list[Prompt]:
    """A short chat, some code, and a long text."""
    messages = [{"role": "user", "content": "Write two sentences about the sea."}]
    code = 'def is_prime(n: int) -> bool:\n    """Return True if n is a prime number."""\n'
    text = TEXT.read_text(encoding="utf-8")
    long = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:LONG_PROMPT])
    return [
        Prompt("chat", {"messages": messages}, tuple(tokenizer.encode_chat(messages))),
        *(
            Prompt(name, {"text": text}, tuple(tokenizer.encode(text, add_special_tokens=True)))
            for name, text in (("code", code), ("long", long))
        ),
    ]


def judge(
    consumer: Consumer,
    folder: Path,
    bundle: Bundle,
    info: PrecisionInfo,
    prompts: Sequence[Prompt],
    ours: Sequence[Sequence[int]],
    tokens: int,
) -> Outcome:
    """Run one consumer on one precision and compare its results."""
    job = {
        "bundle": str(bundle.path),
        "model": info.model,
        "prompts": [prompt.job for prompt in prompts],
        "tokens": tokens,
    }
    answer, messages = run(consumer, folder, job)
    notes = [line for line in messages if not any(re.search(known, line) for known in HARMLESS)]
    if answer is None:
        return Outcome(consumer.name, "", info.name, "", f"0/{len(prompts)}", good=False, notes=tuple(notes[-8:]))
    good = not any(FAILURE.search(note) for note in notes)
    equal = 0
    for prompt, expected, got in zip(prompts, ours, answer["answers"], strict=True):
        if tuple(got["prompt"]) != prompt.ids:
            good = False
            notes.append(f"{prompt.name}: it encodes the prompt otherwise: {got['prompt'][:12]} … {len(got['prompt'])}")
            continue
        same = next((i for i, pair in enumerate(zip(expected, got["tokens"], strict=False)) if len({*pair}) > 1), None)
        if same is None:
            if len(expected) == len(got["tokens"]):
                equal += 1
            else:
                good = False
                notes.append(f"{prompt.name}: it ended after {len(got['tokens'])} tokens, we after {len(expected)}")
            continue
        gap = logit_gap(bundle, info, prompt.ids, expected[:same], got["tokens"][same])
        margin = MARGIN_FP32 if info.name == "fp32" else MARGIN_QUANTIZED
        good = good and gap <= margin
        verdict = f"within {margin:g}" if gap <= margin else f"more than {margin:g}"
        notes.append(
            f"{prompt.name}: token {same + 1} is {got['tokens'][same]}, ours {expected[same]}, "
            f"whose logit is {gap:.2g} higher ({verdict})"
        )
    version = f"{answer['version']} (onnxruntime {answer['onnxruntime']})"
    return Outcome(consumer.name, version, info.name, answer["chosen"], f"{equal}/{len(prompts)}", good, tuple(notes))


def run(consumer: Consumer, folder: Path, job: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """Run a consumer's script; returns its result (None if it failed) and its messages."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        try:
            done = subprocess.run(  # noqa: S603 - our own scripts
                [*consumer.command(folder), str(answer)],
                input=json.dumps(job),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=TIME_LIMIT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "PYTHONNOUSERSITE": "1"},
            )
        except subprocess.TimeoutExpired:
            return None, [f"error: no answer within {TIME_LIMIT} s"]
        messages = [line for line in (COLOUR.sub("", line).strip() for line in done.stdout.splitlines()) if line]
        if done.returncode != 0:
            return None, [*messages, f"error: exit status {done.returncode}"]
        return json.loads(answer.read_text(encoding="utf-8")), messages


def logit_gap(bundle: Bundle, info: PrecisionInfo, prompt: Sequence[int], tokens: Sequence[int], theirs: int) -> float:
    """The difference between the best logit after prompt and tokens and that of another token, in our runtime."""
    from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
    from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
    from llm_edge.runtime.backend.open import open_session

    session = open_session(GraphFile.of(bundle, info), ExecutionOptions("cpu"))
    for start in range(0, len(prompt), MAX_STEP_TOKENS):
        logits = session.step(prompt[start : start + MAX_STEP_TOKENS])
    for token in tokens:
        logits = session.step([token])
    return float(logits[-1].max() - logits[-1][theirs])


def environment(consumer: Consumer) -> Path:
    """The folder of a consumer's environment, created again if its pins changed."""
    folder = ENVIRONMENTS / consumer.name
    stamp = folder / "made-of.txt"
    pins = "\n".join((HERE / name).read_text(encoding="utf-8") for name in consumer.pins)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != pins:
        print(f"making {folder} …", file=sys.stderr, flush=True)
        began = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        consumer.make(folder)
        stamp.write_text(pins, encoding="utf-8")
        print(f"made in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return folder


def make_venv(requirements: str) -> Callable[[Path], None]:
    """A function that creates a Python environment."""

    def make(folder: Path) -> None:
        install([sys.executable, "-m", "venv", str(folder)])
        install([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(HERE / requirements)])

    return make


def make_node_modules(folder: Path) -> None:
    """Install package-lock.json without running package scripts."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        raise InstallError("transformers.js needs node (20 or newer) and npm; leave it out with --only")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    install(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)])


def install(command: list[str]) -> None:
    """Run an installer.

    Raises:
        InstallError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
    if done.returncode != 0:
        messages = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise InstallError(f"{' '.join(command)} failed:\n{messages}")


def python_script(name: str) -> Callable[[Path], list[str]]:
    """The command that runs one of our scripts in a Python environment."""
    return lambda folder: [str(folder / "bin" / "python"), str(HERE / name)]


def node_script(folder: Path) -> list[str]:
    """The command that runs our script next to node_modules, where Node looks for imports."""
    return ["node", str(shutil.copy(HERE / "consume_transformers_js.mjs", folder))]


CONSUMERS: Mapping[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer(
            "onnxruntime-genai",
            ("requirements-genai.txt",),
            make_venv("requirements-genai.txt"),
            python_script("consume_genai.py"),
        ),
        Consumer(
            "optimum",
            ("requirements-optimum.txt",),
            make_venv("requirements-optimum.txt"),
            python_script("consume_optimum.py"),
        ),
        Consumer("transformers.js", ("package.json", "package-lock.json"), make_node_modules, node_script),
    )
}


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print a row per consumer and precision, followed by remarks."""
    header = ("consumer", "version", "precision", "graph chosen", "prompts equal", "")
    rows = [(o.consumer, o.version, o.precision, o.chosen, o.equal, "ok" if o.good else "FAILED") for o in outcomes]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    print(line(header))
    for outcome, row in zip(outcomes, rows, strict=True):
        print(line(row))
        for note in outcome.notes:
            print(f"    {note[:300]}")


if __name__ == "__main__":
    sys.exit(main())
