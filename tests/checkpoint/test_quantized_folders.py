"""Quantized Hugging Face folders are read as the numbers that their tensors stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import quantized
import tiny
import torch
from quantized import quantize_folder
from safetensors.torch import load_file, save_file
from test_wrappers import model as wrapper_model
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.weight_files import WeightFiles, WeightPaths
from llm_edge.checkpoint.quantized.dequantized import open_quantized
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.errors import CheckpointError

WEIGHTS = "model.safetensors"
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
_PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True}}},
}


def _order(width: int) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(width))


Case = tuple[Mapping[str, Any], Callable[[Tensor], quantized.Written], str]
CASES: dict[str, Case] = {
    "gptq": (_GPTQ, quantized.gptq, "GPTQ 4 bits"),
    "gptq without g_idx": (_GPTQ, lambda w: quantized.gptq(w, index=False), "GPTQ 4 bits"),
    "gptq, symmetric, of 8 bits": (
        {**_GPTQ, "bits": 8, "sym": True},
        lambda w: quantized.gptq(w, 8, symmetric=True),
        "GPTQ 8 bits",
    ),
    "gptq of 2 bits": ({**_GPTQ, "bits": 2}, lambda w: quantized.gptq(w, 2), "GPTQ 2 bits"),
    "gptq of 3 bits": ({**_GPTQ, "bits": 3}, lambda w: quantized.gptq(w, 3), "GPTQ 3 bits"),
    "gptq with act-order": (
        {**_GPTQ, "desc_act": True},
        lambda w: quantized.gptq(w, order=_order(w.shape[1])),
        "GPTQ 4 bits",
    ),
    "gptq with one group per row": (
        {**_GPTQ, "group_size": -1},
        lambda w: quantized.gptq(w, group=w.shape[1]),
        "GPTQ 4 bits",
    ),
    "gptq with a smaller last group": (
        {**_GPTQ, "group_size": 48},
        lambda w: quantized.gptq(w, group=48),
        "GPTQ 4 bits",
    ),
    "gptq_v2": ({**_GPTQ, "checkpoint_format": "gptq_v2"}, lambda w: quantized.gptq(w, version=2), "GPTQ 4 bits"),
    "gptq with bits per module": (_GPTQ, lambda w: quantized.gptq(w, 8 if w.shape[1] == 128 else 4), "GPTQ 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, quantized.awq, "AWQ 4 bits"),
    "awq with the names of AutoAWQ": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True},
        quantized.awq,
        "AWQ 4 bits",
    ),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [48, 40]}, quantized.fp8_blocks, "FP8"),
    "fp8 with one scale": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        quantized.fp8_tensor,
        "FP8",
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, quantized.fp8_rows, "FP8"),
    "compressed-tensors, float-quantized": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        quantized.fp8_rows,
        "FP8",
    ),
}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def read(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), SourceOptions(), lambda _: None)


def same(checkpoint: Checkpoint, expected: Mapping[str, Tensor], rtol: float = 1e-6) -> None:
    """Every weight of a checkpoint is made of these tensors."""
    for name in checkpoint.weights:
        parts = [expected[source.name].float() for source in checkpoint.weights.sources(name)]
        torch.testing.assert_close(checkpoint.weights[name].float(), torch.cat(parts), rtol=rtol, atol=1e-7)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> None:
    """Change the tensors and the quantization config of a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_that_the_format_defines(name: str, folder: Path) -> None:
    config, write, kind = CASES[name]
    expected = quantize_folder(folder, config, write)
    checkpoint = read(folder)
    same(checkpoint, expected)
    assert checkpoint.source.weight_types.split(", ")[0] == kind
    assert "quantization_config" not in checkpoint.hf_config
    assert checkpoint.original is not None
    assert "quantization_config" not in checkpoint.original.config


