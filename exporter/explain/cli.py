"""`llm-export --explain` and `--plot`: argument checks and tables."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llm_edge.exporter.explain.report import PrecisionExplanation, StoredWeight, explain
from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.runtime.installation import install_hint
from llm_edge.runtime.safe_io import read_json

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_MIN_WIDTH = 100  # columns of the tables
_MIN_MEGABYTES = 100_000  # sizes are shown in MB if the largest projection has at least this many bytes
_FRONTIER_POINTS = 8  # in the table
_ERROR_LEGEND = """\
error: mean over calibration tokens of |y' - y|² / |y|², where y is a projection's output in fp32
       and y' its output with the stored weight, for the same input."""


def is_bundle(source: str) -> bool:
    """Return whether a path is a folder with the manifest of a bundle.

    Raises:
        BundleError: the manifest cannot be read.
    """
    path = Path(source) / MANIFEST
    return path.is_file() and {"format_version", "precisions"} <= read_json(path).keys()


def check_plot(path: Path) -> None:
    """Check that a plot can be written to a file.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ParameterError(f"--plot {path}: unsupported suffix: use {', '.join(PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"--plot requires matplotlib: {install_hint('plot')}")
    if path.is_dir():
        raise ParameterError(f"--plot {path}: is a folder: choose another file name")
    if not path.parent.is_dir():
        raise ParameterError(f"--plot {path}: no folder {path.parent}: create it, or choose another file name")
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ParameterError(
            f"--plot {path}: cannot be written ({error.strerror}): choose another file name"
        ) from error


def show(path: Path, precisions: str | None, plot: Path | None, *, tables: bool, as_json: bool) -> None:
    """Print how the weights of a bundle are stored, as tables or as one JSON object per line, and plot them to a file.

    Raises:
        InputError: the bundle or a precision does not exist, or the manifest does not describe its weights.
    """
    names = None if precisions is None else [name.strip() for name in precisions.split(",") if name.strip()]
    if names == []:
        raise ParameterError("--precision is empty: name precisions of the bundle, or omit it for all of them")
    bundle = Bundle.open(path)
    explanations = explain(bundle, names)
    if tables:
        for explanation in explanations:
            if as_json:
                print(json.dumps({"stage": "explain", **asdict(explanation)}), flush=True)
            else:
                _print_precision(explanation)
        if not as_json:
            _print_legend(explanations)
    if plot is not None:
        from llm_edge.exporter.explain.plot import draw

        draw(explanations, bundle.name, plot)
        print(json.dumps({"stage": "plot", "path": str(plot)}) if as_json else f"Plot: {plot}", flush=True)


def _print_precision(explanation: PrecisionExplanation) -> None:
    """Print a table of the layers, and a table of all sizes."""
    from rich.console import Console
    from rich.table import Table

    largest = max((weight.bytes for layer in explanation.layers for weight in layer.values()), default=0)
    unit, unit_name = (1e6, "MB") if largest >= _MIN_MEGABYTES else (1e3, "kB")
    layers = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    layers.add_column("layer", no_wrap=True)
    for role in explanation.roles:
        layers.add_column(f" {role}", no_wrap=True)
        layers.add_column(unit_name, justify="right", no_wrap=True)
        if explanation.measured:
            layers.add_column("error", justify="right", no_wrap=True)
    for label, layer in _merged_layers(explanation.layers):
        layers.add_row(label, *_cells(layer, explanation, unit))
    totals = {
        role: _total([layer[role] for layer in explanation.layers if role in layer]) for role in explanation.roles
    }
    layers.add_row("all", *_cells(totals, explanation, unit), style="bold")

    sizes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for index in range(4):
        sizes.add_column(justify="left" if index < 2 else "right", no_wrap=True)
    for label, weight_format, size in _sizes(explanation, totals):
        fraction = f"{size / max(explanation.size, 1):.1%}"
        sizes.add_row(label, weight_format, f"{_three_digits(size / unit)} {unit_name}", fraction)

    divergence = "" if explanation.divergence is None else f", mean KL {explanation.divergence:.2e}"
    width = Console().width if sys.stdout.isatty() else _MIN_WIDTH
    console = Console(width=max(width, _MIN_WIDTH), highlight=False, markup=False, emoji=False)
    size_text = f"{_three_digits(explanation.size / unit)} {unit_name}"
    console.print(f"{explanation.name}: {size_text}{divergence}", style="bold")
    console.print(layers)
    print()
    console.print(sizes)
    print()
    if explanation.frontier:
        frontier = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
        points = explanation.frontier[:: max(math.ceil(len(explanation.frontier) / _FRONTIER_POINTS), 1)]
        frontier.add_row(f"best mixes, {unit_name}", *(_three_digits(size / unit) for size, _ in points))
        frontier.add_row("estimated KL", *(_short_exponent(divergence) for _, divergence in points))
        console.print(frontier)
        print()


def _print_legend(explanations: Sequence[PrecisionExplanation]) -> None:
    formats = {
        (weight.format, weight.label)
        for explanation in explanations
        for weights in (explanation.outside, *explanation.layers)
        for weight in weights.values()
    }
    for description, label in sorted(formats):
        if label != description:
            print(f"{label:<10} {description}")
    measured = any(explanation.measured for explanation in explanations)
    if measured:
        print(_ERROR_LEGEND)
    print(f"all: sum of the sizes{', mean of the errors' if measured else ''}. MB: 10^6 bytes.")
    print("graph: operators, small constants, gaps between tensors.")
    print()


def _merged_layers(
    layers: Sequence[Mapping[str, StoredWeight]],
) -> Iterator[tuple[str, Mapping[str, StoredWeight]]]:
    """Yield layers with their numbers; consecutive identical layers are merged."""
    start = 0
    for number, layer in enumerate(layers):
        if number + 1 == len(layers) or layers[number + 1] != layer:
            yield f"{start}" if start == number else f"{start}-{number} each", layer
            start = number + 1


def _cells(layer: Mapping[str, StoredWeight], explanation: PrecisionExplanation, unit: float) -> Iterator[str]:
    for role in explanation.roles:
        weight = layer.get(role)
        yield "" if weight is None else f" {weight.label}"
        yield "" if weight is None else _three_digits(weight.bytes / unit)
        if explanation.measured:
            yield "" if weight is None or weight.error is None else _short_exponent(weight.error)


def _total(weights: Sequence[StoredWeight]) -> StoredWeight:
    """Return the total size and mean error of a projection over all layers."""
    errors = [weight.error for weight in weights if weight.error is not None]
    error = sum(errors) / len(errors) if errors else None
    return StoredWeight("", "", sum(weight.bytes for weight in weights), error)


def _sizes(explanation: PrecisionExplanation, totals: Mapping[str, StoredWeight]) -> Iterator[tuple[str, str, int]]:
    """Yield label, format and bytes of everything in the files, and the total."""
    yield "layers", "", sum(weight.bytes for weight in totals.values())
    outside = explanation.outside
    names = {EMBEDDING: "embedding" if HEAD in outside else "embedding, head", HEAD: "head"}
    for module, weight in sorted(outside.items(), key=lambda item: (item[0] != HEAD, item[0] != EMBEDDING)):
        yield names.get(module, module), weight.label, weight.bytes
    for name, size in explanation.other.items():
        yield name, "", size
    yield "total", "", explanation.size


def _three_digits(value: float) -> str:
    """Format a number with three digits, or more if it is at least 1000."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _short_exponent(error: float) -> str:
    """Format a number like `6.1e-5`, without the leading zero of Python's exponents."""
    return re.sub(r"e([+-])0", r"e\1", f"{error:.1e}")
