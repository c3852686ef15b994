"""ONNX graphs: the interface documented for consumers, and agreement of the logits with the reference."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from google.protobuf.message import Message
from safetensors.torch import load_file, save_file

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.export import export
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.exporter.quantization.recipes import RECIPES, parse_precisions
from llm_edge.model.decoder import Decoder

Logits = npt.NDArray[np.float32]
Cache = list[npt.NDArray[np.float32]]

BOUND = 1e-4
INLINE = 1024
LAYERS = 2  # of `tiny_checkpoint`, from which the bundles of conftest.py are exported
PRECISIONS = ("fp32", "int8", "int4")  # in the bundles of conftest.py
UNDECLARED = "SimplifiedLayerNormalization"  # specific to onnxruntime, but in the standard domain
STYLES = [style.value for style in GraphStyle]
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha, untied": {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False},
    # Nothing here is a multiple of a block or a SIMD width except the head size, which GroupQueryAttention requires.
    "mqa, odd sizes": {
        "vocab_size": 347,
        "hidden_size": 52,
        "intermediate_size": 77,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


class Graphs:
    """The `.onnx` files of both bundles, parsed once."""

    def __init__(self, fused: Path, portable: Path) -> None:
        self._bundles = {"fused": fused, "portable": portable}
        self._protos: dict[Path, onnx.ModelProto] = {}

    def path(self, style: str, recipe: str) -> Path:
        return self._bundles[style] / "onnx" / f"{RECIPES[recipe].stem}.onnx"

    def proto(self, style: str, recipe: str) -> onnx.ModelProto:
        path = self.path(style, recipe)
        if path not in self._protos:
            self._protos[path] = onnx.load(path, load_external_data=False)
        return self._protos[path]


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path, tiny_portable_bundle: Path) -> Graphs:
    return Graphs(tiny_bundle, tiny_portable_bundle)


every_graph = pytest.mark.parametrize(("style", "recipe"), list(itertools.product(STYLES, PRECISIONS)))


# ---- the documented interface


@every_graph
def test_inputs_and_outputs_are_as_documented(graphs: Graphs, style: str, recipe: str) -> None:
    def described(values: Sequence[Any]) -> list[tuple[str, int, list[str | int]]]:
        tensors = [(value.name, value.type.tensor_type) for value in values]
        return [(name, it.elem_type, [dim.dim_param or dim.dim_value for dim in it.shape.dim]) for name, it in tensors]

    kinds = onnx.TensorProto
    pairs = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    past: list[str | int] = ["batch_size", 2, "past_sequence_length", 32]
    present: list[str | int] = ["batch_size", 2, "total_sequence_length", 32]
    graph = graphs.proto(style, recipe).graph
    assert described(graph.input) == [
        ("input_ids", kinds.INT64, ["batch_size", "sequence_length"]),
        ("attention_mask", kinds.INT64, ["batch_size", "total_sequence_length"]),
        *((f"past_key_values.{pair}", kinds.FLOAT, past) for pair in pairs),
        ("num_logits_to_keep", kinds.INT64, []),
    ]
    assert described(graph.output) == [
        ("logits", kinds.FLOAT, ["batch_size", "num_logits", 331]),
        *((f"present.{pair}", kinds.FLOAT, present) for pair in pairs),
    ]


@every_graph
def test_num_logits_to_keep_is_optional(graphs: Graphs, style: str, recipe: str) -> None:
    """Older IR versions make every initializer an optional input; here only this one is."""
    session = ort.InferenceSession(graphs.path(style, recipe), providers=["CPUExecutionProvider"])
    assert "num_logits_to_keep" not in [node.name for node in session.get_inputs()]
    assert [node.name for node in session.get_overridable_initializers()] == ["num_logits_to_keep"]


@pytest.mark.parametrize("recipe", PRECISIONS)
def test_portable_graphs_use_standard_operators_only(graphs: Graphs, recipe: str) -> None:
    model = graphs.proto("portable", recipe)
    assert {(node.domain, node.op_type) for node in model.graph.node if node.domain} == set()
    assert {it.domain for it in model.opset_import} == {""}
    assert len(model.functions) == 0
    for node in model.graph.node:
        assert onnx.defs.has(node.op_type, ""), node.op_type
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["Attention"] == LAYERS
    assert counts["RotaryEmbedding"] == 2 * LAYERS


@pytest.mark.parametrize("recipe", PRECISIONS)
def test_fused_graphs_use_the_fused_kernels(graphs: Graphs, recipe: str) -> None:
    model = graphs.proto("fused", recipe)
    named = {(node.domain, node.name) for node in model.graph.node}
    counts = Counter(node.op_type for node in model.graph.node)
    assert {it.domain for it in model.opset_import} == {"", "com.microsoft"}
    assert len(model.functions) == 0
    assert counts["GroupQueryAttention"] == LAYERS
    for layer in range(LAYERS):
        assert ("com.microsoft", f"/layers/{layer}/attention/GroupQueryAttention") in named
        assert ("com.microsoft", f"/layers/{layer}/mlp_norm/SkipSimplifiedLayerNormalization") in named
    assert ("com.microsoft", "/layers/1/attention_norm/SkipSimplifiedLayerNormalization") in named
    bytes_of_activations = sum(node.name.endswith("/High") for node in model.graph.node)
    assert bytes_of_activations <= (4 * LAYERS if recipe == "int8" else 0)
    assert counts["Attention"] == 0
    assert counts["RotaryEmbedding"] == LAYERS
    assert counts["Cos"] == counts["Sin"] == 1
    assert counts["Concat"] - bytes_of_activations - (recipe == "fp32") == 0
    norms = counts["SkipSimplifiedLayerNormalization"] + counts["RMSNormalization"]
    assert norms == 2 * LAYERS + 1
    for node in model.graph.node:
        known = node.op_type == UNDECLARED or onnx.defs.has(node.op_type, "")
        assert node.domain == "com.microsoft" or known, node.op_type


@every_graph
def test_the_mask_is_summed_once_for_all_layers(graphs: Graphs, style: str, recipe: str) -> None:
    """Values that depend only on the mask are computed once, not once per layer."""
    counts = Counter(node.op_type for node in graphs.proto(style, recipe).graph.node)
    assert counts["ReduceSum"] + counts["CumSum"] == 1


@every_graph
def test_node_names_are_paths(graphs: Graphs, style: str, recipe: str) -> None:
    graph = graphs.proto(style, recipe).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"(/[A-Za-z][A-Za-z0-9_]*|/\d+)+", name), name
    for layer in range(LAYERS):
        for module in ("attention/qkv", "attention/output", "mlp/gate_up", "mlp/down", "attention_norm", "mlp_norm"):
            assert any(name.startswith(f"/layers/{layer}/{module}/") for name in names), (layer, module)
    for module in ("embed_tokens", "norm", "lm_head"):
        assert any(name.startswith(f"/{module}/") for name in names), module

    outputs = {value.name for value in graph.output}
    values = [name for node in graph.node for name in node.output if name]
    assert len(set(values)) == len(values)
    for node in graph.node:
        for name in node.output:
            assert not name or name in outputs or name.startswith(f"{node.name}/"), (node.name, name)


@every_graph
def test_small_tensors_are_inline_and_large_ones_external(graphs: Graphs, style: str, recipe: str) -> None:
    path = graphs.path(style, recipe)
    model = graphs.proto(style, recipe)
    end = 0
    for tensor in model.graph.initializer:
        size = math.prod(tensor.dims) * BITS[tensor.data_type] / 8
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert external == (size > INLINE), tensor.name
        if external:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == f"{path.name}_data"
            assert int(where["length"]) == math.ceil(size)
            assert int(where["offset"]) >= end  # no overlaps
            end = int(where["offset"]) + int(where["length"])
        else:
            assert len(tensor.SerializeToString()) < INLINE + 200
    assert end == path.with_name(f"{path.name}_data").stat().st_size
    assert end > INLINE
    for node in model.graph.node:
        for attribute in node.attribute:
            assert attribute.ByteSize() <= INLINE


BITS = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
}


@every_graph
def test_graphs_contain_no_paths_of_the_exporting_machine(
    graphs: Graphs, style: str, recipe: str, tiny_checkpoint: Path
) -> None:
    def messages(root: Message) -> Iterator[Message]:
        yield root
        for field, value in root.ListFields():
            if field.message_type is not None:
                for child in [value] if isinstance(value, Message) else value:
                    yield from messages(child)

    model = graphs.proto(style, recipe)
    for message in messages(model):
        assert not getattr(message, "doc_string", "")
        assert not len(getattr(message, "metadata_props", []))
    content = graphs.path(style, recipe).read_bytes()
    for trace in (b".py", b"/root", b"/home", b"site-packages", b"torch.", os.fsencode(tiny_checkpoint.parent)):
        assert trace not in content
    assert len(content) < 60_000


@every_graph
def test_every_initializer_is_used(graphs: Graphs, style: str, recipe: str) -> None:
    graph = graphs.proto(style, recipe).graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read


@every_graph
def test_the_onnx_checker_accepts_the_graphs(graphs: Graphs, style: str, recipe: str) -> None:
    """With shape inference if onnx knows every operator, so that declared shapes match the inferred ones."""
    if style == "portable":
        onnx.checker.check_model(graphs.path(style, recipe), full_check=True)
        return
    model = onnx.load(graphs.path(style, recipe))
    for node in model.graph.node:
        if node.op_type == UNDECLARED:
            node.domain = "com.microsoft"
    onnx.checker.check_model(model)


@pytest.mark.parametrize("style", STYLES)
def test_the_same_checkpoint_yields_the_same_bytes(
    graphs: Graphs, tiny_checkpoint: Path, tmp_path: Path, style: str
) -> None:
    """Also in another process with another hash seed."""
    program = (
        "import sys; from pathlib import Path; from llm_edge.exporter.export import export;"
        "from llm_edge.exporter.options import ExportOptions, GraphChoice;"
        "export(sys.argv[1], ExportOptions(Path(sys.argv[2]), precision=sys.argv[4], graph=GraphChoice(sys.argv[3]),"
        " validate=False))"
    )
    other = tmp_path / "other"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", program, tiny_checkpoint, other, style, ",".join(PRECISIONS)]
    subprocess.run(command, check=True, env=environment)
    files = sorted(path.name for path in (other / "onnx").iterdir())
    assert files == sorted(f"{RECIPES[name].stem}.onnx{end}" for name in PRECISIONS for end in ("", "_data"))
    for name in files:
        theirs = graphs.path(style, "fp32").with_name(name)
        assert (other / "onnx" / name).read_bytes() == theirs.read_bytes(), name


# ---- computed logits


class Runner:
    """A graph and the reference decoder with the same weights."""

    def __init__(self, checkpoint: Path, model: Path) -> None:
        read = read_folder(checkpoint)
        self.config = read.config
        self._decoder = Decoder(read.config).eval()
        self._decoder.load_weights(read.weights)
        self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._names = [f"{i}.{part}" for i in range(self.config.num_hidden_layers) for part in ("key", "value")]

    def text(self, length: int, seed: int = 0) -> npt.NDArray[np.int64]:
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, length)

    def empty(self, batch: int = 1) -> Cache:
        return [np.zeros((batch, *self._cache_shape(0)), dtype=np.float32) for _ in self._names]

    def _cache_shape(self, length: int) -> tuple[int, int, int]:
        return (self.config.num_key_value_heads, length, self.config.head_dim)

    def run(self, ids: Any, mask: Any, past: Cache, keep: int | None = None) -> tuple[Logits, Cache]:
        feeds = {"input_ids": np.asarray(ids, dtype=np.int64), "attention_mask": np.asarray(mask, dtype=np.int64)}
        feeds |= {f"past_key_values.{name}": it for name, it in zip(self._names, past, strict=True)}
        if keep is not None:
            feeds["num_logits_to_keep"] = np.array(keep, dtype=np.int64)
        logits, *presents = self._session.run(["logits", *(f"present.{name}" for name in self._names)], feeds)
        for present in presents:
            assert present.shape == (len(feeds["input_ids"]), *self._cache_shape(feeds["attention_mask"].shape[1]))
        return logits, presents

    def in_chunks(self, tokens: npt.NDArray[np.int64], chunks: Sequence[int]) -> Logits:
        """Logits [S, V] of one sequence, computed in chunks."""
        past, done, logits = self.empty(), 0, []
        for size in chunks:
            chunk_logits, past = self.run(tokens[None, done : done + size], np.ones((1, done + size)), past)
            logits.append(chunk_logits[0])
            done += size
        assert done == len(tokens)
        return np.concatenate(logits)

    @torch.inference_mode()
    def reference(self, tokens: npt.NDArray[np.int64]) -> Logits:
        """Logits [S, V] of one sequence in a single step, without padding."""
        ids = torch.from_numpy(tokens)[None]
        logits: Logits = self._decoder(ids, torch.ones_like(ids), self._decoder.empty_past())[0][0].numpy()
        return logits


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sensitive to its weights: large enough for peaked attention, with norms that are not all one."""
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("weights"), initializer_range=0.15, **SHAPES[request.param])
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    weights = {name: torch.rand_like(it) + 0.5 if "norm" in name else it for name, it in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def models(checkpoint: Path, style: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Graphs by recipe."""
    output = tmp_path_factory.mktemp("made") / "bundle"
    precisions = ",".join(PRECISIONS)
    export(str(checkpoint), ExportOptions(output, precision=precisions, graph=GraphChoice(style), validate=False))
    return {recipe.name: output / "onnx" / f"{recipe.stem}.onnx" for recipe in parse_precisions(precisions)}


@pytest.fixture(scope="module")
def runner(checkpoint: Path, models: dict[str, Path]) -> Runner:
    return Runner(checkpoint, models["fp32"])


def close(found: Logits, wanted: Logits) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= BOUND  # False for NaN


@pytest.mark.parametrize("length", [1, 2, 61, 700])
def test_a_single_step_matches_the_reference(runner: Runner, length: int) -> None:
    tokens = runner.text(length)
    wanted = runner.reference(tokens)
    assert length < 3 or wanted.std() > 0.5
    close(runner.in_chunks(tokens, [length]), wanted)


@pytest.mark.parametrize(
    "chunks",
    [[30, 31], [1, 7, 16, 2, 35], [60, 1], [1] * 61],
    ids=["two", "uneven", "last", "token by token"],
)
def test_chunks_match_the_reference(runner: Runner, chunks: list[int]) -> None:
    tokens = runner.text(61)
    close(runner.in_chunks(tokens, chunks), runner.reference(tokens))


def test_the_whole_context_can_be_used(runner: Runner) -> None:
    limit = runner.config.max_position_embeddings
    tokens = runner.text(limit)
    close(runner.in_chunks(tokens, [limit - 3, 1, 1, 1]), runner.reference(tokens))


def test_a_right_padded_batch_matches_its_sequences_alone(runner: Runner) -> None:
    check_padded_batch(runner, "right")


@pytest.mark.parametrize("style", ["portable"], scope="module", indirect=True)
def test_a_left_padded_batch_matches_its_sequences_alone(runner: Runner) -> None:
    """Portable graphs only: GroupQueryAttention supports padding on the right only."""
    check_padded_batch(runner, "left")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["gemma2", "ministral3"])
def test_softcapping_and_growing_queries_are_right_in_a_padded_batch(name: str, style: str, tmp_path: Path) -> None:
    checkpoint = families.save(families.model(name), tmp_path / "model")
    options = ExportOptions(tmp_path / "bundle", precision="fp32", graph=GraphChoice(style), validate=False)
    export(str(checkpoint), options)
    runner = Runner(checkpoint, tmp_path / "bundle" / "onnx" / "model.onnx")
    # Windows of portable graphs count slots, so that padding must not lie within a sequence.
    check_padded_batch(runner, "right" if style == "fused" else "left")


def check_padded_batch(runner: Runner, side: str) -> None:
    """Each sequence of a padded batch matches the sequence alone, for the prompt and then token by token."""
    prompts, steps = [9, 1, 17, 5], 5
    rows = [runner.text(length + steps, seed) for seed, length in enumerate(prompts)]
    wanted = [runner.reference(row) for row in rows]
    width = max(prompts)
    ids, mask = np.full((len(rows), width), 7), np.zeros((len(rows), width))
    spans = [slice(0, length) if side == "right" else slice(width - length, width) for length in prompts]
    for number, (row, span, length) in enumerate(zip(rows, spans, prompts, strict=True)):
        ids[number, span], mask[number, span] = row[:length], 1
    logits, past = runner.run(ids, mask, runner.empty(len(rows)))
    assert np.isfinite(logits).all()
    for number, (span, length) in enumerate(zip(spans, prompts, strict=True)):
        close(logits[number, span], wanted[number][:length])
    for step in range(steps):
        ids = np.stack([row[length + step] for row, length in zip(rows, prompts, strict=True)])[:, None]
        mask = np.concatenate([mask, np.ones((len(rows), 1))], axis=1)
        logits, past = runner.run(ids, mask, past)
        for number, length in enumerate(prompts):
            close(logits[number, 0], wanted[number][length + step])


def test_a_batch_of_equal_lengths_matches_its_sequences_alone(runner: Runner) -> None:
    rows = np.stack([runner.text(24, seed) for seed in range(3)])
    first, past = runner.run(rows[:, :20], np.ones((3, 20)), runner.empty(3))
    logits = [first]
    for step in range(20, 24):
        chunk_logits, past = runner.run(rows[:, step : step + 1], np.ones((3, step + 1)), past)
        logits.append(chunk_logits)
    for row, found in zip(rows, np.concatenate(logits, axis=1), strict=True):
        close(found, runner.reference(row))


def test_num_logits_to_keep_limits_the_logits(runner: Runner) -> None:
    tokens = runner.text(2 * 11).reshape(2, 11)
    mask, past = np.ones((2, 11)), runner.empty(2)
    everything, presents = runner.run(tokens, mask, past)
    assert everything.shape == (2, 11, runner.config.vocab_size)
    for keep, rows in ((0, 11), (1, 1), (4, 4), (11, 11)):
        kept, kept_presents = runner.run(tokens, mask, past, keep)
        assert kept.shape == (2, rows, runner.config.vocab_size)
        np.testing.assert_allclose(kept, everything[:, -rows:], atol=1e-5)
        for ours, theirs in zip(presents, kept_presents, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_graphs_work_for_any_shape(checkpoint: Path, models: dict[str, Path], recipe: str) -> None:
    """Including sizes that are not a multiple of a block; in a single step, in chunks and token by token."""
    runner = Runner(checkpoint, models[recipe])
    tokens = runner.text(40)
    wanted = runner.reference(tokens)
    for chunks in ([40], [20, 20], [30, *[1] * 10]):
        found = runner.in_chunks(tokens, chunks)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < {"int8": 0.08, "int4": 0.6}[recipe]
