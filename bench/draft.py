"""`python -m llm_edge.bench.draft BUNDLE DRAFT`: the speedup by a draft model, as ratios within one run.

Prose and copied texts, greedy and sampled, with the draft model against no speculative decoding and against prompt
lookup alone, interleaved answer by answer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

from llm_edge.bench.copying import COPYING, PROSE
from llm_edge.runtime.command import run
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.model import Model
from llm_edge.runtime.sampling.params import SamplingParams

WAYS = {"greedy": SamplingParams(temperature=0), "drawn": SamplingParams(temperature=0.7, top_p=0.95, seed=1)}


def measure(plain: Model, drafted: Model, prompts: Sequence[str], params: SamplingParams, rounds: int) -> list[float]:
    """Medians over prompts: speed relative to none, speed relative to lookup, and acceptance rate."""
    found = []
    for text in prompts:
        rates: dict[str, list[float]] = {"none": [], "lookup": [], "draft": []}
        for _ in range(rounds):
            for name, rate in rates.items():
                model = drafted if name == "draft" else plain
                model.speculative = name != "none"
                timings = model.chat([{"role": "user", "content": text}], params).result().timings
                rate.append(timings.decode_tokens_per_second)
        none, lookup, draft = (statistics.median(rate) for rate in rates.values())
        accepted = timings.accepted_tokens / max(timings.draft_tokens, 1)
        found.append((draft / max(none, 1e-9), draft / max(lookup, 1e-9), accepted))
    return [statistics.median(each) for each in zip(*found, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle")
    parser.add_argument("draft")
    parser.add_argument("--precision")
    parser.add_argument("--draft-precision")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=100, help="maximum answer length")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.rounds < 1:
        parser.error("--tokens from 2 on and --rounds from 1 on are possible")

    def compare() -> None:
        loading = LoadOptions(options.precision, "cpu", options.threads)
        plain = Model.open(options.bundle, loading)
        drafted = Model.open(
            options.bundle, replace(loading, draft=options.draft, draft_precision=options.draft_precision)
        )
        for kind, prompts in (("prose", PROSE), ("copying", COPYING)):
            for name, params in WAYS.items():
                exact = replace(params, max_tokens=options.tokens)
                against_none, against_lookup, accepted = measure(plain, drafted, prompts, exact, options.rounds)
                print(
                    f"{kind}, {name}: {against_none:.2f} x without speculation, "
                    f"{against_lookup:.2f} x with prompt lookup alone, {accepted:.0%} of the draft tokens accepted",
                    flush=True,
                )

    sys.exit(run(compare, native_output=True))


if __name__ == "__main__":
    main()
