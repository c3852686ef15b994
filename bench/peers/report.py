"""Tables of medians, and of the ratios of our results to the peers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_edge.bench.driver import COLUMNS, Figures, median, median_ratio
from llm_edge.bench.peers.fidelity import Fidelity

PAIRS: Mapping[str, tuple[str, ...]] = {
    "ours/int8": ("llama.cpp/Q8_0", "llama.cpp/Q8_0-no-flash", "openvino/int8", "genai/int8"),
    "ours/int8-exact": ("llama.cpp/Q8_0", "llama.cpp/Q8_0-no-flash"),
    "ours/int4": (
        "llama.cpp/Q4_0",
        "llama.cpp/Q4_0-no-flash",
        "genai/int4",
        "genai/int4-k_quant",
        "openvino/int4",
    ),
    "ours/int4-mixed": ("llama.cpp/Q4_K_M", "llama.cpp/Q4_K_M-no-flash"),
    "ours/source": ("llama.cpp/source", "llama.cpp/source-no-flash"),
}
"""Which of our precisions is compared with which of theirs."""

SPEED = {key: column for key, column in COLUMNS.items() if key != "python_share"}
"""Columns that all engines have."""

_TITLES = {
    "size_mb": ("size", "{:,.0f} MB"),
    **SPEED,
    "kl_mean": ("mean KL", "{:.2g}"),
    "top1": ("top-1", "{:.1%}"),
}
Row = dict[str, float | None]


def summarise(
    sizes: Mapping[str, int], figures: Mapping[str, Figures], fidelities: Mapping[str, Fidelity]
) -> dict[str, Row]:
    """Medians of each contender, by the keys of the tables; sizes in MB of 10^6 bytes."""
    return {
        name: {
            "size_mb": sizes[name] / 1e6,
            **{key: median(figures[name][key]) for key in SPEED},
            "kl_mean": fidelities[name].kl_mean,
            "top1": fidelities[name].top1,
        }
        for name in sizes
    }


def ratios(sizes: Mapping[str, int], figures: Mapping[str, Figures]) -> dict[str, dict[str, Row]]:
    """Ours / theirs for every measured pair: medians of the ratios of paired samples."""
    return {
        ours: {
            other: {
                "size_mb": sizes[ours] / sizes[other],
                **{key: median_ratio(figures[ours][key], figures[other][key]) for key in SPEED},
            }
            for other in others
            if other in sizes
        }
        for ours, others in PAIRS.items()
        if ours in sizes and any(other in sizes for other in others)
    }


def engine_table(rows: Mapping[str, Row]) -> list[list[str]]:
    """Title and cells of the table of all contenders."""
    body = [[name, *(_cell(form, row[key]) for key, (_, form) in _TITLES.items())] for name, row in rows.items()]
    return [["", *(title for title, _ in _TITLES.values())], *body]


def ratio_table(found: Mapping[str, Mapping[str, Row]]) -> list[list[str]]:
    """Title and cells of the table of ratios."""
    columns = [key for key in _TITLES if key == "size_mb" or key in SPEED]
    body = [
        [f"{ours.partition('/')[2]} / {other}", *(_cell("{:.2f}", row[key]) for key in columns)]
        for ours, others in found.items()
        for other, row in others.items()
    ]
    return [["ours / theirs", *(_TITLES[key][0] for key in columns)], *body]


def markdown(report: Mapping[str, Any]) -> str:
    """This run's section for bench/RESULTS.md.

    Args:
        report: with `bundle`, `machine`, `amx`, `threads`, `rounds`, `repeats`, `text`, `positions`, `versions`,
            `engines` (rows from `summarise`) and `ratios`.
    """
    amx = {True: "with AMX", False: "AMX refused to all", None: "without AMX"}[report["amx"]]
    samples = report["rounds"] * report["repeats"]
    paragraphs = [
        f"{report['bundle']}; {report['machine']}, {amx}; {report['threads']} threads for each. "
        + ", ".join(report["versions"].values())
        + f". All took turns request by request: {report['rounds']} rounds of fresh processes, {samples} samples of "
        f"each speed, medians. KL and top-1 are against fp32 on {report['positions']:,} tokens of {report['text']} in "
        "windows of 512.",
        _markdown_table(engine_table(report["engines"])),
    ]
    if report["ratios"]:
        paragraphs.append("Medians of ratios side by side; above 1 is better for speeds, below 1 for the others.")
        paragraphs.append(_markdown_table(ratio_table(report["ratios"])))
    return "\n\n".join(paragraphs) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    title, *body = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (title, ["---"] * len(title), *body))


def _cell(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)