def test_a_zero_point_of_zero_is_stored_as_a_borrow_from_the_next(folder: Path) -> None:
    """GPTQModel subtracts 1 from all zero points of a word at once when it saves version 1."""
    model: dict[str, Tensor] = {}

    def write(weight: Tensor) -> quantized.Written:
        parts, expected = quantized.gptq(weight.abs(), version=2)  # without negative weights, zero points are 0
        assert (parts["qzeros"] == 0).all()
        return {**parts, "qzeros": parts["qzeros"] - 0x11111111}, expected

    model = quantize_folder(folder, _GPTQ, write)
    same(read(folder), model)


def test_weights_are_read_when_they_are_requested(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_folder(folder, _GPTQ, quantized.gptq)
    loaded: list[str] = []
    whole = WeightFiles.load_stored

    def record(self: WeightFiles, name: str) -> Tensor:
        loaded.append(name)
        return whole(self, name)

    monkeypatch.setattr(WeightFiles, "load_stored", record)
    checkpoint = read(folder)
    assert {name.rpartition(".")[2] for name in loaded} == {"g_idx"}
    loaded.clear()
    assert checkpoint.weights["layers.1.mlp.down.weight"].shape == (64, 128)
    assert {name.rpartition(".")[0] for name in loaded} == {"model.layers.1.mlp.down_proj"}


def test_activation_scales_are_left_out_with_a_note(folder: Path) -> None:
    quantize_folder(folder, CASES["fp8 with one scale"][0], quantized.fp8_tensor)
    assert "14 scales of activations left out: activations are not quantized" in read(folder).notes


def test_the_text_part_of_a_quantized_wrapper_is_read(tmp_path: Path) -> None:
    """As Ministral 3: FP8 with one scale, whose config is that of the whole model."""
    theirs = wrapper_model("mistral3 with ministral3")
    config = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "modules_to_not_convert": ["model.vision_tower", "lm_head"],
        "weight_block_size": None,
    }
    folder = families.save(theirs, tmp_path)
    expected = quantize_folder(
        folder, config, quantized.fp8_tensor, select=lambda name: "language_model" in name and "_proj.weight" in name
    )
    checkpoint = read(folder)
    assert checkpoint.hf_config["model_type"] == "ministral3"
    prefix = next(name for name in expected if name.endswith("layers.0.mlp.up_proj.weight")).split("layers.")[0]
    for number in range(2):
        name = f"layers.{number}.mlp.down"
        stored = expected[f"{prefix}{name}_proj.weight"]
        torch.testing.assert_close(checkpoint.weights[f"{name}.weight"], stored, rtol=1e-6, atol=1e-7)


def test_a_quantized_head_and_weights_that_are_not_converted_are_read(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "model", tie_word_embeddings=False, vocab_size=344)
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["self_attn"]}
    expected = quantize_folder(folder, config, quantized.awq, select=lambda name: "mlp" in name or "lm_head" in name)
    same(read(folder), expected)


def test_a_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    """The parts of a weight may be in different shards."""
    folder = tiny.save_checkpoint(tmp_path / "model")
    expected = quantize_folder(folder, _GPTQ, quantized.gptq)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    same(read(folder), expected)


