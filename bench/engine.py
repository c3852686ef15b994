"""`python -m llm_edge.bench.engine BUNDLE [--precision P] [PART …]`: an engine's performance, as ratios within one run.

Parts: streams (tokens/s of 1 to 16 concurrent answers), turn (first token of a second turn), speculation (speculative
decoding on and off, on copied text and prose), stall (a long prompt among running answers), part (share of Python),
sampling (a draw against a step), texts (how often speculative decoding changes a text), drift (memory after 10,000
requests; a small model is enough).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_edge.bench.copying import COPYING, PROSE
from llm_edge.runtime.command import run
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.results import GenerationResult
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler

WIDTHS = (1, 2, 4, 8, 16)
TOKENS = 96
ROUNDS = 5


def _exactly(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count)


_NEVER = _exactly(TOKENS)


def chat(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def streams(engine: Engine) -> None:
    """Total tokens/s while all answers are running."""
    prompt = engine.tokenizer.encode(" ".join(PROSE * 4))[:100]
    rates: dict[tuple[int, bool], list[float]] = {
        (width, speculative): [] for width in WIDTHS for speculative in (False, True)
    }
    for number in range(ROUNDS):
        for width, engine.speculative in rates:
            prompts = [[*prompt[number + index :], *prompt[: number + index]] for index in range(width)]
            for each in prompts:
                engine.generate(each, SamplingParams(temperature=0.0, max_tokens=1)).result()
            rates[width, engine.speculative].append(together(engine, prompts))
    for speculative in (False, True):
        one = statistics.median(rates[1, speculative])
        for width in WIDTHS:
            rate = statistics.median(rates[width, speculative])
            print(
                f"streams {width:2}, {'with' if speculative else 'no'} speculation: "
                f"{rate:6.0f} tok/s, {rate / one:.2f} x one"
            )


def together(engine: Engine, prompts: Sequence[list[int]], count: int = TOKENS) -> float:
    """Tokens/s from the start of the last answer to the end of the first, of answers that are long enough for that."""
    for factor in (1, 2, 4, 8):
        times = token_times(engine, prompts, factor * count)
        begin, end = max(when[0] for when in times), min(when[-1] for when in times)
        if end > begin:
            return sum(begin < moment <= end for when in times for moment in when) / (end - begin)
    raise LlmEdgeError(f"{len(prompts)} answers of {factor * count} tokens never ran at the same time")


def token_times(engine: Engine, prompts: Sequence[list[int]], count: int) -> list[list[float]]:
    """When each token of each answer arrived, in seconds."""
    times: list[list[float]] = [[] for _ in prompts]

    def read(answer: AsyncGeneration, when: list[float]) -> None:
        when += [time.perf_counter() for _ in answer]

    answers = [engine.generate(each, _exactly(count)) for each in prompts]
    readers = [threading.Thread(target=read, args=pair) for pair in zip(answers, times, strict=True)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return times


def turn(engine: Engine) -> None:
    """Time to the first token of a second turn, relative to computing all of it again."""
    text = " ".join(f"Item {number} is described in chapter {number * 7 % 50}." for number in range(115))
    ratios, lengths = [], []
    for number in range(ROUNDS):
        messages = [*chat(f"Round {number}. {text}")]
        first = engine.chat(messages, _NEVER).result()
        messages += [{"role": "assistant", "content": first.text}, *chat("And what comes next?")]
        again = engine.chat(messages, _NEVER).result()
        fresh = engine.chat([*chat(f"Other {number}. {text}"), *messages[1:]], _NEVER).result()
        lengths.append(again.timings.prompt_tokens)
        ratios.append(again.timings.time_to_first_token / fresh.timings.time_to_first_token)
        computed = again.timings.prompt_tokens - again.timings.cached_tokens
    print(f"turn two: {lengths[-1]} tokens, {computed} of them computed, {statistics.median(ratios):.1%} of the time")


def speculation(engine: Engine) -> None:
    """Greedy decoding speed with speculative decoding against without."""
    for name, prompts in (("copying", COPYING), ("prose", PROSE)):
        ratios = []
        for text in prompts:
            rates: dict[bool, list[float]] = {True: [], False: []}
            accepted = drafted = 0
            for _ in range(3):
                for speculative in (True, False):
                    engine.speculative = speculative
                    result = engine.chat(chat(text), SamplingParams(temperature=0.0, max_tokens=200)).result()
                    rates[speculative].append(result.timings.decode_tokens_per_second)
                    accepted += result.timings.accepted_tokens
                    drafted += result.timings.draft_tokens
            ratio = statistics.median(rates[True]) / statistics.median(rates[False])
            ratios.append(ratio)
            print(
                f"  {text[:40]!r}: {ratio:.2f} x, {accepted}/{drafted} draft tokens accepted, "
                f"{len(result.tokens)} tokens"
            )
        print(f"speculation, {name}: median {statistics.median(ratios):.2f} x, minimum {min(ratios):.2f} x")
    engine.speculative = True


def stall(engine: Engine) -> None:
    """Gaps between the tokens of 4 answers, before and during a prompt of 2,000 tokens."""
    engine.speculative = False
    gaps: list[tuple[float, float]] = []
    params = SamplingParams(temperature=0.0, max_tokens=400, min_tokens=400)

    def read(answer: AsyncGeneration) -> None:
        last = None
        for _ in answer:
            now = time.perf_counter()
            if last is not None:
                gaps.append((now, now - last))
            last = now

    answers = [engine.chat(chat(text), params) for text in PROSE[:4]]
    readers = [threading.Thread(target=read, args=(answer,)) for answer in answers]
    for reader in readers:
        reader.start()
    time.sleep(1.5)
    vocabulary = np.random.default_rng(int(time.time())).integers(300, 20_000, 2000).tolist()
    began = time.perf_counter()
    engine.generate(vocabulary, SamplingParams(temperature=0.0, max_tokens=1)).result()
    ended = time.perf_counter()
    for answer, reader in zip(answers, readers, strict=True):
        answer.cancel()
        reader.join()
    engine.speculative = True
    usual = statistics.median(gap for when, gap in gaps if when < began)
    during = sorted(gap for when, gap in gaps if began <= when <= ended)
    middle, late = statistics.median(during), during[int(0.95 * len(during))]
    print(
        f"stall: gap {usual * 1e3:.1f} ms alone; while 2,000 tokens are computed ({ended - began:.1f} s) median "
        f"{middle / usual:.2f} x, 95 % {late / usual:.2f} x, maximum {during[-1] / usual:.2f} x"
    )


def part(engine: Engine) -> None:
    """Share of a decode step outside onnxruntime."""
    shares, params = [], SamplingParams(temperature=0.0, max_tokens=TOKENS)
    engine.speculative = False
    for _ in range(ROUNDS):
        engine.chat(chat(PROSE[0]), replace(params, max_tokens=1)).result()
        before = engine.run_seconds
        result = engine.chat(chat(PROSE[0]), params).result()
        whole = result.timings.time_to_first_token + result.timings.decode_seconds
        shares.append(1 - (engine.run_seconds - before) / whole)
    engine.speculative = True
    print(f"Python's share of one answer: {statistics.median(shares):.1%}, of {len(result.tokens)} tokens")


def sampling(engine: Engine) -> None:
    """Duration of a draw relative to a decode step."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 3, (50, 50_000)).astype(np.float32)
    result = engine.chat(chat(PROSE[1]), _NEVER).result()
    step = result.timings.decode_seconds / (len(result.tokens) - 1)
    usual: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 1}
    more = {"min_p": 0.02, "typical_p": 0.97, "top_n_sigma": 3.0, "xtc_probability": 0.1, "dry_multiplier": 0.8}
    more |= {"presence_penalty": 0.1, "frequency_penalty": 0.1, "no_repeat_ngram": 4, "min_tokens": 1}
    for name, params in (("usual", usual), ("everything", {**usual, **more})):
        sampler = Sampler(SamplingParams(**params), list(range(100)))
        took = []
        for row in rows:
            began = time.perf_counter()
            sampler.sample(row)
            took.append(time.perf_counter() - began)
        middle = statistics.median(took)
        print(f"sampling, {name}: {middle * 1e6:.0f} us, {middle / step:.1%} of a step of {step * 1e3:.1f} ms")


