"""Exports end to end: the bundle's content, readability by other libraries, and atomicity."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.source import bundle_name
from llm_edge.exporter import cli
from llm_edge.exporter import export as export_module
from llm_edge.exporter.bundle import onnx_writer as graphs_module
from llm_edge.exporter.export import export
from llm_edge.exporter.graph.trace import trace
from llm_edge.exporter.options import ExportOptions
from llm_edge.exporter.progress import STAGES
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.exporter.texts import load_texts
from llm_edge.exporter.validation.compare import MAX_BOUND, MEAN_BOUND
from llm_edge.model.decoder import Decoder
from llm_edge.runtime import Bundle, Model, SamplingParams
from llm_edge.runtime.errors import CheckpointError, ParityError
from llm_edge.runtime.text.tokenizer import Tokenizer

CONFIGS = {
    "chat_template.jinja",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "manifest.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
STEMS = {"fp32": "model", "int8": "model_quantized", "int4": "model_q4"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = (
    "",
    " ",
    "What is the capital of France? Paris, of course!",
    "  def main():\n\tprint('x')\n",
    "Äpfel, señor, 你好, 🙂 and — dashes",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
)


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def graphs(*precisions: str) -> set[str]:
    return {f"onnx/{STEMS[name]}.{end}" for name in precisions for end in ("onnx", "onnx_data")}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def answer(bundle: Path, precision: str) -> tuple[int, ...]:
    return Model.load(bundle, precision).chat(MESSAGES, GREEDY).result().tokens


@pytest.fixture(scope="module")
def kept_trace() -> Callable[..., ir.Model]:
    return functools.cache(trace)


@pytest.fixture
def traced_once(kept_trace: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Share the trace between exports of the same shape in this file."""
    monkeypatch.setattr(graphs_module, "trace", lambda *given, **options: kept_trace(*given, **options).clone())


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on a part of the text: the whole text dominates the time of a small export."""
    tiny.shorten_texts(monkeypatch, 300)


# ---- content of a bundle


def test_a_bundle_holds_exactly_the_documented_files(tiny_bundle: Path) -> None:
    assert files(tiny_bundle).keys() == CONFIGS | graphs("fp32", "int8", "int4")
    assert not list(tiny_bundle.parent.glob(".*"))  # no temporary sibling


def test_the_manifest_describes_every_file(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = read(tiny_bundle / "manifest.json")
    found = files(tiny_bundle)
    assert manifest["files"].keys() == found.keys() - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"size": (tiny_bundle / name).stat().st_size, "sha256": found[name]}
    assert manifest["name"] == tiny_bundle.name
    assert manifest["graph"] == "fused"
    weights = tiny_checkpoint / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert manifest["source"]["files"] == [
        {"name": weights.name, "size": weights.stat().st_size, "sha256": digest},
    ]
    assert (manifest["source"]["format"], manifest["source"]["weight_types"]) == ("safetensors", "F32")
    parameters = sum(math.prod(tensor.shape) for tensor in load_file(weights).values())
    assert manifest["model"]["parameters"] == parameters
    for tool in ("torch", "onnx", "onnxruntime", "llm-edge"):
        assert manifest["tools"][tool] == importlib.metadata.version(tool)


def test_precisions_have_quality_figures(tiny_bundle: Path) -> None:
    precisions = read(tiny_bundle / "manifest.json")["precisions"]
    assert list(precisions) == ["fp32", "int8", "int4"]
    for name, entry in precisions.items():
        assert entry["model"] == f"onnx/{STEMS[name]}.onnx"
        assert entry["recipe"] == str(RECIPES[name])
        for part in ("prefill", "steps", "chunk"):
            assert 0 < entry["parity"][part]["mean"] < entry["parity"][part]["max"] < 1
        quality = entry["quality"]
        assert quality["tokens"] > 2000
        assert (
            -1e-8 < quality["kl_mean"] < quality["kl_p999"] < 0.1
        )  # float32 rounding may yield slightly negative sums
        assert 0.9 < quality["top1"] <= 1
        assert quality["perplexity"] == pytest.approx(quality["perplexity_reference"], rel=0.01)
    for part in precisions["fp32"]["parity"].values():
        assert part["max"] <= MAX_BOUND
        assert part["mean"] <= MEAN_BOUND
    errors = [precisions[name]["quality"]["kl_mean"] for name in ("fp32", "int8", "int4")]
    assert errors == sorted(errors)
    assert (
        errors[2] > 5 * errors[1] > 5 * errors[0]
    )  # fewer bits increase the error, so the figures belong to three graphs


def test_the_reference_perplexity_matches_transformers(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint).eval()
    loss, count = 0.0, 0
    with torch.inference_mode():
        for window in load_texts(read_folder(tiny_checkpoint), sampled=True).validation:
            ids = torch.tensor([window.tokens])
            targets = ids.shape[1] - 1
            loss += model(ids, labels=ids).loss.item() * targets
            count += targets
    quality = read(tiny_bundle / "manifest.json")["precisions"]["fp32"]["quality"]
    assert quality["tokens"] == count
    assert quality["perplexity_reference"] == pytest.approx(math.exp(loss / count), rel=1e-5)


# ---- readability by other libraries


def test_transformers_reads_the_configs(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    from transformers import AutoConfig, GenerationConfig, LlamaConfig

    config, source = (AutoConfig.from_pretrained(folder) for folder in (tiny_bundle, tiny_checkpoint))
    assert isinstance(config, LlamaConfig)
    for key in (
        "attention_bias",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
    ):
        assert getattr(config, key) == getattr(source, key), key
    assert config.rope_parameters["rope_theta"] == source.rope_parameters["rope_theta"]
    generation = GenerationConfig.from_pretrained(tiny_bundle)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 2, 2)


def test_transformers_and_the_runtime_tokenize_equally(tiny_bundle: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_bundle)
    bundle = Bundle.open(tiny_bundle)
    ours = Tokenizer.from_files(
        bundle.file("tokenizer.json"), bundle.json("tokenizer_config.json"), bundle.chat_template()
    )
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, parse_special=True) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    talk = [*MESSAGES, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Peru?"}]
    ids = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.encode_chat(talk) == ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 2, 2)
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 2)


def test_the_chat_template_is_in_both_files(tiny_bundle: Path) -> None:
    assert (tiny_bundle / "chat_template.jinja").read_text(encoding="utf-8") == tiny.CHAT_TEMPLATE
    config = read(tiny_bundle / "tokenizer_config.json")
    assert config["chat_template"] == tiny.CHAT_TEMPLATE
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_transformers_js_config_lists_the_data_files(tiny_bundle: Path) -> None:
    data_files = read(tiny_bundle / "config.json")["transformers.js_config"]["use_external_data_format"]
    assert data_files.keys() == {f"{stem}.onnx" for stem in STEMS.values()}
    assert set(data_files.values()) == {1}


def test_the_genai_config_describes_the_graph(tiny_bundle: Path) -> None:
    config = read(tiny_bundle / "genai_config.json")
    assert config.keys() == {"model", "search"}
    model, search = config["model"], config["search"]
    decoder = model.pop("decoder")
    assert model == {
        "type": "decoder",
        "vocab_size": 331,
        "context_length": 1024,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    graph = ir.load(tiny_bundle / decoder["filename"]).graph
    inputs, outputs = {value.name for value in graph.inputs}, {value.name for value in graph.outputs}
    for names, there in ((decoder["inputs"], inputs), (decoder["outputs"], outputs)):
        for name in names.values():
            assert (name % 1 if "%d" in name else name) in there
    assert decoder["filename"] == "onnx/model_quantized.onnx"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 32)
    assert 0 < search["max_length"] <= model["context_length"]
    assert search["past_present_share_buffer"] is True


# ---- options


def test_exporting_one_precision_writes_only_its_files_and_configs(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    before = files(tiny_checkpoint)
    out = tmp_path / "in" / "deeper" / "bundle"
    code, text, _ = llm_export(tiny_checkpoint, "-o", out, "--precision", "int4", "--no-validate")
    assert code == 0
    assert "Not validated" in text
    assert str(out) in text
    assert files(out).keys() == CONFIGS | graphs("int4")
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    entry = read(out / "manifest.json")["precisions"]
    assert entry.keys() == {"int4"}
    assert (entry["int4"]["parity"], entry["int4"]["quality"]) == ({}, {})
    config = read(out / "config.json")["transformers.js_config"]
    assert (config["dtype"], config["use_external_data_format"].keys()) == ("q4", {"model_q4.onnx"})
    assert entry["int4"]["runtimes"] == ["onnxruntime-genai", "optimum", "transformers.js"]
    assert read(out / "genai_config.json")["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert Model.load(out).precision.name == "int4"
    assert answer(out, "int4")
    assert files(tiny_checkpoint) == before


def test_a_precision_unknown_to_transformers_js(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, _ = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--precision", "int4-mixed", "--no-validate")
    assert code == 0
    assert "dtype" not in read(tmp_path / "bundle" / "config.json")["transformers.js_config"]
    entry = read(tmp_path / "bundle" / "manifest.json")["precisions"]["int4-mixed"]
    assert entry["runtimes"] == ["onnxruntime-genai", "optimum"]


def test_the_default_folder_is_named_after_the_source(
    tiny_checkpoint: Path,
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    traced_once: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert llm_export(tiny_checkpoint, "--precision", "int8", "--no-validate")[0] == 0
    assert Bundle.open("artifacts/tiny").name == "tiny"
    monkeypatch.chdir(tiny_checkpoint)
    assert bundle_name(".") == "tiny"
    assert bundle_name("../tiny/") == "tiny"
    assert bundle_name("models/Some-1.5B.Q8_0.gguf") == "Some-1.5B.Q8_0"
    assert bundle_name("smollm2") == "smollm2-135m"


def test_a_portable_bundle_has_the_same_manifest_as_the_fused_one(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    options = ("--graph", "portable", "--no-validate", "--precision", "int8,fp32")
    assert llm_export(tiny_checkpoint, "-o", tmp_path / "portable", *options)[0] == 0
    manifest = read(tmp_path / "portable" / "manifest.json")
    assert manifest["graph"] == "portable"
    assert list(manifest["precisions"]) == ["fp32", "int8"]
    assert not any(entry["share_buffer"] for entry in manifest["precisions"].values())
    search = read(tmp_path / "portable" / "genai_config.json")["search"]
    assert search["past_present_share_buffer"] is False
    for precision in ("fp32", "int8"):
        assert answer(tmp_path / "portable", precision) == answer(tiny_bundle, precision)


def test_json_progress_is_one_object_per_line(
    tiny_checkpoint: Path,
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
    short_text: None,
) -> None:
    code, text, errors = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--progress", "json")
    assert (code, errors) == (0, "")
    *lines, last = [json.loads(line) for line in text.splitlines()]
    assert last.keys() == {"stage", "path", "seconds", "notes", "report"}
    report = last["report"]
    assert (report["layers"], report["validated_layers"]) == (2, 2)
    assert [each["name"] for each in report["precisions"]] == ["fp32", "int8", "int4"]
    assert all(
        each["size"] > 0 and each["max_difference"] >= 0 and 0 <= each["top1"] <= 1 for each in report["precisions"]
    )
    assert (last["stage"], last["path"]) == ("done", str(tmp_path / "bundle"))
    order = [line["stage"] for line in lines]
    assert order == sorted(order, key=STAGES.index)
    assert set(order) == set(STAGES) - {"recovering", "refining", "interrupted"}
    for stage in set(order):
        shares = [line["share"] for line in lines if line["stage"] == stage]
        known = [share for share in shares if share is not None]
        assert known == sorted(known)
        assert all(0 <= share <= 1 for share in known)
        if stage in ("quantizing", "validating", "writing"):
            assert known[-1] == pytest.approx(1)
    assert all(line.keys() == {"stage", "share", "detail"} for line in lines)


def test_progress_advances_within_a_stage_without_a_terminal(
    llm_export: Callable[..., tuple[int, str, str]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_SECONDS_PER_LINE", 0.0)
    options = ("--precision", "int8", "--no-validate")
    code, _, errors = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", *options)
    assert code == 0
    lines = [line for line in errors.splitlines() if line.startswith("calibrating")]
    assert lines[0] == "calibrating (layer 1)"
    assert "calibrating 38% (layer 2)" in lines


def test_the_report_shows_the_divergence_by_kind_of_text(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    code, text, _ = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--precision", "fp16")
    assert code == 0
    heading, row = text.split("Mean KL by kind of text:\n")[1].splitlines()[:2]
    found = read(tmp_path / "bundle" / "manifest.json")["precisions"]["fp16"]["quality"]["kl_by_kind"]
    assert heading.split() == list(found) == ["prose", "code", "chat", "languages"]
    assert row.split() == ["fp16", *(f"{value:.1e}" for value in found.values())]


def test_the_report_matches_the_manifest(
    tiny_checkpoint: Path,
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
    short_text: None,
    traced_once: None,
) -> None:
    code, text, errors = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle")
    assert code == 0
    assert [line.split()[0] for line in errors.splitlines()] == [
        stage for stage in STAGES if stage not in ("recovering", "refining", "interrupted")
    ]
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name, entry in read(tmp_path / "bundle" / "manifest.json")["precisions"].items():
        quality = entry["quality"]
        assert f"{quality['kl_mean']:.2e}" in rows[name]
        assert f"{quality['perplexity']:.2f}" in rows[name]
        assert f"{quality['top1']:.1%}" in rows[name]
        assert f"{max(part['max'] for part in entry['parity'].values()):.1e}" in rows[name]
    assert f"llm-chat {tmp_path / 'bundle'}" in text


def test_force_replaces_a_bundle(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
    traced_once: None,
) -> None:
    target = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    options = ("--force", "--no-validate", "--precision", "int4")
    assert llm_export(tiny_checkpoint, "-o", target, *options)[0] == 0
    assert files(target).keys() == CONFIGS | graphs("int4")
    Bundle.open(target).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (tmp_path / "empty").mkdir()
    assert llm_export(tiny_checkpoint, "-o", tmp_path / "empty", *options)[0] == 0
    Bundle.open(tmp_path / "empty").verify()


# ---- graphs that disagree with the reference


def a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale one norm of the reference by 1.02."""
    load = Decoder.load_parameters
    name = "layers.1.mlp_norm.weight"

    def wrong(decoder: Decoder, weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        load(decoder, weights, names)
        if name in names:
            decoder.get_parameter(name).data.mul_(1.02)

    monkeypatch.setattr(Decoder, "load_parameters", wrong)


def no_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the rotary embedding from the graph's attention."""
    right = graphs_module.trace

    def wrong(*arguments: Any, **options: Any) -> ir.Model:
        model = right(*arguments, **options)
        nodes = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
        assert len(nodes) == 2
        for node in nodes:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        return model

    monkeypatch.setattr(graphs_module, "trace", wrong)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (a_wrong_weight, "transformers "),  # of the decoder itself
        (no_rotary_embedding, "fp32: logits differ from PyTorch by up to "),
    ],
)
def test_a_graph_with_wrong_logits_makes_no_bundle(
    defect: Callable[[pytest.MonkeyPatch], None],
    message: str,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    traced_once: None,
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "old")
    before = files(tmp_path)
    defect(monkeypatch)
    for arguments in (("new",), ("old", "--force"), ("new", "--precision", "int8")):  # fp32 is verified for int8 too
        target, *options = arguments
        code, text, errors = llm_export(tiny_checkpoint, "-o", tmp_path / target, "--progress", "none", *options)
        assert (code, text) == (1, "")
        assert errors.count("\n") == 1
        assert errors.startswith(f"error: {message}")
        assert files(tmp_path) == before
        assert {path.name for path in tmp_path.iterdir()} == {"old"}


