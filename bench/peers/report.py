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

_LOWER_IS_BETTER = ("size_mb", "cold_start_s", "peak_mb")
_LLAMACPP, _NO_FLASH = "llama.cpp/", "-no-flash"

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


def summary_table(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Title and cells of the table of all models next to llama.cpp; see `markdown` for the reports.

    Each ratio is to the better one of llama.cpp's results with and without flash attention.
    """
    rows = [["ours / llama.cpp", "size", "prefill 512", "decode @0, @512", "cold start", "peak memory", "mean KL"]]
    for report in reports:
        engines = report["engines"]
        for ours, others in report["ratios"].items():
            for other in others:
                if not other.startswith(_LLAMACPP) or other.endswith(_NO_FLASH):
                    continue
                variants = [name for name in (other, f"{other}{_NO_FLASH}") if name in others]
                best = {key: _closest(key, [others[name][key] for name in variants]) for key in others[other]}
                kl = engines[ours]["kl_mean"], min(engines[name]["kl_mean"] for name in variants)
                rows.append(
                    [
                        f"{report['bundle']} {ours.partition('/')[2]} / {other.removeprefix(_LLAMACPP)}",
                        _cell("{:.2f}", best["size_mb"]),
                        _cell("{:.2f}", best["prefill_512"]),
                        f"{_cell('{:.2f}', best['decode_0'])}, {_cell('{:.2f}', best['decode_512'])}",
                        f"{_cell('{:.2f}', best['cold_start_s'])} ({_cell('{:.2f} s', engines[ours]['cold_start_s'])})",
                        f"{_cell('{:.2f}', best['peak_mb'])} ({_cell('{:,.0f} MB', engines[ours]['peak_mb'])})",
                        f"{kl[0]:.2g} / {kl[1]:.2g}",
                    ]
                )
    return rows


def _closest(key: str, found: Sequence[float | None]) -> float | None:
    """The ratio to the better one of their results."""
    known = [ratio for ratio in found if ratio is not None]
    if not known:
        return None
    return max(known) if key in _LOWER_IS_BETTER else min(known)


def markdown_of_all(reports: Sequence[Mapping[str, Any]]) -> str:
    """Sections of all models, after the table of all models if there are several; see `markdown`."""
    summary = summary_table(reports)
    parts = [markdown(report) for report in reports]
    if len(reports) > 1 and len(summary) > 1:
        parts.insert(
            0,
            f"Ratios to llama.cpp, with or without flash attention, whichever is better in each column.\n\n"
            f"{_markdown_table(summary)}\n",
        )
    return "\n".join(parts)


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
