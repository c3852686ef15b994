"""Bundles with flipped bits and truncated files. Checksums are corrected, so that the damage reaches the readers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import tiny
from damage import cut, damage_json, flip
from sandbox import Command

from llm_edge.exporter import cli as export_cli
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions, FileFormat
from llm_edge.runtime.bundle import MANIFEST, manifest_entry
from llm_edge.tui import cli as chat_cli

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 1}
ASK = ("--ask", "Hello", "--no-stdin", "--max-tokens", "3", "--provider", "cpu", "--threads", "1")


def prepare(folder: Path) -> None:
    """Export a tiny model as ONNX and as TorchScript."""
    checkpoint = str(tiny.save_checkpoint(folder / "checkpoint", **SMALL))
    export(checkpoint, ExportOptions(folder / "onnx", precision="fp32,int8", validate=False))
    export(checkpoint, ExportOptions(folder / "torchscript", file_format=FileFormat.TORCHSCRIPT, validate=False))


def copy(originals: Path, folder: Path, kind: str = "onnx") -> Path:
    """A copy of a bundle to be damaged."""
    return Path(shutil.copytree(originals / kind, folder / "bundle"))


def correct_manifest(bundle: Path, *names: str) -> None:
    """Give files of a bundle the right sizes and checksums in the manifest."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"].update({name: manifest_entry(bundle / name) for name in names})
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def ask(what: str, *words: str) -> Command:
    """Ask the bundle one question."""
    return Command(what, chat_cli.main, ("llm-chat", "bundle", *ASK, *words))


def flipped(originals: Path, folder: Path, number: int, rng: random.Random) -> Command:
    """A bundle with one flipped bit, or with changed values in one of its JSON files."""
    bundle, name = _damaged(originals, folder, rng)
    path = bundle / name
    what = damage_json(path, rng) if path.suffix == ".json" and number % 3 == 0 else flip(path, rng)
    return _command(bundle, name, what, rng)


def truncated(originals: Path, folder: Path, number: int, rng: random.Random) -> Command:
    """A bundle with one truncated file."""
    bundle, name = _damaged(originals, folder, rng)
    return _command(bundle, name, cut(bundle / name, rng), rng)


def _damaged(originals: Path, folder: Path, rng: random.Random) -> tuple[Path, str]:
    bundle = copy(originals, folder, rng.choice(("onnx", "onnx", "onnx", "torchscript")))
    names = json.loads((bundle / MANIFEST).read_text())["files"]
    return bundle, rng.choice([MANIFEST, *(name for name in names if not name.endswith("_data")), *names])


def _command(bundle: Path, name: str, what: str, rng: random.Random) -> Command:
    if name != MANIFEST:
        correct_manifest(bundle, name)
    if rng.random() < 0.15:
        return Command(what, export_cli.main, ("llm-export", "bundle", "--explain"))
    return ask(what)
