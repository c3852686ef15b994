"""Writes a decoder as TorchScript, which `torch.jit.load` runs without this package.

The decoder is traced on the meta device, without weights. Batch size and lengths remain symbolic in a trace, but
devices do not; they are replaced by the device of the inputs afterwards. torch cannot save weights one at a time,
stores source paths and line numbers with the code, and aborts the process if the disk is full. Therefore torch saves a
skeleton without weights to memory, from which the archive is assembled: the code unchanged, debug information
removed, and weights read and written one at a time. The same source always gives the same file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import StoredPrecision
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.texts import Texts
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder, rotary_tables
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import AnySession, open_session
from llm_edge.runtime.bundle import TORCHSCRIPT
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.model_shape import ModelShape

_BATCH, _NEW, _PAST = 2, 3, 5  # sizes of the traced inputs, all different and none of them 1
_ROOT = "model"  # folder inside the archive


class Exported(nn.Module):
    """The exported module: a traced decoder up to its last norm, and its head. Shapes are as in `model/decoder.py`."""

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
        """Run S new tokens; see `Decoder.forward`."""
        flat: list[Tensor] = []
        for key, value in past:
            flat.append(key)
            flat.append(value)
        x, flat_presents = self.body(input_ids, attention_mask, flat)
        if num_logits_to_keep > 0:
            x = x[:, -num_logits_to_keep:]
        presents: list[tuple[Tensor, Tensor]] = []
        for index in range(0, len(flat_presents), 2):
            # The compiler does not support a comprehension of pairs.
            presents.append((flat_presents[index], flat_presents[index + 1]))  # noqa: PERF401
        return self.lm_head(x), presents

    @torch.jit.export
    def empty_past(self, batch_size: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Return an empty cache on the device of the weights."""
        empty = self.lm_head.weight.new_zeros([batch_size, self.heads, 0, self.head_dim])
        past: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.layers):
            past.append((empty, empty))  # noqa: PERF401
        return past


class _Body(nn.Module):
    """A decoder with the cache as a flat list, keys and values alternating, as tracing requires."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x, presents = self.decoder(input_ids, attention_mask, list(zip(past[::2], past[1::2], strict=True)))
        return x, [tensor for present in presents for tensor in present]


class TorchScriptWriter:
    """Writes fp32 as TorchScript, like `OnnxWriter`; raises ParameterError for other recipes."""

    name = TORCHSCRIPT
    style = None
    hidden_size = None

    def __init__(self, recipes: tuple[Recipe, ...]) -> None:
        lossy = [recipe.name for recipe in recipes if not recipe.lossless]
        if lossy:
            raise ParameterError(
                f"--format torchscript supports fp32 only, not {', '.join(lossy)}: "
                "use --precision fp32 or --format onnx"
            )

    def write(
        self,
        folder: Path,
        model: Checkpoint,
        recipes: tuple[Recipe, ...],
        texts: Texts,  # noqa: ARG002 (nothing is quantized)
        progress: Progress,
        journal: Journal | None = None,  # noqa: ARG002
    ) -> dict[str, StoredPrecision]:
        for recipe in recipes:
            write_torchscript(folder / self.file_name(recipe), model.config, model.weights, progress)
        return {}

    def file_name(self, recipe: Recipe) -> str:
        return f"{recipe.stem}.pt"

    def files(self, folder: Path, recipe: Recipe) -> list[Path]:
        return [folder / self.file_name(recipe)]

    def open(self, folder: Path, shape: ModelShape, recipe: Recipe) -> AnySession:
        file = GraphFile(folder / self.file_name(recipe), shape, TORCHSCRIPT, share_buffer=False)
        return open_session(file, ExecutionOptions("cpu"))


def write_torchscript(path: Path, config: ModelConfig, weights: Mapping[str, Tensor], progress: Progress) -> None:
    """Write a decoder to a file with one weight, by its name in `Decoder`, in memory at a time.

    Raises:
        OSError: the file cannot be written; an incomplete file is not removed.
    """
    progress("tracing", None, f"{config.num_hidden_layers} layers, TorchScript")
    with _quiet():
        _script(dataclasses.replace(config, layers=config.layers[:1]))  # reserves the class names without a number
        other_records, names = _skeleton(_script(config), config)
    tables = rotary_tables(config)
    with zipfile.ZipFile(path, "w") as archive:
        for number, (record, name) in enumerate(names.items()):
            _add(archive, record, tables[name] if name in tables else weights[name])
            progress("quantizing", (number + 1) / len(names), "fp32")
        for record, content in other_records.items():
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{record}"), content)


def _script(config: ModelConfig) -> torch.jit.ScriptModule:
    """Return the module without weights."""
    with torch.device("meta"):
        decoder = Decoder(config, standalone=True).eval().requires_grad_(False)
    head = decoder.lm_head
    decoder.register_module("lm_head", nn.Identity())
    ids = torch.zeros(_BATCH, _NEW, dtype=torch.int64, device="meta")
    mask = torch.zeros(_BATCH, _PAST + _NEW, dtype=torch.int64, device="meta")
    past = [tensor for pair in decoder.empty_past(_BATCH, _PAST) for tensor in pair]
    # Lists must have the same length in each call: here two tensors per layer.
    body: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
        _Body(decoder), (ids, mask, past), check_trace=False, strict=False
    )
    hidden = torch.zeros(_BATCH, _NEW, config.hidden_size, device="meta")
    # The head is traced, since compiling it from source would store its constants in set order, which is not stable.
    traced_head = torch.jit.trace(head, (hidden,), check_trace=False)  # type: ignore[no-untyped-call]
    for module in body.modules():
        if isinstance(module, torch.jit.ScriptModule) and module._c._has_method("forward"):  # lists have none
            _follow_device(module.graph)
    scripted: torch.jit.ScriptModule = torch.jit.script(
        Exported(body, traced_head, config.num_hidden_layers, config.num_key_value_heads, config.head_dim).eval()
    )
    return scripted


def _follow_device(graph: Any) -> None:
    """Replace the device that was recorded as a constant by the device of the graph's first tensor."""
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
    """Return the archive's records of code and structure, and the weight or table name of each tensor record.

    The module is saved twice without weights: with tensors that hold one number each, which identifies their records,
    and with tensors of the final shapes on the meta device, whose device is then replaced by the CPU.
    """
    names = _replace(module, config, lambda shape, number: torch.full((1,), float(number)).expand(shape))
    tags, _ = _records(module)
    _replace(module, config, lambda shape, _: torch.empty(shape, device="meta"))
    _, other = _records(module)
    structure = other["data.pkl"].replace(_pickled("meta"), _pickled("cpu"))
    return other | {"data.pkl": structure}, {record: names[tag] for record, tag in tags.items()}