@pytest.mark.parametrize(
    ("precision", "validate", "words"),
    [
        ("fp32", True, "fp32: logits are NaN or infinity"),
        ("int8", True, r"layers\.0\.mlp\.down\.weight: .*NaN"),
        ("int4", False, r"layers\.0\.mlp\.down\.weight: .*NaN"),
    ],
)
def test_nan_weights_make_no_bundle(
    precision: str,
    validate: bool,
    words: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    short_text: None,
    traced_once: None,
) -> None:
    """Both sides yield NaN then, which is never greater than a bound."""
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, source / "model.safetensors")
    with pytest.raises((ParityError, CheckpointError), match=words):
        export(str(source), ExportOptions(tmp_path / "bundle", precision=precision, validate=validate))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


# ---- interrupted exports

SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
from llm_edge.exporter import export
from llm_edge.exporter.bundle import onnx_writer
from llm_edge.exporter.validation import parity
stage = sys.argv.pop()
module, step = {
    "tracing": (onnx_writer, "trace"),
    "quantizing": (onnx_writer, "apply_recipe"),
    "validating": (parity, "score"),
    "writing": (export, "write_side_files"),
}[stage]
assert hasattr(module, step)
def wait(*_, **__):
    print("waiting", flush=True)
    time.sleep(300)
