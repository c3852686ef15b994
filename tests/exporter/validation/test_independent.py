"""The comparison with transformers: what it finds, what it reports, and when it does not run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_file, read_folder
from llm_edge.checkpoint.lora.adapter import open_adapter
from llm_edge.exporter.texts import split_windows
from llm_edge.exporter.validation import independent
from llm_edge.exporter.validation.independent import IndependentCheck, compare_with_transformers
from llm_edge.exporter.validation.reference import record_reference
from llm_edge.model import weights as weights_module
from llm_edge.model.decoder import count_parameters
from llm_edge.model.weights import SourceTensor, WeightTable
from llm_edge.runtime.errors import ParityError

FIRST = {kind: name for name, (kind, _) in reversed(families.CASES.items())}
TEXT = [(7 * i + i * i) % 300 + 3 for i in range(400)]
LlmExport = Callable[..., tuple[int, str, str]]


def check(checkpoint: Checkpoint, folder: Path, layers: int | None = None) -> IndependentCheck:
    """Compare a checkpoint, or its first layers if only these fit, with transformers."""
    config = checkpoint.config
    windows = split_windows(TEXT, min(config.max_position_embeddings, 512))
    recorded = record_reference(config, checkpoint.weights, windows, folder / "logits")
    if layers is None:
        return compare_with_transformers(checkpoint, recorded)
    limit = 4 * count_parameters(dataclasses.replace(config, layers=config.layers[:layers]))
    return compare_with_transformers(checkpoint, recorded, limit + 1)


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("layers", [None, 1], ids=["whole", "first layer"])
def test_every_family_agrees(tmp_path: Path, kind: str, layers: int | None) -> None:
    folder = families.save(families.model(FIRST[kind]), tmp_path / "model")
    checkpoint = read_folder(folder)
    found = check(checkpoint, tmp_path, layers)
    assert found.reason is None
    assert found.layers == (layers or checkpoint.config.num_hidden_layers)
    assert found.difference is not None
    assert 0 < found.difference.max < 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layers", [None, 1])
def test_an_adapter_is_merged_by_peft(tmp_path: Path, layers: int | None) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    folder = tiny.save_checkpoint(tmp_path / "base", tie_word_embeddings=False)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    found = check(read_folder(folder, open_adapter(tmp_path / "adapter")), tmp_path, layers)
    if layers is None:
        assert found.reason is None
        assert found.difference is not None
    else:
        assert found.reason == "only the first layers fit into memory, and an adapter is merged"


def test_a_single_weight_file_is_compared_too(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    found = check(read_file(folder / "other.safetensors", None, None), tmp_path)
    assert found.reason is None
    assert check(read_file(folder / "other.safetensors", None, None), tmp_path, 1).layers == 1


# ---- exports


def manifest(bundle: Path) -> Any:
    return json.loads((bundle / "manifest.json").read_text())["independent_check"]


def test_an_export_reports_the_comparison(tiny_checkpoint: Path, tmp_path: Path, llm_export: LlmExport) -> None:
    import transformers

    code, text, errors = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--precision", "fp32")
    assert code == 0
    version = transformers.__version__
    assert f"The logits agree with those of transformers {version} on " in text
    assert "tied weights" not in errors
    assert "Loading weights" not in errors
    found = manifest(tmp_path / "bundle")
    assert found.keys() == {"compared", "library", "layers", "tokens", "max", "mean"}
    assert (found["compared"], found["library"], found["layers"]) == (True, f"transformers {version}", 2)
    assert 0 <= found["mean"] < found["max"] < 1e-3


def test_only_the_first_layers_are_compared_if_the_model_does_not_fit(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: LlmExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(independent, "_comparable_layers", lambda *_: 1)
    code, text, _ = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--precision", "fp32")
    assert code == 0
    assert "The logits of the first 1 of 2 layers agree with those of transformers" in text
    assert manifest(tmp_path / "bundle")["layers"] == 1
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["validation"] == {"layers": 2, "of": 2}


def swap_up_and_gate(patch: pytest.MonkeyPatch) -> None:
    """Read two projections of the same shape as each other, which all other comparisons accept."""
    read = WeightTable.sources

    def swapped(table: WeightTable, name: str) -> tuple[SourceTensor, ...]:
        found = read(table, name)
        return found[::-1] if name.endswith("mlp.gate_up.weight") else found

    patch.setattr(WeightTable, "sources", swapped)


def drop_the_head(patch: pytest.MonkeyPatch) -> None:
    """Trust the flag `tie_word_embeddings`, although the file has another head."""
    from llm_edge.checkpoint.huggingface import checkpoint

    patch.setattr(checkpoint, "resolve_tied_head", lambda config, table, *_: (config, table, None))


def misread_a_norm(patch: pytest.MonkeyPatch) -> None:
    read = weights_module.Weights.__getitem__
    patch.setattr(
        weights_module.Weights,
        "__getitem__",
        lambda weights, name: read(weights, name) * (1.05 if name == "layers.1.mlp_norm.weight" else 1),
    )


@pytest.mark.parametrize("mistake", [swap_up_and_gate, drop_the_head, misread_a_norm])
def test_wrong_weights_stop_the_export(
    tmp_path: Path, llm_export: LlmExport, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., None]
) -> None:
    source = tiny.save_checkpoint(tmp_path / "source", tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    mistake(monkeypatch)
    code, _, errors = llm_export(source, "-o", tmp_path / "bundle", "--precision", "fp32")
    assert code == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert "computes other logits from the same checkpoint" in line
    assert "Nothing was written" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_export_without_validation_says_so(tiny_checkpoint: Path, tmp_path: Path, llm_export: LlmExport) -> None:
    options = ("--precision", "int8", "--no-validate")
    assert llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", *options)[0] == 0
    assert manifest(tmp_path / "bundle") == {"compared": False, "reason": "--no-validate"}


# ---- without a comparison


def without_transformers(patch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else find(name))


def test_transformers_is_optional(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: LlmExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_transformers(monkeypatch)
    code, text, _ = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--precision", "fp32")
    assert code == 0
    assert "Not compared with transformers: transformers is not installed." in text
    assert manifest(tmp_path / "bundle") == {"compared": False, "reason": "transformers is not installed"}


def replaced(checkpoint: Checkpoint, **config: Any) -> Checkpoint:
    assert checkpoint.original is not None
    changed = dataclasses.replace(checkpoint.original, config={**checkpoint.original.config, **config})
    return dataclasses.replace(checkpoint, original=changed)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "unheard_of"}, "does not know model_type 'unheard_of'"),
        ({"model_type": "vit"}, "has no causal model of 'vit'"),
        ({"hidden_size": "wide"}, "transformers cannot load it ("),
    ],
    ids=str,
)
def test_configs_that_transformers_does_not_load(
    tiny_checkpoint: Path, tmp_path: Path, config: Mapping[str, Any], reason: str
) -> None:
    found = check(replaced(read_folder(tiny_checkpoint), **config), tmp_path)
    assert found.difference is None
    assert found.reason is not None
    assert reason in found.reason
    assert len(found.reason) < 300
    assert str(tiny_checkpoint) not in found.reason


class PanicError(BaseException):
    """What Rust extensions raise."""


@pytest.mark.parametrize("error", [PanicError("internal"), MemoryError(), SystemExit(3), RecursionError("deep")])
def test_errors_of_transformers_are_a_reason(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(independent, "_load", fail)
    assert type(error).__name__ in str(check(read_folder(tiny_checkpoint), tmp_path).reason)


def test_an_interrupt_is_passed_on(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(independent, "_load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check(read_folder(tiny_checkpoint), tmp_path)


def test_other_sources_are_not_compared(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(read_folder(tiny_checkpoint), original=None)
    assert check(checkpoint, tmp_path).reason == "the source is not a Hugging Face checkpoint"


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "model")
    marker = tmp_path / "was_run"
    program = f"open({str(marker)!r}, 'w')\nclass LlamaConfig: pass\nclass LlamaForCausalLM: pass\n"
    (folder / "code.py").write_text(program)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(program)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    assert check(read_folder(folder), tmp_path).difference is not None
    assert not marker.exists()


def test_a_difference_of_one_tensor_is_found(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "model")
    checkpoint = read_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    values = {name: checkpoint.weights[name] for name in checkpoint.weights}
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    read_before = dataclasses.replace(checkpoint, weights=values)  # type: ignore[arg-type]
    with pytest.raises(ParityError, match="computes other logits"):
        check(read_before, tmp_path)
