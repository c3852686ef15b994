"""Damaged checkpoints of each format: flipped bits, truncation, changed lengths, and odd values in JSON files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original
import quantized
import tiny
import torch
from damage import cut, damage_bytes, damage_json, flip
from sandbox import Command
from test_gguf_families import CASES, save_folder, write_gguf
from torch import Tensor

from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.exporter import cli as export_cli
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions

FORMATS = {"safetensors": "model.safetensors", "torch-zip": "model.pt", "torch-legacy": "model.pth"}
FORMATS |= {"gguf": "model.gguf", "folder": "", "gptq": "", "compressed": "", "nf4": ""}
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 1}
SHAPE = {"dim": 32, "ffn_dim": 32, "n_layers": 1}


def nf4(weight: Tensor) -> quantized.Written:
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [*weight.shape], "dtype": "float32"}
    parts = {
        "": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        ".absmax": torch.ones(weight.numel() // 64),
        ".quant_map": torch.linspace(-1, 1, 16),
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return parts, weight


QUANTIZED: dict[str, tuple[dict[str, Any], Callable[[Tensor], quantized.Written]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False},
        lambda weight: quantized.gptq(weight, group=16),
    ),
    "compressed": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}}},
        quantized.fp8_rows,
    ),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
}
"""Quantized folders by name: quantization_config, and what writes a weight."""


def prepare(folder: Path) -> None:
    """Write an intact checkpoint of each format, and export each once, which traces their models."""
    for name, file in FORMATS.items():
        place = folder / name
        if name == "gguf":
            save_folder(folder / "as-folder", {**CASES["llama"], "num_hidden_layers": 1})
            place.mkdir()
            write_gguf(folder / "as-folder", place / file)
        elif name == "folder":
            tiny.save_checkpoint(place, shard_size="20KB", **SMALL)
        elif name in QUANTIZED:
            tiny.save_checkpoint(place, **SMALL)
            config, write = QUANTIZED[name]
            quantized.quantize_folder(place, config, write, whole_name=name == "nf4")
        else:
            wrap = {"torch-zip": "model_state_dict", "torch-legacy": "module."}.get(name)
            suffix = Path(file).suffix
            original.save_family(place, suffix=suffix, legacy=name == "torch-legacy", wrap=wrap, **SHAPE)
        options = ExportOptions(folder / f"{name}-bundle", precision="fp32", validate=False)
        export(str(place / file), options)


def headers(path: Path) -> tuple[range, ...]:
    """The parts of a file that are no weights."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return (range(8), range(8, 8 + int.from_bytes(content[:8], "little")))
    if path.suffix == ".gguf":
        start = min(tensor.offset for tensor in GGUFFile(path).tensors.values())
        return (range(32), range(start // 20), range(start - 2000, start))
    if path.suffix == ".pt":
        return (range(1500), range(len(content) - 3000, len(content)))
    return (range(1500),)


def make(name: str, originals: Path, folder: Path, number: int, rng: random.Random) -> Command:
    """A damaged checkpoint of a format."""
    place = shutil.copytree(originals / name, folder / "checkpoint")
    in_folder = name == "folder" or (name in QUANTIZED and number % 2)
    if in_folder or number % 8 == 7:
        what = _damage_folder(place, number, rng)
    else:
        path = place / (FORMATS[name] or "model.safetensors")
        what = damage_bytes(path, rng, headers(path)) if number % 4 else (flip if number % 8 else cut)(path, rng)
    source = str(Path("checkpoint") / FORMATS[name])
    options = ("-o", "bundle", "--no-validate", "--precision", "fp32", "--progress", "none")
    return Command(what, export_cli.main, ("llm-export", source, *options))


def _damage_folder(place: Path, number: int, rng: random.Random) -> str:
    """Damage any file of a folder, JSON files mostly by changing their values."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.suffix != ".gguf")
    if not files:
        path = next(place.iterdir())
        return damage_bytes(path, rng, headers(path))
    path = rng.choice(files)
    if rng.random() < 0.05:
        path.unlink()
        return f"{path.name} is missing"
    if path.suffix == ".json" and number % 4 and _is_json(path):
        return damage_json(path, rng)
    return rng.choice((flip, cut, damage_bytes))(path, rng)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