def _replace(
    module: torch.jit.ScriptModule, config: ModelConfig, make: Callable[[torch.Size, int], Tensor]
) -> list[str]:
    """Replace weights and tables by `make(shape, index)`, tied ones by the same; return the name at each index."""
    numbers: dict[str, int] = {}
    replacements: list[Tensor] = []
    owners = dict(module.named_modules())
    for path, old in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        name = path.removeprefix("body.decoder.")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            name = "embed_tokens.weight"
        if name not in numbers:
            numbers[name] = len(replacements)
            replacements.append(make(old.shape, len(replacements)))
        owner, _, attribute = path.rpartition(".")
        setattr(owners[owner], attribute, replacements[numbers[name]])
    return [*numbers]


def _pickled(text: str) -> bytes:
    """Return a string as pickled: the opcode BINUNICODE, the length, UTF-8."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _records(module: torch.jit.ScriptModule) -> tuple[dict[str, int], dict[str, bytes]]:
    """Save a module; return the first number of each tensor (0 on the meta device), and all other records.

    Numbers in class names are replaced, since torch counts them per process and not per file.
    """
    tags: dict[str, int] = {}
    other: dict[str, bytes] = {}
    numbers: dict[bytes, int] = {}

    def renumber(text: bytes) -> bytes:
        return re.sub(
            rb"(?<=___torch_mangle_)\d+", lambda found: b"%d" % numbers.setdefault(found[0], len(numbers)), text
        )

    with zipfile.ZipFile(io.BytesIO(module.save_to_buffer())) as archive:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if name.startswith("data/"):
                content = archive.read(info)
                tags[name] = int(struct.unpack("<f", content)[0]) if content else 0
            elif not name.endswith((".debug_pkl", "/serialization_id")):
                other[renumber(name.encode()).decode()] = renumber(archive.read(info))
    return tags, other


def _add(archive: zipfile.ZipFile, record: str, weight: Tensor) -> None:
    """Append a tensor as uncompressed little-endian float32."""
    content = weight.to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
    info = zipfile.ZipInfo(f"{_ROOT}/{record}")
    info.file_size = content.nbytes  # decides whether the record needs 64-bit sizes
    with archive.open(info, "w") as file:
        file.write(content.reshape(-1).data.cast("B"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that TorchScript is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning)
        yield
