"""The plot of `llm-export --plot`: error by layer, and size against fidelity."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from llm_edge.exporter.explain.report import PrecisionExplanation

# the Okabe-Ito palette, which color-blind readers can distinguish
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "llm-edge",  # makes ids in SVG files reproducible
}
_DATES: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_EXACT = 1e-7  # maximum mean KL of precisions shown as exact
_MAX_TITLE = 120  # characters
_HEIGHT = 350  # approximate height of the right axes in points
_LABEL_HEIGHT = 14 / _HEIGHT


def draw(explanations: Sequence[PrecisionExplanation], title: str, path: Path) -> None:
    """Plot precisions of a model to a .png, .svg or .pdf file."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 6), layout="constrained")
        figure.suptitle("".join(c if c.isprintable() else " " for c in title[:_MAX_TITLE]), parse_math=False)
        halves: Any = figure.subfigures(1, 2, width_ratios=(8, 5))
        _draw_errors([explanation for explanation in explanations if explanation.measured], halves[0])
        _draw_sizes(explanations, halves[1].subplots())
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix.lower()[1:], dpi=150, metadata=_DATES[path.suffix.lower()])
    path.write_bytes(content.getvalue())


def _draw_errors(explanations: Sequence[PrecisionExplanation], figure: Any) -> None:
    """Draw a panel per precision with a line per role."""
    if not explanations:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.text(
            0.5, 0.5, "No errors were measured:\nnone of these precisions is calibrated.", ha="center", va="center"
        )
        return
    columns = math.ceil(math.sqrt(len(explanations)))
    rows = math.ceil(len(explanations) / columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    roles = list(dict.fromkeys(role for explanation in explanations for role in explanation.roles))
    odd = False
    for explanation, axes in zip(explanations, panels, strict=False):
        for role, color in zip(roles, _colors(len(roles)), strict=True):
            odd |= _draw_line(explanation, role, color, axes)
        axes.set_title(explanation.name, parse_math=False)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[: len(explanations)][-columns:]:
        axes.tick_params(labelbottom=True)
    for axes in panels[len(explanations) :]:
        axes.set_axis_off()
    figure.supxlabel("layer")
    figure.supylabel("relative error of the output")
    handles = [Line2D([], [], color=color, label=role) for role, color in zip(roles, _colors(len(roles)), strict=True)]
    if odd:
        label = "format differs from most layers"
        handles.append(Line2D([], [], color="grey", marker="s", mfc="white", ls="none", label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def _draw_line(explanation: PrecisionExplanation, role: str, color: str, axes: Axes) -> bool:
    """Draw the errors of a role; return whether any layers with an unusual format were marked."""
    column = {number: layer[role] for number, layer in enumerate(explanation.layers) if role in layer}
    points = {number: weight.error for number, weight in column.items() if weight.error}
    axes.plot(list(points), list(points.values()), color=color, marker=".", markersize=4, linewidth=1.2)
    usual = Counter(weight.format for weight in column.values()).most_common(1)
    odd = [number for number in points if column[number].format != usual[0][0]]
    axes.plot(odd, [points[number] for number in odd], color=color, marker="s", mfc="white", markersize=5, ls="none")
    return bool(odd)


def _draw_sizes(explanations: Sequence[PrecisionExplanation], axes: Axes) -> None:
    """Draw size against mean KL, with a labeled point per precision; exact precisions are at the lower edge."""
    known = [
        (explanation, explanation.divergence) for explanation in explanations if explanation.divergence is not None
    ]
    lossy = [divergence for _, divergence in known if divergence > _EXACT]
    low, high = min(lossy, default=_EXACT) / 8, max(lossy, default=_EXACT) * 2
    axes.set_title("size and fidelity")
    axes.set_xlabel("size, MB")
    axes.set_ylabel("mean KL to PyTorch fp32, nats")
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, high)
    widest = 1.3 * max(explanation.size for explanation in explanations) / 1e6
    axes.set_xlim(0, widest)
    for explanation in explanations:
        points = [(size / 1e6, divergence) for size, divergence in explanation.frontier if divergence > 0]
        axes.plot(*zip(*points, strict=True), color="#999999", linewidth=1, linestyle="--") if points else None
    above = -math.inf
    for explanation, divergence in sorted(known, key=lambda item: item[1]):
        size, exact = explanation.size / 1e6, divergence <= _EXACT
        point = (size, low if exact else divergence)
        axes.plot(*point, "v" if exact else "o", color="#333333", markersize=7)
        height = axes.transAxes.inverted().transform(axes.transData.transform(point))[1]
        above = max(height, above + _LABEL_HEIGHT)  # labels must not overlap
        label = _label(explanation) + (f", KL {max(divergence, 0):.0e}" if exact else "")
        side, shift = ("left", 9) if size < widest / 2 else ("right", -9)
        place = (shift, (above - height) * _HEIGHT)
        axes.annotate(label, point, xytext=place, textcoords="offset points", ha=side, va="center", parse_math=False)
    unknown = [_label(explanation) for explanation in explanations if explanation.divergence is None]
    if unknown:
        text = "Not validated, fidelity unknown:\n" + "\n".join(unknown)
        box = {"facecolor": "white", "edgecolor": "none"}
        axes.text(
            0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", bbox=box, zorder=0.9, parse_math=False
        )


def _label(explanation: PrecisionExplanation) -> str:
    size = explanation.size / 1e6
    return f"{explanation.name}, {f'{size:,.0f}' if size >= 100 else f'{size:.3g}'} MB"


def _colors(count: int) -> list[str]:
    return [_COLORS[index % len(_COLORS)] for index in range(count)]
