"""Exports tiny models of several kinds to int8 and int4 and talks to them: `make end-to-end`.

Of each: the report, a chat by the model's template, eight callers of an engine, a second turn that continues the first
one, a cancelled answer, and a cache that is saved and loaded. Answers have to be those of a model that has one caller.
Of several callers they may differ from a token on that was nearly as likely: kernels of experts sum in another order
for other numbers of tokens, and rounded activations enlarge that.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from general_models import save

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime import FinishReason, GenerationResult, Model, SamplingParams
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.scheduling.prefixes import aligned_prefix

KINDS = (
    *("gpt_oss", "qwen3_moe", "qwen3_5", "gemma4", "lfm2", "granitemoehybrid", "deepseek_v3", "gemma3", "glm4_moe"),
    *("falcon_h1", "nemotron_h", "qwen3_next"),
)
PARAMS = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=24, logprobs=5)
TIE = 0.05  # difference of log-probabilities
SYSTEM = "The quick brown fox jumps over the lazy dog. " * 5
QUESTIONS = [SYSTEM * (number % 3) + f"Question {number}: what is the capital of France?" for number in range(8)]


class Talk:
    """Checks of one precision of a bundle."""

    def __init__(self, bundle: Path, precision: str) -> None:
        self.bundle, self.precision = bundle, precision
        self.model = Model.load(bundle, precision, provider="cpu", threads=1)

    def alone(self, tokens: Sequence[int]) -> GenerationResult:
        """An answer that nothing cached contributes to."""
        self.model.clear_cache()
        return self.model.generate(list(tokens), PARAMS).result()

    def engine(self) -> Engine:
        return Engine.load(self.bundle, self.precision, threads=1)

    def chat(self) -> bool:
        messages = [{"role": "user", "content": QUESTIONS[1]}]
        tokens = self.model.encode_chat(messages)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.bundle)
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return list(tokens) == list(wanted) and _is_same(self.model.chat(messages, PARAMS).result(), self.alone(tokens))

    def eight_callers(self) -> bool:
        prompts = [self.model.encode_prompt(question) for question in QUESTIONS]
        wanted = [self.alone(prompt) for prompt in prompts]
        with contextlib.closing(self.engine()) as engine:
            answers = [engine.generate(prompt, PARAMS) for prompt in prompts]
            return all(_is_same(answer.result(), each) for answer, each in zip(answers, wanted, strict=True))

    def second_turn(self) -> bool:
        with contextlib.closing(self.engine()) as engine:
            prompt = self.model.encode_prompt(SYSTEM)
            first = engine.generate(prompt, PARAMS).result()
            turn = [*prompt, *first.tokens, *self.model.encode_prompt("And of Spain?")]
            second = engine.generate(turn, PARAMS).result()
            self.alone(prompt)  # rounded activations depend on what is computed in one pass: continue likewise
            wanted = self.model.generate(turn, PARAMS).result()
            return second.timings.cached_tokens >= len(prompt) and second.tokens == wanted.tokens

    def cancelled(self) -> bool:
        with contextlib.closing(self.engine()) as engine:
            prompt = self.model.encode_prompt(SYSTEM)
            generation = engine.generate(prompt, PARAMS)
            tokens = [chunk.token for chunk in itertools.islice(generation, 5)]
            generation.cancel()
            ended = generation.result().finish_reason is FinishReason.CANCELLED
            again = engine.generate(prompt, PARAMS).result()
            return ended and again.timings.cached_tokens > 0 and list(again.tokens[:5]) == tokens

    def saved_cache(self) -> bool:
        prompt = self.model.encode_prompt(SYSTEM)
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(self.engine()) as first:
            wanted = first.generate(prompt, PARAMS).result().tokens
            saved = first.save_cache(Path(folder) / "cache.npz", prompt)
            with contextlib.closing(self.engine()) as second:
                loaded = second.load_cache(Path(folder) / "cache.npz")
                result = second.generate(prompt, PARAMS).result()
                reused = result.timings.cached_tokens >= aligned_prefix(saved, len(prompt))
                return loaded == saved > 0 and reused and result.tokens == wanted


def _is_same(found: GenerationResult, wanted: GenerationResult) -> bool:
    """Whether the tokens are the same up to one that was nearly as likely."""
    assert wanted.logprobs is not None
    for token, each in zip(found.tokens, wanted.logprobs, strict=True):
        if token != each.token:
            return dict(each.top).get(token, -float("inf")) > each.logprob - TIE
    return True


CHECKS: tuple[Callable[[Talk], bool], ...] = (
    *(Talk.chat, Talk.eight_callers, Talk.second_turn, Talk.cancelled, Talk.saved_cache),
)


def check(kind: str, folder: Path) -> int:
    """Print a line for each precision of a kind; return the number of checks that failed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        source = save(kind, folder / "source", eos_token_id=None)
        report = export(str(source), ExportOptions(output=folder / "bundle", precision="int8,int4"))
    assert report.validation is not None
    proven, failed = report.validation.parities["fp32"].worst.max, 0
    for precision, quality in report.validation.qualities.items():
        talk = Talk(folder / "bundle", precision)
        results = {each.__name__: each(talk) for each in CHECKS}
        wrong = [name for name, right in results.items() if not right]
        failed += len(wrong)
        outcome = f"differ: {' '.join(wrong)}" if wrong else "as if alone"
        print(f"{kind}\t{precision}\tfp32 {proven:.1e}\tKL {quality.kl_mean:.1e}\t{outcome}", flush=True)
    return failed


def main() -> None:
    """Check the named architectures, or all."""
    failed = 0
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            failed += check(kind, Path(folder))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
