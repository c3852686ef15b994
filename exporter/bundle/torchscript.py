"""Writes a decoder as TorchScript, which plain `torch.jit.load` runs. Knows no checkpoint's format and no bundle.

The decoder is traced on the meta device, so that no weight is there yet. Lengths, batch and past stay symbolic in a
trace, devices do not: those are made those of the inputs afterwards. torch cannot be told to save weights one at a
time, notes source files and line numbers with the code, and aborts the process where the disk is full. Hence it saves
a skeleton without weights, into memory, and the archive is put together from that: code as it is, notes left out,
weights read and written one by one. Equal sources make equal files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import Rounding
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder, rotary_tables
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import AnySession, open_session
from llm_edge.runtime.bundle import TORCHSCRIPT, ModelShape
from llm_edge.runtime.errors import ParameterError

_BATCH, _NEW, _PAST = 2, 3, 5  # of the traced inputs, all of them different from one another and from 1
_ROOT = "model"  # folder inside the archive


class Exported(nn.Module):
    """What the file holds: a traced decoder up to its last norm, its head, and the door around both.

    Shapes as in `model.py`.
    """

    def __init__(self, body: nn.Module, lm_head: nn.Linear, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.body = body
        self.lm_head = lm_head
        self.heads = heads
        self.head_dim = head_dim
        self.layers = layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[tuple[Tensor, Tensor]],
        num_logits_to_keep: int = 0,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """As `Decoder.forward`."""
        flat: list[Tensor] = []
        for key, value in past:
            flat.append(key)
            flat.append(value)
        x, made = self.body(input_ids, attention_mask, flat)
        if num_logits_to_keep > 0:
            x = x[:, -num_logits_to_keep:]
        presents: list[tuple[Tensor, Tensor]] = []
        for index in range(0, len(made), 2):
            presents.append((made[index], made[index + 1]))  # noqa: PERF401 (the compiler knows no comprehension of pairs)
        return self.lm_head(x), presents

    @torch.jit.export
    def empty_past(self, batch_size: int = 1) -> list[tuple[Tensor, Tensor]]:
        """A cache of no tokens, on the device of the weights."""
        empty = self.lm_head.weight.new_zeros([batch_size, self.heads, 0, self.head_dim])
        past: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.layers):
            past.append((empty, empty))  # noqa: PERF401
        return past


class _Body(nn.Module):
    """A decoder as a trace takes it: tensors in a flat list, keys and values by turns."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x, presents = self.decoder(input_ids, attention_mask, list(zip(past[::2], past[1::2], strict=True)))
        return x, [part for present in presents for part in present]


class TorchScriptForm:
    """Precisions as TorchScript; see `forms.Form`."""

    name = TORCHSCRIPT
    hidden_size = None

    def __init__(self, recipes: tuple[Recipe, ...]) -> None:
        lossy = [recipe.name for recipe in recipes if not recipe.lossless]
        if lossy:
            raise ParameterError(
                f"--format torchscript holds fp32 alone, not {', '.join(lossy)}: "
                "say --precision fp32, or take --format onnx"
            )

    def write(
        self,
        folder: Path,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        recipes: tuple[Recipe, ...],
        text: Sequence[int],  # noqa: ARG002 (nothing is rounded)
        progress: Progress,
    ) -> dict[str, Rounding]:
        """Write the file of each recipe."""
        for recipe in recipes:
            write_torchscript(folder / self.file(recipe), config, weights, progress)
        return {}

    def file(self, recipe: Recipe) -> str:
        """Name of what `torch.jit.load` takes."""
        return f"{recipe.stem}.pt"

    def files(self, folder: Path, recipe: Recipe) -> list[Path]:
        """What `write` wrote for a recipe."""
        return [folder / self.file(recipe)]

    def open(self, folder: Path, shape: ModelShape, recipe: Recipe) -> AnySession:
        """The file at work on the CPU."""
        file = GraphFile(folder / self.file(recipe), shape, TORCHSCRIPT, share_buffer=False)
        return open_session(file, ExecutionOptions("cpu"))


def write_torchscript(path: Path, config: ModelConfig, weights: Mapping[str, Tensor], progress: Progress) -> None:
    """Write a decoder, with one weight at a time in memory.

    Args:
        path: of the file.
        config: the shape.
        weights: under the names of `Decoder`; read when they are written.
        progress: see `Progress`.

    Raises:
        OSError: the file cannot be written; what there is of it stays.
    """
    progress("tracing", None, f"{config.num_hidden_layers} layers, TorchScript")
    with _quiet():
        _script(dataclasses.replace(config, layers=config.layers[:1]))  # takes the names that are not numbered
        small, names = _skeleton(_script(config), config)
    tables = rotary_tables(config)
    with zipfile.ZipFile(path, "w") as archive:
        for number, (record, name) in enumerate(names.items()):
            _add(archive, record, tables[name] if name in tables else weights[name])
            progress("quantizing", (number + 1) / len(names), "fp32")
        for record, content in small.items():
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{record}"), content)