def test_llm_int8_is_read(folder: Path) -> None:
    def write(weight: Tensor) -> quantized.Written:
        largest = weight.abs().amax(1)
        stored = (weight * 127 / largest[:, None]).round().to(torch.int8)
        parts = {"weight": stored, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, stored.float() * largest[:, None] / 127

    config = {"load_in_8bit": True, "llm_int8_threshold": 6.0}  # as written before `quant_method` existed
    expected = quantize_folder(folder, config, write)
    same(read(folder), expected)


def test_packed_integers_in_groups_by_an_index_are_read(folder: Path) -> None:
    def write(weight: Tensor) -> quantized.Written:
        levels, zeros, scales, group_of = quantized.grid(weight, 4, 32, symmetric=True, order=_order(weight.shape[1]))
        parts = {
            "weight_packed": quantized.pack(levels.T, 4).T,
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
            "weight_g_idx": group_of.int(),
        }
        return parts, quantized.values(levels, zeros, scales, group_of)

    expected = quantize_folder(folder, _PACKED, write)
    same(read(folder), expected)


def test_the_bits_of_packed_integers_may_differ_between_modules(folder: Path) -> None:
    groups = {f"group_{bits}": {"weights": {"num_bits": bits}} for bits in (4, 8)}

    def write(weight: Tensor) -> quantized.Written:
        bits = 8 if weight.shape[1] == 128 else 4
        levels, zeros, scales, group_of = quantized.grid(weight, bits, 32, symmetric=True)
        parts = {
            "weight_packed": quantized.pack(levels.T, bits).T,
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        return parts, quantized.values(levels, zeros, scales, group_of)

    expected = quantize_folder(folder, {**_PACKED, "config_groups": groups}, write)
    same(read(folder), expected)


# ---- against other implementations


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    shape = (3, 10, 2, 16)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, shape[:3], dtype=torch.uint8, generator=generator)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = torch.zeros(3, 10)
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias}, tmp_path / WEIGHTS)
    files = open_quantized(
        WeightFiles(WeightPaths((tmp_path / WEIGHTS,))), ConfigReader({"quant_method": "mxfp4"}, "config.json")
    )
    assert {name: info.shape for name, info in files.tensors.items()} == {name: (3, 64, 10), f"{name}_bias": (3, 10)}
    expected = convert_moe_packed_tensors(blocks, scales)
    assert files.tensors[name].dtype == expected.dtype
    assert torch.equal(files.load(name), expected)
    first = blocks[0, 0, 0, 0].item()  # the definition: two numbers in a byte, the low half first
    sign = -1 if first & 8 else 1
    assert files.load(name)[0, 0, 0] == sign * quantized.FLOAT4[first & 7] * 2.0 ** (int(scales[0, 0, 0]) - 127)


