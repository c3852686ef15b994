"""`export_and_compare`: exports a trained model, and compares the bundle with that of the model before training."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_edge.finetune.data.sample import Sample
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.errors import InputError, LlmEdgeError, MachineError, ParityError
from llm_edge.runtime.model import Model
from llm_edge.runtime.safe_io import write_atomically
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.answer_stream import AnswerStream
from llm_edge.runtime.text.prompts import PromptFormat, PromptProcessor
from llm_edge.runtime.text.reasoning_parser import reasoning_parser

PRECISIONS = ("int8", "int4")
SHORT_ANSWER = 32  # tokens; longer answers can be right in many ways
MAX_QUESTIONS = 50  # that are answered, for each bundle and precision
_SHOWN = 3  # questions whose answers are kept
_TEMPORARY = ".comparison-"
_EXPORT = "import sys; sys.argv[0] = 'llm-export'; from llm_edge.exporter.cli import main; main()"
_ERRORS: dict[int, type[LlmEdgeError]] = {1: ParityError, 2: InputError, 3: MachineError}


@dataclass(frozen=True, slots=True)
class Quality:
    """What a bundle achieves on the evaluation samples in one precision.

    Attributes:
        loss: mean cross-entropy of the answers' tokens.
        matches: number of short answers that are generated exactly, greedily; reasoning is not compared.
        short: number of short answers, at most `MAX_QUESTIONS`.
        answers: to the first questions.
    """

    loss: float
    matches: int
    short: int
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """The last question of a conversation and its expected answer, as text."""

    prompt: str
    expected: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The bundle of a trained model next to that of the model before training.

    Attributes:
        bundle: folder of the exported model.
        before, after: quality by precision.
        questions: those of `Quality.answers`.
    """

    bundle: Path
    before: dict[str, Quality]
    after: dict[str, Quality]
    questions: tuple[Question, ...]

    @property
    def worse(self) -> tuple[str, ...]:
        """The precisions in which the loss rose."""
        return tuple(name for name, quality in self.after.items() if quality.loss > self.before[name].loss)


def export_and_compare(
    before: Sequence[str], trained: Path, samples: Sequence[Sample], report: Callable[[str], None]
) -> Comparison:
    """Export a trained model to the folder `bundle` in it, or to `bundle-worse` if the loss rose in any precision.

    The comparison is also written to `comparison.json`, next to the bundle. An earlier bundle in the folder is replaced
    only by one that is not worse.

    Args:
        before: the model before training: source and options, as arguments of llm-export.
        trained: folder of the trained model.
        samples: evaluation samples; at least one.
        report: called with a line when a step begins.

    Raises:
        InputError: a model cannot be exported.
        ParityError: a graph does not compute what the model computes.
        MachineError: disk or memory is full.
    """
    for left in trained.glob(f"{_TEMPORARY}*"):  # by a comparison that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=trained) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        report(f"exporting and verifying the trained model ({', '.join(PRECISIONS)})")
        _export([str(trained)], new, "--validate")
        report("exporting the model before training, for comparison")
        _export(before, old, "--no-validate")
        after, first = {}, {}
        for precision in PRECISIONS:
            report(f"comparing on {len(samples):,} evaluation samples: {precision}")
            first[precision] = measure(old, precision, samples)
            after[precision] = measure(new, precision, samples)
        found = Comparison(trained / "bundle", first, after, _questions(new, samples[:_SHOWN]))
        if found.worse:
            found = dataclasses.replace(found, bundle=trained / "bundle-worse")
        if found.bundle.exists():
            shutil.rmtree(found.bundle)
        new.rename(found.bundle)
    content = {**dataclasses.asdict(found), "bundle": found.bundle.name, "worse": found.worse}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(trained / "comparison.json", f"{text}\n".encode())
    return found