def _script(config: ModelConfig) -> torch.jit.ScriptModule:
    """The module without weights."""
    with torch.device("meta"):
        decoder = Decoder(config, standalone=True).eval().requires_grad_(False)
    head = decoder.lm_head
    decoder.register_module("lm_head", nn.Identity())
    ids = torch.zeros(_BATCH, _NEW, dtype=torch.int64, device="meta")
    mask = torch.zeros(_BATCH, _PAST + _NEW, dtype=torch.int64, device="meta")
    past = [part for pair in decoder.empty_past(_BATCH, _PAST) for part in pair]
    # Lists may not change in length from call to call, and do not: two tensors a layer.
    body: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
        _Body(decoder), (ids, mask, past), check_trace=False, strict=False
    )
    hidden = torch.zeros(_BATCH, _NEW, config.hidden_size, device="meta")
    # Compiled from its source, a projection would list its constants in the order of a set, another in each process.
    traced_head = torch.jit.trace(head, (hidden,), check_trace=False)  # type: ignore[no-untyped-call]
    for module in body.modules():
        if isinstance(module, torch.jit.ScriptModule) and module._c._has_method("forward"):  # a list has none
            _follow_device(module.graph)
    scripted: torch.jit.ScriptModule = torch.jit.script(
        Exported(body, traced_head, config.num_hidden_layers, config.num_key_value_heads, config.head_dim).eval()
    )
    return scripted


def _follow_device(graph: Any) -> None:
    """Replace the device that a trace took down as a constant by the one of the graph's first tensor."""
    constants = [
        node for node in graph.findAllNodes("prim::Constant") if node.output().type().kind() == "DeviceObjType"
    ]
    if not constants:
        return
    tensor = next(value for value in graph.inputs() if value.type().kind() == "TensorType")
    device = graph.create("prim::device", [tensor])
    device.output().setType(torch._C.DeviceObjType.get())
    graph.prependNode(device)
    for node in constants:
        node.output().replaceAllUsesWith(device.output())
        node.destroy()


def _skeleton(module: torch.jit.ScriptModule, config: ModelConfig) -> tuple[dict[str, bytes], dict[str, str]]:
    """Of the archive: code and structure by record, and by record of a weight or table its name.

    The module is saved twice, never with weights: with tensors of one number each, which says which record is whose,
    and with tensors of their right shape on the meta device, which then are said to be on the CPU.
    """
    names = _replace(module, config, lambda shape, number: torch.full((1,), float(number)).expand(shape))
    tags, _ = _records(module)
    _replace(module, config, lambda shape, _: torch.empty(shape, device="meta"))
    _, small = _records(module)
    structure = small["data.pkl"].replace(_pickled("meta"), _pickled("cpu"))
    return small | {"data.pkl": structure}, {record: names[tag] for record, tag in tags.items()}


def _replace(
    module: torch.jit.ScriptModule, config: ModelConfig, make: Callable[[torch.Size, int], Tensor]
) -> list[str]:
    """Replace every weight and table by what `make` makes of its shape and its place in the list returned.

    Weights that share memory, the tied head's, share it still.
    """
    numbers: dict[str, int] = {}
    made: list[Tensor] = []
    owners = dict(module.named_modules())
    for path, old in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        name = path.removeprefix("body.decoder.")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            name = "embed_tokens.weight"
        if name not in numbers:
            numbers[name] = len(made)
            made.append(make(old.shape, len(made)))
        owner, _, attribute = path.rpartition(".")
        setattr(owners[owner], attribute, made[numbers[name]])
    return [*numbers]


def _pickled(text: str) -> bytes:
    """As a pickle spells a string: the opcode BINUNICODE, the length, UTF-8."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _records(module: torch.jit.ScriptModule) -> tuple[dict[str, int], dict[str, bytes]]:
    """Of a module as it is saved: the first number of each tensor (0 on the meta device), and all else, by record.

    Classes get new numbers, counted in this file alone: torch counts them in the whole process.
    """
    tags: dict[str, int] = {}
    small: dict[str, bytes] = {}
    numbers: dict[bytes, int] = {}

    def numbered(text: bytes) -> bytes:
        return re.sub(rb"(?<=___torch_mangle_)\d+", lambda found: b"%d" % _number(numbers, found[0]), text)

    with zipfile.ZipFile(io.BytesIO(module.save_to_buffer())) as archive:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if name.startswith("data/"):
                content = archive.read(info)
                tags[name] = int(struct.unpack("<f", content)[0]) if content else 0
            elif not name.endswith((".debug_pkl", "/serialization_id")):
                small[numbered(name.encode()).decode()] = numbered(archive.read(info))
    return tags, small


def _number(numbers: dict[bytes, int], name: bytes) -> int:
    return numbers.setdefault(name, len(numbers))


def _add(archive: zipfile.ZipFile, record: str, weight: Tensor) -> None:
    """Append a tensor as float32 in little-endian order, stored as it is."""
    content = weight.to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
    info = zipfile.ZipInfo(f"{_ROOT}/{record}")
    info.file_size = content.nbytes  # says beforehand whether the record needs 64-bit sizes
    with archive.open(info, "w") as file:
        file.write(content.reshape(-1).data.cast("B"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from saying that TorchScript is on its way out: whoever asks for it knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning)
        yield