def texts(engine: Engine) -> None:
    """How often speculative decoding changes a text, and how close the two tokens were where they diverge."""
    params = SamplingParams(temperature=0.0, max_tokens=200, logprobs=20)

    def run(speculative: bool) -> list[GenerationResult]:
        engine.speculative = speculative
        return [engine.chat(chat(text), params).result() for text in (*COPYING, *PROSE)]

    with_speculation, without = run(True), run(False)
    engine.speculative = True
    gaps, tokens = [], 0
    for one, other in zip(with_speculation, without, strict=True):
        pairs = list(zip(one.tokens, other.tokens, strict=False))
        place = next((index for index, pair in enumerate(pairs) if pair[0] != pair[1]), len(pairs))
        tokens += place
        if place < len(pairs):
            known = dict(other.logprobs[place].top)
            gaps.append(other.logprobs[place].logprob - known.get(one.tokens[place], -np.inf))
    print(
        f"texts: {len(gaps)} of {len(without)} greedy texts diverge, once in {tokens / max(len(gaps), 1):.0f} tokens, "
        f"where the other token was less probable by exp({statistics.median(gaps) if gaps else 0:.2f}), exp("
        f"{max(gaps, default=0):.2f}) at most"
    )


def drift(engine: Engine, requests: int = 10_000) -> None:
    """Memory, threads and open files after many requests, against after the first 500."""
    begun = (0.0, 0, 0)
    for number in range(requests):
        prompt = f"Request {number % 700}: {PROSE[number % len(PROSE)]}"
        engine.generate(prompt, SamplingParams(temperature=1.0, max_tokens=2, seed=number)).result()
        if number + 1 in (500, requests):
            memory = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()  # exact, unlike status
            resident = next(int(line.split()[1]) / 1e3 for line in memory if line.startswith("Rss:"))
            now = resident, threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
            if number + 1 == requests:
                print(f"drift: {begun} -> {now} (MB, threads, descriptors) after 500 and {requests}: ", end="")
                print(f"{now[0] / begun[0] - 1:+.2%} of memory")
            begun = now


PARTS: dict[str, Callable[[Engine], None]] = {
    each.__name__: each for each in (streams, turn, speculation, stall, part, sampling, texts, drift)
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_intermixed_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not known; known: {', '.join(PARTS)}")

    def measure() -> None:
        with Engine.load(
            options.bundle, options.precision, threads=options.threads, active=16, kept=16, speculative=True
        ) as engine:
            for name in options.parts:
                PARTS[name](engine)

    sys.exit(run(measure, native_output=True))


if __name__ == "__main__":
    main()
