"""The recipe `source`: quantized blocks of a GGUF are exported unchanged and compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from onnx import numpy_helper
from sessions import open_file
from test_gguf_families import save_folder, write_gguf

from llm_edge.checkpoint.gguf.blocks import TYPES as TYPES_READ
from llm_edge.checkpoint.gguf.checkpoint import read_gguf
from llm_edge.exporter.export import export
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.model.decoder import Decoder
from llm_edge.runtime import Bundle
from llm_edge.runtime.errors import CheckpointError

LLAMA: dict[str, Any] = {  # more query than key heads, so that the row order differs; all rows are whole blocks
    "model_type": "llama",
    "vocab_size": 337,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TYPES = {"Q3_K": 4, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_K": 8, "Q6_K": 8, "Q8_0": 8}
"""Bits of a weight in the bundle."""
OFFSETS = {"Q4_1", "Q4_K", "Q5_K"}
MIXED = {
    "attn_v": "F16",  # one part of a stacked matrix, which is then dense
    "attn_output": "Q4_1",
    "ffn_up": "Q4_0",  # parts of different types: the common layout has 8 bits
    "ffn_gate": "Q6_K",
    "ffn_down": "TQ1_0",  # cannot be kept
    "token_embd": "F16",
    "output": "Q8_0",
}
Tensors = Mapping[str, npt.NDArray[Any]]


def stored_as(kind: GGMLQuantizationType, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Values in a storage type; for those that gguf cannot write, random blocks of a similar size."""
    try:
        return quantize(values, kind)
    except NotImplementedError:
        layout = TYPES_READ[kind].layout
        rng = np.random.default_rng(len(values))
        shape = (len(values), values.shape[1] // GGML_QUANT_SIZES[kind][0] * layout.itemsize)
        stored = rng.integers(0, 256, shape, dtype=np.uint8)
        blocks = stored.view(layout)
        for field in {"d", "m"} & {*layout.names}:
            blocks[field] = 1
        factor = values.std() / dequantize(stored, kind).std()
        for field in {"d", "m"} & {*layout.names}:
            blocks[field] = factor
        return stored


def quantized(kinds: Mapping[str, str], otherwise: str = "F32", damaged: bool = False) -> Callable[[GGUFWriter], None]:
    """Store matrices in the given types, selected by a part of their names; a damaged one has a NaN scale."""

    def edit(writer: GGUFWriter) -> None:
        tensors = {name: info.tensor for name, info in writer.tensors[0].items()}
        writer.tensors[0].clear()
        for name, values in tensors.items():
            found = next((kind for part, kind in kinds.items() if f".{part}." in f".{name}"), otherwise)
            kind = GGMLQuantizationType[found if values.ndim == 2 else "F32"]
            stored = stored_as(kind, np.ascontiguousarray(values))
            if damaged and name == "blk.0.ffn_down.weight":
                stored[0, :2] = (0, 0x7E)
            writer.add_tensor(name, stored, raw_dtype=kind)

    return edit


def save_gguf(folder: Path, edit: Callable[[GGUFWriter], None], *, tied: bool = True) -> Path:
    save_folder(folder, {**LLAMA, "tie_word_embeddings": tied})
    return write_gguf(folder, folder / "model.gguf", edit)


def export_source(path: Path, style: GraphStyle, *, validate: bool = False) -> Path:
    output = path.parent / style.value
    options = ExportOptions(output, precision="source", graph=GraphChoice(style.value), validate=validate, force=True)
    export(str(path), options)
    return output


def graph_of(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "onnx" / "model_source.onnx")


def numbers_of(graph: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def halves(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two numbers of each byte, the low half first."""
    return np.stack([packed % 16, packed // 16], axis=-1)


def kept_weight(tensors: Tensors, name: str, bits: int, portable: bool) -> npt.NDArray[np.float64]:
    """A weight [N, K] reconstructed from the graph, according to the documentation of its operators."""
    parts = []
    for stem in [name] if any(key.startswith(f"{name}.") for key in tensors) else [f"{name}_0", f"{name}_1"]:
        if portable:  # of the embedding, used by the head
            levels = tensors[f"{stem}.transposed.data"].astype(np.float64).T
            scales = tensors[f"{stem}.transposed.scales"].T
        else:
            data = tensors[f"{stem}.data"]
            whole = halves(data) if bits == 4 else data
            levels = whole.reshape(len(data), -1).astype(np.float64) - (8 if bits == 4 else 128)
            scales = tensors[f"{stem}.scales"]
        block = levels.shape[1] // scales.shape[1]
        weight = levels * np.repeat(scales.astype(np.float64), block, axis=1)
        if f"{stem}.offsets" in tensors:
            weight += np.repeat(tensors[f"{stem}.offsets"].astype(np.float64).T, block, axis=1)
        parts.append(weight)
    return np.concatenate(parts)


def logits_of(bundle: Path, style: GraphStyle, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits of a prompt and of the tokens after it, one by one."""
    shape = Bundle.open(bundle).shape
    session = open_file(bundle / "onnx" / "model_source.onnx", shape, style is GraphStyle.FUSED, provider="cpu")
    steps = [session.step(tokens[:30], 0).copy()]
    steps += [session.step([token]).copy() for token in tokens[30:]]
    return np.concatenate([step.reshape(-1, step.shape[-1]) for step in steps])


def exact_logits_of(bundle: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits of a prompt with kernels configured to keep activations in float32."""
    graph = graph_of(bundle)
    for node in graph.graph.node:
        for entry in node.attribute:
            if entry.name == "accuracy_level":
                entry.i = 1
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    heads, head_dim = LLAMA["num_key_value_heads"], LLAMA["head_dim"]
    empty = np.zeros((1, heads, 0, head_dim), np.float32)
    feeds = {node.name: empty for node in session.get_inputs() if node.name.startswith("past")}
    feeds |= {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    logits: npt.NDArray[np.float32] = session.run(["logits"], feeds)[0]
    return logits[0]


def reference(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits of the GGUF's dequantized weights in float32."""
    checkpoint = read_gguf(path)
    decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    with torch.no_grad():
        logits, _ = decoder(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.int64), decoder.empty_past())
    return logits[0].numpy()


TOKENS = torch.randint(0, 320, (36,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=TYPES)
def pure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tied model whose matrices are all of one type."""
    folder = tmp_path_factory.mktemp("pure")
    return request.param, save_gguf(folder, quantized({}, otherwise=request.param))


@pytest.fixture(scope="module", params=GraphStyle)
def kept(request: pytest.FixtureRequest, pure: tuple[str, Path]) -> tuple[str, Path, GraphStyle, Path]:
    """Type, source, style and bundle."""
    return *pure, request.param, export_source(pure[1], request.param)


def test_the_graph_holds_the_weights_of_the_source(kept: tuple[str, Path, GraphStyle, Path]) -> None:
    kind, path, style, bundle = kept
    tensors = numbers_of(graph_of(bundle))
    bits = TYPES[kind]
    weights = read_gguf(path).weights
    matrices = [name for name in weights if weights[name].dim() == 2]
    assert len(matrices) == 9
    for name in matrices:
        weight = kept_weight(tensors, name, bits, style is GraphStyle.PORTABLE)
        theirs = weights[name].double().numpy()
        if kind not in OFFSETS:
            np.testing.assert_array_equal(weight, theirs, err_msg=name)
            continue
        # gguf rounds d q + m to float32, ours of 4 bits are d (q - 8) and, rounded, m + 8 d: half a unit of each.
        offsets = [np.abs(array).max() for key, array in tensors.items() if key.startswith(name) and "offsets" in key]
        assert np.abs(weight - theirs).max() <= 2.0**-24 * (np.abs(theirs).max() + max(offsets)), name


def test_logits_match_the_source(kept: tuple[str, Path, GraphStyle, Path]) -> None:
    _, path, style, bundle = kept
    expected = reference(path, TOKENS)
    np.testing.assert_allclose(exact_logits_of(bundle, TOKENS), expected, atol=1e-4, rtol=0)
    # The kernels round activations to 8 bits; fused graphs compute what the rounding takes as well.
    bound = 5e-4 if style is GraphStyle.FUSED else 0.05
    assert np.abs(logits_of(bundle, style, TOKENS) - expected).mean() < bound * expected.std()


@pytest.mark.parametrize("kept", [GraphStyle.FUSED], indirect=True)  # others store the head's weight transposed
def test_a_tied_embedding_is_stored_once(kept: tuple[str, Path, GraphStyle, Path]) -> None:
    kind, _, _, bundle = kept
    graph = graph_of(bundle).graph
    own = [tensor for tensor in graph.initializer if tensor.name.startswith("embed_tokens")]
    fields = {"data", "scales"} | ({"offsets"} if kind in OFFSETS else set())
    assert {tensor.name for tensor in own} == {f"embed_tokens.weight.{field}" for field in fields}
    (head,) = (node for node in graph.node if node.name == "/lm_head/MatMulNBits")
    (gather,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    assert head.input[2] == gather.input[2] == "embed_tokens.weight.scales"


@pytest.mark.parametrize(("embedding", "head"), [("Q8_0", "Q8_0"), ("Q8_0", "F32"), ("F32", "Q8_0")])
def test_a_head_with_the_numbers_of_the_embedding_is_stored_once(tmp_path: Path, embedding: str, head: str) -> None:
    numbers = np.random.default_rng(0).standard_normal((LLAMA["vocab_size"], LLAMA["hidden_size"]), np.float32)
    stored = {"Q8_0": quantize(numbers, GGMLQuantizationType.Q8_0)}
    stored["F32"] = dequantize(stored["Q8_0"], GGMLQuantizationType.Q8_0)

    def edit(writer: GGUFWriter) -> None:
        quantized({}, otherwise="Q4_0")(writer)
        del writer.tensors[0]["token_embd.weight"]
        for name, kind in (("token_embd.weight", embedding), ("output.weight", head)):
            writer.add_tensor(name, stored[kind], raw_dtype=GGMLQuantizationType[kind])

    bundle = export_source(save_gguf(tmp_path, edit), GraphStyle.FUSED)
    names = {tensor.name for tensor in graph_of(bundle).graph.initializer}
    assert {name for name in names if "embed" in name or "lm_head" in name} >= {"embed_tokens.weight.data"}
    assert not any(name.startswith("lm_head.weight") for name in names)
    np.testing.assert_array_equal(
        kept_weight(numbers_of(graph_of(bundle)), "embed_tokens.weight", 8, False), stored["F32"]
    )


def test_other_storage_types_become_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.shorten_texts(monkeypatch, 200)
    path = save_gguf(tmp_path, quantized(MIXED, otherwise="Q4_0"), tied=False)
    bundle = export_source(path, GraphStyle.FUSED, validate=True)
    graph = graph_of(bundle)
    kinds = {
        node.name: (node.op_type, next((entry.i for entry in node.attribute if entry.name == "bits"), 32))
        for node in graph.graph.node
        if node.op_type in ("MatMul", "MatMulNBits", "GatherBlockQuantized") and not node.name.endswith("Offsets")
    }
    layer = "/layers/1"
    for name, expected in {
        f"{layer}/attention/qkv/MatMul": ("MatMul", 32),
        f"{layer}/attention/output/MatMulNBits": ("MatMulNBits", 4),
        f"{layer}/mlp/gate_up/MatMulNBits_0": ("MatMulNBits", 8),
        f"{layer}/mlp/down/MatMul": ("MatMul", 32),
        "/lm_head/MatMulNBits": ("MatMulNBits", 8),
        "/embed_tokens/GatherBlockQuantized": ("GatherBlockQuantized", 8),  # rounded, to blocks of 32
    }.items():
        assert kinds.get(name) == expected, (name, sorted(kinds))
    expected = reference(path, TOKENS)
    assert np.abs(exact_logits_of(bundle, TOKENS) - expected).mean() < 0.05 * expected.std()
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert "the source's own blocks" in manifest["precisions"]["source"]["recipe"]
    assert manifest["precisions"]["source"]["quality"]["kl_mean"] < 0.01


# ---- the command


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.shorten_texts(monkeypatch, 200)


@pytest.mark.parametrize("case", ["folder", "F16", "TQ1_0", "TQ1_0 and a head of Q8_0"])
def test_a_source_without_blocks_is_rejected_in_one_line(
    case: str, tmp_path: Path, tiny_checkpoint: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    types, source = "F32", tiny_checkpoint
    if case != "folder":
        types = case.split(" ", 1)[0]
        head = {"token_embd": "Q8_0"} if "head" in case else {}
        source = save_gguf(tmp_path, quantized(head, otherwise=types))
    output = tmp_path / "bundle"
    code, out, error = llm_export(source, "-o", output, "--precision", "fp32,source")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert str(source) in error
    assert types in error
    assert error.endswith("choose int8 or int4\n")
    assert not output.exists()


@pytest.mark.parametrize("pure", ["Q4_0"], indirect=True)
def test_the_report_names_a_second_rounding(
    pure: tuple[str, Path], tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = llm_export(pure[1], "-o", tmp_path / "rounded", "--precision", "source,int4", "--no-validate")
    assert code == 0
    (line,) = (line for line in out.splitlines() if "quantized already" in line)
    assert "(Q4_0)" in line
    assert "int4" in line
    assert "--precision source" in line
    code, out, _ = llm_export(pure[1], "-o", tmp_path / "kept", "--precision", "source", "--no-validate")
    assert code == 0
    assert "quantized already" not in out


@pytest.mark.parametrize("pure", ["Q4_1"], indirect=True)
def test_a_quantized_gguf_keeps_its_numbers_by_default(
    pure: tuple[str, Path], tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, _ = llm_export(pure[1], "-o", tmp_path / "bundle", "--no-validate")
    assert code == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert list(bundle.precisions) == ["source"]
    assert bundle.precision().name == "source"


def test_a_nan_scale_is_rejected(tmp_path: Path) -> None:
    path = save_gguf(tmp_path, quantized({}, otherwise="Q4_1", damaged=True))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down\.weight: .* the checkpoint is damaged"):
        export_source(path, GraphStyle.FUSED)