def measure(bundle: Path, precision: str, samples: Sequence[Sample]) -> Quality:
    """Measure a precision of a bundle with the runtime."""
    model = Model.load(bundle, precision, provider="cpu")
    prompts = _prompts(model.bundle, model)
    loss = 0.0
    for sample in samples:
        logprobs = model.score(sample.ids).logprobs  # of all ids but the first, which is never trained
        loss -= sum(each for each, trained in zip(logprobs, sample.trained[1:], strict=True) if trained)
    matches = short = 0
    answers: list[str] = []
    for sample in samples[:MAX_QUESTIONS]:
        expected = _answer_text(prompts, sample, sample.answer)
        is_short = len(prompts.tokenizer.encode(expected)) <= SHORT_ANSWER
        if not is_short and len(answers) == _SHOWN:
            continue
        limit = 2 * len(sample.answer) + SHORT_ANSWER
        generated = model.generate(sample.prompt, SamplingParams(temperature=0.0, max_tokens=limit)).result().tokens
        answer = _answer_text(prompts, sample, generated)
        short += is_short
        matches += is_short and answer == expected
        if len(answers) < _SHOWN:
            answers.append(answer)
    return Quality(loss / sum(sample.targets for sample in samples), matches, short, tuple(answers))


def _prompts(bundle: Bundle, model: Model) -> PromptProcessor:
    return PromptProcessor(PromptFormat.of_bundle(bundle), model.tokenizer)


def _answer_text(prompts: PromptProcessor, sample: Sample, tokens: Sequence[int]) -> str:
    """The text of an answer to the prompt of a sample, without reasoning and surrounding white space."""
    parser = reasoning_parser(prompts.delimiters, prompts.tokenizer, sample.prompt, prompts.end_tokens)
    stream = AnswerStream(parser, ())
    kept = [token for token in tokens if token not in prompts.end_tokens]
    deltas = [delta for token in kept for delta in stream.push(token)]
    return "".join(delta.text for delta in (*deltas, stream.flush()) if not delta.reasoning).strip()


def _questions(bundle: Path, samples: Sequence[Sample]) -> tuple[Question, ...]:
    model = Model.load(bundle, PRECISIONS[0], provider="cpu")
    prompts = _prompts(model.bundle, model)
    decode = prompts.tokenizer.decode
    return tuple(
        Question(decode(sample.prompt, skip_special=False), _answer_text(prompts, sample, sample.answer))
        for sample in samples
    )


def _export(source: Sequence[str], bundle: Path, validate: str) -> None:
    """Run llm-export as a process; raises the error that it reports."""
    options = ("-o", str(bundle), "--precision", ",".join(PRECISIONS), "--progress", "none", validate)
    command = [sys.executable, "-P", "-c", _EXPORT, *options, *source]  # -P: nothing is imported from this folder
    try:
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)  # noqa: S603
    except OSError as error:
        raise MachineError(f"llm-export could not be started: {error}") from error
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), f"exit code {done.returncode}")
        kind = _ERRORS.get(done.returncode, MachineError)
        raise kind(f"llm-export failed for {source[-1]}: {reason.removeprefix('error: ')}")


def print_comparison(comparison: Comparison) -> None:
    """Print loss and exact matches of both bundles, some answers next to each other, and the bundle if it is better."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("precision", "loss before", "after", "exact answers before", "after"):
        table.add_column(name, justify="left" if name == "precision" else "right")
    for precision, after in comparison.after.items():
        before = comparison.before[precision]
        matches = (f"{quality.matches} of {quality.short}" for quality in (before, after))
        table.add_row(precision, f"{before.loss:.4f}", f"{after.loss:.4f}", *matches)
    console.print(table)
    first = PRECISIONS[0]
    for i, question in enumerate(comparison.questions):
        texts = (
            question.prompt,
            question.expected,
            comparison.before[first].answers[i],
            comparison.after[first].answers[i],
        )
        for label, text in zip(("question", "expected", f"before ({first})", f"after ({first})"), texts, strict=True):
            console.print(Text(f"{label:<14} {_one_line(text)}"), soft_wrap=True)
        console.print()
    if not comparison.worse:
        print(f"Bundle: {comparison.bundle}    Try: llm-chat {comparison.bundle}")


def _one_line(text: str, limit: int = 300) -> str:
    """A text as one line without control characters, its beginning left out if it is too long."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return line if len(line) <= limit else f"…{line[-limit:]}"
