"""`llm-export --explain` and `--plot`: what the command prints and refuses. Knows nothing of how a bundle is made."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llm_edge.exporter.explain.report import EMBEDDING, HEAD, Explained, Stored, explain
from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.runtime.safe_io import read_json

PICTURES = (".png", ".svg", ".pdf")
_WIDTH = 100  # columns that the tables take at most
_SMALLEST = 100_000  # bytes of the largest projection that are still told in MB
_ERROR = """\
error: mean over calibration tokens of |y' - y|² / |y|²; y is a projection's output in fp32,
       y' that of what is stored, for the same input."""


def is_bundle(source: str) -> bool:
    """Whether this is a folder with a manifest of ours.

    Raises:
        BundleError: a manifest that cannot be read.
    """
    path = Path(source) / MANIFEST
    return path.is_file() and {"format_version", "precisions"} <= read_json(path).keys()


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before any work.

    Raises:
        InputError: matplotlib is not there, or the file cannot be.
    """
    if path.suffix.lower() not in PICTURES:
        raise ParameterError(f"--plot {path}: pictures are {', '.join(PICTURES)}: name a file that ends so")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'llm-edge[plot]'")
    if path.is_dir():
        raise ParameterError(f"--plot {path}: a folder lies there: name another file")
    if not path.parent.is_dir():
        raise ParameterError(f"--plot {path}: there is no folder {path.parent}: make it, or name another file")
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ParameterError(f"--plot {path}: cannot be written ({error.strerror}): name another file") from error


def tell(path: Path, precisions: str | None, plot: Path | None, *, tables: bool, as_json: bool) -> None:
    """Explain a bundle.

    Args:
        path: its folder.
        precisions: names with commas; None takes all.
        plot: a picture to draw.
        tables: to be printed.
        as_json: one object a line in their place.

    Raises:
        InputError: no such bundle or precision, or it does not say how it is made.
    """
    names = None if precisions is None else [name.strip() for name in precisions.split(",") if name.strip()]
    if names == []:
        raise ParameterError("--precision is empty: name some of the bundle's, or leave it out for all")
    bundle = Bundle.open(path)
    found = explain(bundle, names)
    if tables:
        for one in found:
            if as_json:
                print(json.dumps({"stage": "explain", **asdict(one)}), flush=True)
            else:
                _print(one)
        if not as_json:
            _print_legend(found)
    if plot is not None:
        from llm_edge.exporter.explain.plot import draw

        draw(found, bundle.name, plot)
        print(json.dumps({"stage": "plot", "path": str(plot)}) if as_json else f"Plot: {plot}", flush=True)


def short(form: str) -> str:
    """A format in a few letters, `int4-128z` of `int4 blocks of 128, zero points`; one that is not known as it is."""
    blocks = re.fullmatch(r"int(\d+) blocks of (\d+)(?:, (zero points|offsets))?", form)
    if blocks is not None:
        return f"int{blocks[1]}-{blocks[2]}{blocks[3][0] if blocks[3] else ''}"
    integer = re.fullmatch(r"int(\d+) channels x (\d+)-bit activations(?:, spread over (\d+))?", form)
    if integer is not None:
        return f"int{integer[1]}x{integer[2]}{'/' + integer[3] if integer[3] else ''}"
    return form


def _print(explained: Explained) -> None:
    """A table of the layers, and one of what the whole is made of."""
    from rich.console import Console
    from rich.table import Table

    most = max((stored.bytes for layer in explained.layers for stored in layer.values()), default=0)
    unit, name = (1e6, "MB") if most >= _SMALLEST else (1e3, "kB")
    layers = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    layers.add_column("layer", no_wrap=True)
    for role in explained.roles:
        layers.add_column(f" {role}", no_wrap=True)
        layers.add_column(name, justify="right", no_wrap=True)
        if explained.measured:
            layers.add_column("error", justify="right", no_wrap=True)
    for label, layer in _rows(explained.layers):
        layers.add_row(label, *_cells(layer, explained, unit))
    sums = {role: _sum([layer[role] for layer in explained.layers if role in layer]) for role in explained.roles}
    layers.add_row("all", *_cells(sums, explained, unit), style="bold")

    parts = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for index in range(4):
        parts.add_column(justify="left" if index < 2 else "right", no_wrap=True)
    for label, form, size in _parts(explained, sums):
        parts.add_row(label, form, f"{_number(size / unit)} {name}", f"{size / max(explained.size, 1):.1%}")

    known = "" if explained.divergence is None else f", mean KL {explained.divergence:.2e}"
    width = Console().width if sys.stdout.isatty() else _WIDTH
    console = Console(width=max(width, _WIDTH), highlight=False, markup=False, emoji=False)
    console.print(f"{explained.name}: {_number(explained.size / unit)} {name}{known}", style="bold")
    console.print(layers)
    print()
    console.print(parts)
    print()


def _print_legend(found: Sequence[Explained]) -> None:
    forms = {
        stored.format
        for explained in found
        for stored in (*explained.outside.values(), *(one for layer in explained.layers for one in layer.values()))
    }
    for form in sorted(forms):
        if short(form) != form:
            print(f"{short(form):<10} {form}")
    measured = any(explained.measured for explained in found)
    if measured:
        print(_ERROR)
    print(f"all: {'sizes added up, mean of the errors' if measured else 'sizes added up'}. MB: 10^6 bytes.")
    print("graph: operators, small constants, gaps between tensors.")
    print()


def _rows(layers: Sequence[Mapping[str, Stored]]) -> Iterator[tuple[str, Mapping[str, Stored]]]:
    """Layers with their numbers; neighbours that do not differ in anything share a row."""
    start = 0
    for number, layer in enumerate(layers):
        if number + 1 == len(layers) or layers[number + 1] != layer:
            yield f"{start}" if start == number else f"{start}-{number} each", layer
            start = number + 1


def _cells(layer: Mapping[str, Stored], explained: Explained, unit: float) -> Iterator[str]:
    for role in explained.roles:
        stored = layer.get(role)
        yield "" if stored is None else f" {short(stored.format)}"
        yield "" if stored is None else _number(stored.bytes / unit)
        if explained.measured:
            yield "" if stored is None or stored.error is None else _short_error(stored.error)


def _sum(column: Sequence[Stored]) -> Stored:
    """A projection of all layers together: how many bytes, and the mean error."""
    errors = [stored.error for stored in column if stored.error is not None]
    return Stored("", sum(stored.bytes for stored in column), sum(errors) / len(errors) if errors else None)


def _parts(explained: Explained, sums: Mapping[str, Stored]) -> Iterator[tuple[str, str, int]]:
    """Label, format and bytes of all that the files hold, the whole at the end."""
    yield "layers", "", sum(stored.bytes for stored in sums.values())
    names = {EMBEDDING: "embedding" if HEAD in explained.outside else "embedding, head", HEAD: "head"}
    for module, stored in sorted(explained.outside.items(), key=lambda item: (item[0] != HEAD, item[0] != EMBEDDING)):
        yield names.get(module, module), short(stored.format), stored.bytes
    for name, size in explained.other.items():
        yield name, "", size
    yield "total", "", explained.size


def _number(value: float) -> str:
    """Three digits, and more only before the point."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _short_error(error: float) -> str:
    """`6.1e-5`: without the zero that Python writes before the exponent."""
    return re.sub(r"e([+-])0", r"e\1", f"{error:.1e}")