setattr(module, step, wait)
from llm_edge.exporter.cli import main
main()
"""


def interrupted_in(stage: str, how: signal.Signals, *arguments: object) -> tuple[int, str]:
    """Start the command and send a signal during a stage; returns exit code and stderr."""
    words = [sys.executable, "-c", SCRIPT, *map(str, arguments), "--progress", "json", stage]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line == "waiting\n" for line in process.stdout), process.stderr.read()
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("stage", ["tracing", "validating"])
def test_ctrl_c_leaves_no_files(stage: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, errors = interrupted_in(stage, signal.SIGINT, tiny_checkpoint, "-o", tmp_path / "in" / "bundle")
    assert code == 130
    assert errors == "interrupted\n"
    assert [path for path in tmp_path.rglob("*") if path != tmp_path / "in"] == []


def test_ctrl_c_before_the_replacement_keeps_the_old_bundle(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = files(tmp_path)
    options = ("--force", "--no-validate", "--precision", "int8")
    code, _ = interrupted_in("writing", signal.SIGINT, tiny_checkpoint, "-o", tmp_path / "bundle", *options)
    assert code == 130
    assert files(tmp_path) == before


def test_a_killed_export_leaves_no_bundle_and_does_not_block_the_next(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    options = ("-o", tmp_path / "bundle", "--no-validate", "--precision", "int8")
    code, _ = interrupted_in("writing", signal.SIGKILL, tiny_checkpoint, *options)
    assert code == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".bundle.partial-")
    assert not (left / "manifest.json").exists()  # it is written last, so an incomplete folder is not a bundle
    code, out, err = llm_export(tiny_checkpoint, *options)
    assert code == 0
    assert f"removed {left}, left by an interrupted export" in out + err
    Bundle.open(tmp_path / "bundle").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_killed_replacement_leaves_the_old_bundle(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = files(tmp_path / "bundle")
    options = ("-o", tmp_path / "bundle", "--force", "--no-validate", "--precision", "int8")
    assert interrupted_in("writing", signal.SIGKILL, tiny_checkpoint, *options)[0] == -signal.SIGKILL
    assert files(tmp_path / "bundle") == before


def test_names_of_255_bytes_are_accepted(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]], traced_once: None
) -> None:
    for name in ("x" * 255, "\N{GREEK SMALL LETTER ALPHA}" * 127):
        for force in ((), ("--force",)):
            options = ("-o", tmp_path / name, *force, "--no-validate", "--precision", "int8")
            assert llm_export(tiny_checkpoint, *options)[0] == 0
        Bundle.open(tmp_path / name).verify()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record fsync and rename calls in order."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        done.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        done.append(f"rename {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_everything_is_flushed_before_the_bundle_is_renamed(
    tiny_checkpoint: Path,
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
    order: list[str],
    traced_once: None,
) -> None:
    options = ("--no-validate", "--precision", "int8")
    assert llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", *options)[0] == 0
    at = order.index("rename bundle")
    before, after = order[:at], order[at + 1 :]
    names = {Path(name).name for name in files(tmp_path / "bundle")}
    assert {f"fsync {name}" for name in names | {"onnx"}} <= set(before)
    assert before[-1].startswith("fsync .bundle.partial-")
    assert after == [f"fsync {tmp_path.name}"]


def test_a_bundle_without_fp32_records_the_parity_check(
    tiny_checkpoint: Path, tmp_path: Path, short_text: None
) -> None:
    export(str(tiny_checkpoint), ExportOptions(tmp_path / "bundle", precision="int4"))
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert list(manifest["precisions"]) == ["int4"]
    assert manifest["proof"]["fp32"]["prefill"]["max"] <= MAX_BOUND
    assert not list((tmp_path / "bundle" / "onnx").glob("model.onnx*"))


def test_notes_about_the_checkpoint_are_printed_and_stored(
    tiny_checkpoint: Path,
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    traced_once: None,
) -> None:
    whole = export_module.open_checkpoint
    note = "config.json: some_key is ignored"
    monkeypatch.setattr(
        export_module, "open_checkpoint", lambda *given: dataclasses.replace(whole(*given), notes=(note,))
    )
    code, text, _ = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--no-validate", "--precision", "int8")
    assert code == 0
    assert f"Note: {note}" in text.splitlines()
    assert read(tmp_path / "bundle" / "manifest.json")["notes"] == [note]