@pytest.mark.parametrize("experts", [1, 3])
def test_fp8_blocks_equal_transformers(experts: int, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    weight = torch.randn(experts, 256, 128).to(torch.float8_e4m3fn)
    scales = torch.rand(experts, 2, 1)
    if experts == 1:
        weight, scales = weight[0], scales[0]
    save_file({"a.weight": weight, "a.weight_scale_inv": scales}, tmp_path / WEIGHTS)
    config = ConfigReader({"quant_method": "fp8", "weight_block_size": [128, 128]}, "config.json")
    files = open_quantized(WeightFiles(WeightPaths((tmp_path / WEIGHTS,))), config)
    theirs = Fp8Dequantize(None)
    pairs = zip(weight.view(-1, 256, 128), scales.view(-1, 2, 1), strict=True)
    expected = torch.stack([theirs._dequantize_one(one, scale) for one, scale in pairs])
    torch.testing.assert_close(files.load("a.weight"), expected.view(weight.shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_four_bits_equal_bitsandbytes(kind: str, nested: bool, folder: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def write(weight: Tensor) -> quantized.Written:
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        parts = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"": packed, **parts}, functional.dequantize_4bit(packed, state)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    expected = quantize_folder(folder, config, write, whole_name=True)
    same(read(folder), expected)


@pytest.mark.parametrize("arguments", [
    {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
    {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    {"num_bits": 8, "strategy": "channel", "symmetric": True},
    {"num_bits": 2, "strategy": "channel", "symmetric": False},
])  # fmt: skip
def test_packed_integers_equal_compressed_tensors(arguments: dict[str, Any], folder: Path) -> None:
    compared_with_compressed_tensors(folder, "pack-quantized", {"type": "int", **arguments})


@pytest.mark.parametrize(("name", "arguments"), [
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}),
    ("naive-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    ("float-quantized", {
        "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64], "symmetric": True,
    }),
    ("nvfp4-pack-quantized", {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
    }),
    ("mxfp4-pack-quantized", {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
    }),
])  # fmt: skip
def test_integers_and_floats_equal_compressed_tensors(name: str, arguments: dict[str, Any], folder: Path) -> None:
    compared_with_compressed_tensors(folder, name, arguments)


def compared_with_compressed_tensors(folder: Path, name: str, arguments: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(name)
    rows, columns = arguments.get("block_structure", (1, arguments.get("group_size")))
    strategy = arguments["strategy"]

    def write(weight: Tensor) -> quantized.Written:
        height, width = (len(weight), weight.shape[1]) if strategy == "tensor" else (rows, columns or weight.shape[1])
        tiles = weight.view(len(weight) // height, height, weight.shape[1] // width, width)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        extra = {}
        if name.startswith("nvfp4"):
            extra["weight_global_scale"] = (448 * 6 / weight.abs().max()).view(1)
        scale, zero = calculate_qparams(low, high, scheme.weights, global_scale=extra.get("weight_global_scale"))
        state = {"weight": weight, "weight_scale": scale, **extra}
        if not arguments["symmetric"]:
            state["weight_zero_point"] = zero
        compressed = compressor.compress(state, scheme)
        return compressed, compressor.decompress(dict(compressed), scheme)["weight"].float()

    config = {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
    }
    expected = quantize_folder(folder, config, write)
    same(read(folder), expected, rtol=2**-7 if name.startswith("nvfp4") else 1e-6)  # the package computes in bfloat16


# ---- invalid folders


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


@pytest.mark.parametrize(("config", "words"), [
    ({"quant_method": "hqq"}, "config.json: quantization_config: weights quantized by 'hqq' are not supported"),
    ({}, "quant_method is missing"),
    ({"quant_method": 4}, "quant_method is 4, not a string"),
    ({**_GPTQ, "bits": 5}, "bits is 5; supported: 2, 3, 4, 8"),
    ({**_GPTQ, "group_size": 0}, "group_size is 0; it must be positive"),
    ({**_GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' is not supported"),
    ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size is not a list of two positive"),
    ({**_PACKED, "format": "marlin-24"}, "format 'marlin-24' is not supported"),
    ({**_PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not supported"),
    ({**_PACKED, "transform_config": {"config_groups": {"u": {}}}}, "transformed weights are not supported"),
    ({**_PACKED, "config_groups": {"group_0": 3}}, "config_groups: group_0 is not an object"),
])  # fmt: skip
def test_an_unsupported_config_is_rejected(config: dict[str, Any], words: str, folder: Path) -> None:
    quantize_folder(folder, config, quantized.gptq)
    refused(folder, words)


@pytest.mark.parametrize(("name", "part"), [
    ("gptq", "qzeros"),
    ("gptq", "scales"),
    ("awq", "scales"),
    ("awq", "qzeros"),
    ("fp8 blocks", "weight_scale_inv"),
    ("fbgemm_fp8", "weight_scale"),
])  # fmt: skip
def test_a_part_that_is_missing_or_does_not_fit_is_named(name: str, part: str, folder: Path) -> None:
    config, write, _ = CASES[name]
    quantize_folder(folder, config, write)
    tensor = f"model.layers.1.mlp.up_proj.{part}"
    edit(folder, lambda tensors: tensors.update({tensor: tensors[tensor][:, :-1].contiguous()}))
    if name != "awq" or part != "scales":
        refused(folder, "model.layers.1.mlp.up_proj.", "has shape" if part != "scales" else "", "quantization_config")
    edit(folder, lambda tensors: tensors.update({tensor: torch.zeros(3, dtype=torch.int64)}))
    refused(folder, "model.layers.1.mlp.up_proj.", "is of type int64", "quantization_config")
    edit(folder, lambda tensors: tensors.__delitem__(tensor))
    refused(folder, "model.layers.1.mlp.up_proj.", "is missing: the checkpoint is incomplete")


def test_a_group_that_does_not_exist_is_rejected(folder: Path) -> None:
    quantize_folder(folder, _GPTQ, quantized.gptq)
    edit(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.g_idx"].fill_(2))
    refused(folder, "model.layers.1.mlp.up_proj.g_idx has a group that is not one of 2")


def test_a_weight_of_another_shape_than_the_model_is_rejected(folder: Path) -> None:
    quantize_folder(folder, _GPTQ, lambda weight: quantized.gptq(weight[:, :32]))
    refused(folder, "self_attn.q_proj.weight", "has shape (128, 32)", "the config requires")


def test_weights_with_scales_that_are_not_compressed_are_rejected(folder: Path) -> None:
    config = {**CASES["compressed-tensors, float-quantized"][0], "quantization_status": "frozen"}
    expected = quantize_folder(folder, config, quantized.fp8_rows)
    same(read(folder), expected)  # compressed, whatever the status says
    name = "model.layers.0.self_attn.q_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].half()}))
    refused(folder, f"tensor {name} has a scale but is not quantized: save the model compressed")


def test_a_weight_in_both_forms_is_rejected(folder: Path) -> None:
    quantize_folder(folder, _GPTQ, quantized.gptq)
    name = "model.layers.0.self_attn.q_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(128, 64)}))
    refused(folder, f"{name} is stored quantized and unquantized")


def test_quantized_tensors_without_a_config_are_rejected(folder: Path) -> None:
    quantize_folder(folder, _GPTQ, quantized.gptq)
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, "has tensors of a quantized model (model.layers.0.mlp.down_proj.qweight)", "quantization_config")


def test_settings_in_a_file_of_old_versions_are_read(folder: Path) -> None:
    expected = quantize_folder(folder, {}, quantized.gptq)
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    same(read(folder), expected)


@pytest.mark.parametrize(("state", "words"), [
    (b"{", "is not a JSON object"),
    (b"[" * 60_000, "is not a JSON object"),
    (b" " * 70_000, "has 70000 bytes; the limit is 65536"),
    (b'{"shape": [1000000000, 1000000000], "blocksize": 64}', "has a shape that is not that of 8192 numbers"),
    (b'{"shape": [64, 128], "blocksize": 0}', "no valid blocksize"),
    (b'{"shape": [64, 128], "blocksize": 64, "nested_blocksize": 1.5}', "an invalid nested_blocksize"),
    (b'{"shape": [64, 128], "blocksize": 64, "nested_blocksize": 2, "nested_offset": NaN}', "nested_offset"),
    (b'{"shape": [64, 128], "blocksize": 64}', ".absmax is of type uint8, not float32"),
    (b'{"shape": [64, 128], "blocksize": 64, "nested_blocksize": 2147483648}', "an invalid nested_blocksize"),
])  # fmt: skip
def test_states_of_bitsandbytes_are_checked(state: bytes, words: str, folder: Path) -> None:
    def write(weight: Tensor) -> quantized.Written:
        parts = {
            "": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
            ".absmax": torch.zeros(weight.numel() // 64, dtype=torch.uint8),
            ".quant_map": torch.zeros(16),
            ".quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
        }
        return parts, weight

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantize_folder(folder, config, write, whole_name=True, select=lambda name: name.endswith("down_proj.weight"))
    refused(folder, words)


def test_a_shape_of_packed_integers_is_not_trusted(folder: Path) -> None:
    def write(weight: Tensor) -> quantized.Written:
        parts = {
            "weight_packed": torch.zeros(len(weight), 8, dtype=torch.int32),
            "weight_scale": torch.ones(len(weight), 1),
            "weight_shape": torch.tensor([len(weight), 1 << 40]),
        }
        return parts, weight

    quantize_folder(folder, _PACKED, write)
    refused(folder, "weight_packed has 8 columns for 1099511627776 inputs")
