"""The picture of `llm-export --plot`: error by layer, size against fidelity. Knows nothing of bundles or terminals."""

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

from llm_edge.exporter.explain.report import Explained

# Okabe and Ito's colours, which the colour-blind tell apart
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "llm-edge",  # names in an SVG file are otherwise drawn by chance
}
_DATES: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_EXACT = 1e-7  # mean KL up to which a precision counts as exact
_TITLE = 120  # characters of it that are shown
_HEIGHT = 350  # points that the right half's axes are high, about
_LINE = 14 / _HEIGHT  # of a label


def draw(found: Sequence[Explained], title: str, path: Path) -> None:
    """Write the picture of some precisions of a model; its suffix, .png, .svg or .pdf, says as what."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 6), layout="constrained")
        figure.suptitle("".join(c if c.isprintable() else " " for c in title[:_TITLE]), parse_math=False)
        halves: Any = figure.subfigures(1, 2, width_ratios=(8, 5))
        _draw_errors([explained for explained in found if explained.measured], halves[0])
        _draw_sizes(found, halves[1].subplots())
        written = io.BytesIO()
        figure.savefig(written, format=path.suffix.lower()[1:], dpi=150, metadata=_DATES[path.suffix.lower()])
    path.write_bytes(written.getvalue())


def _draw_errors(found: Sequence[Explained], figure: Any) -> None:
    """A panel a precision, a line a role."""
    if not found:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No error was measured:\nnothing here is rounded by calibration.", ha="center", va="center")
        return
    columns = math.ceil(math.sqrt(len(found)))
    rows = math.ceil(len(found) / columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    roles = list(dict.fromkeys(role for explained in found for role in explained.roles))
    odd = False
    for explained, axes in zip(found, panels, strict=False):
        for role, colour in zip(roles, _colours(len(roles)), strict=True):
            odd |= _draw_line(explained, role, colour, axes)
        axes.set_title(explained.name, parse_math=False)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[: len(found)][-columns:]:
        axes.tick_params(labelbottom=True)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel("layer")
    figure.supylabel("error of the output, relative")
    handles = [
        Line2D([], [], color=colour, label=role) for role, colour in zip(roles, _colours(len(roles)), strict=True)
    ]
    if odd:
        label = "another format than most layers"
        handles.append(Line2D([], [], color="grey", marker="s", mfc="white", ls="none", label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def _draw_line(explained: Explained, role: str, colour: str, axes: Axes) -> bool:
    """Errors of a role; whether some layers have another format than most and are marked."""
    column = {number: layer[role] for number, layer in enumerate(explained.layers) if role in layer}
    points = {number: stored.error for number, stored in column.items() if stored.error}
    axes.plot(list(points), list(points.values()), color=colour, marker=".", markersize=4, linewidth=1.2)
    usual = Counter(stored.format for stored in column.values()).most_common(1)
    odd = [number for number in points if column[number].format != usual[0][0]]
    axes.plot(odd, [points[number] for number in odd], color=colour, marker="s", mfc="white", markersize=5, ls="none")
    return bool(odd)


def _draw_sizes(found: Sequence[Explained], axes: Axes) -> None:
    """Size against mean KL, a labelled point a precision; those that are as good as exact lie at the lower edge."""
    known = [(explained, explained.divergence) for explained in found if explained.divergence is not None]
    rounded = [divergence for _, divergence in known if divergence > _EXACT]
    low, high = min(rounded, default=_EXACT) / 8, max(rounded, default=_EXACT) * 2
    axes.set_title("size and fidelity")
    axes.set_xlabel("size, MB")
    axes.set_ylabel("mean KL to PyTorch fp32, nats")
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, high)
    widest = 1.3 * max(explained.size for explained in found) / 1e6
    axes.set_xlim(0, widest)
    above = -math.inf
    for explained, divergence in sorted(known, key=lambda item: item[1]):
        size, exact = explained.size / 1e6, divergence <= _EXACT
        point = (size, low if exact else divergence)
        axes.plot(*point, "v" if exact else "o", color="#333333", markersize=7)
        height = axes.transAxes.inverted().transform(axes.transData.transform(point))[1]
        above = max(height, above + _LINE)  # no label on another
        label = _label(explained) + (f", KL {max(divergence, 0):.0e}" if exact else "")
        side, shift = ("left", 9) if size < widest / 2 else ("right", -9)
        place = (shift, (above - height) * _HEIGHT)
        axes.annotate(label, point, xytext=place, textcoords="offset points", ha=side, va="center", parse_math=False)
    unknown = [_label(explained) for explained in found if explained.divergence is None]
    if unknown:
        text = "Not validated, so nothing is known of their fidelity:\n" + "\n".join(unknown)
        box = {"facecolor": "white", "edgecolor": "none"}
        axes.text(
            0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", bbox=box, zorder=0.9, parse_math=False
        )


def _label(explained: Explained) -> str:
    size = explained.size / 1e6
    return f"{explained.name}, {f'{size:,.0f}' if size >= 100 else f'{size:.3g}'} MB"


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]
