"""docs/checkpoints.md: every command is run verbatim on small models, and its statements are checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pickle  # noqa: TID251 (writes what must not be run)
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import numpy as np
import original
import pytest
import quantized
import tiny
import torch
from calling import call
from fake_hub import FakeHub
from project import ROOT
from safetensors.torch import load_file, save_file
from test_families_doc import install, opt
from test_gguf_families import CASES as GGUF_CASES
from test_gguf_families import save_folder, write_gguf
from test_lora import adapt
from tokenizers import ByteLevelBPETokenizer

from llm_edge.checkpoint.gguf.checkpoint import read_gguf, weight_table
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.huggingface.weight_files import WeightFiles
from llm_edge.checkpoint.quantized.dequantized import METHODS
from llm_edge.exporter import cli
from llm_edge.exporter import export as export_module
from llm_edge.model.config import LayerConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.decoder import Decoder
from llm_edge.model.registry import BUILT_IN, find_family
from llm_edge.model.weights import bind_weights
from llm_edge.runtime import Bundle, Model, SamplingParams
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import open_session
from llm_edge.runtime.errors import CheckpointError

DOCUMENT = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
PROSE = " ".join(DOCUMENT.split())
SCRIPTS = sysconfig.get_path("scripts")
HUB_ID = "HuggingFaceTB/SmolLM2-360M-Instruct"
QUICK = {"--precision": "fp32", "--progress": "none"}  # appended to commands without these options
PROMPT, TOKENS = "What is the capital of France?", 60

Reference = Callable[[torch.Tensor], torch.Tensor]  # tokens [1, T] -> logits [1, T, V]
Run = Callable[[str], tuple[int, str, str]]


def sections() -> dict[str, str]:
    titles_and_texts = re.split(r"^## (.*)\n", DOCUMENT, flags=re.MULTILINE)[1:]
    return dict(zip(titles_and_texts[::2], titles_and_texts[1::2], strict=True))


def tables(title: str) -> list[list[list[str]]]:
    """Return the cells of each table of a section, without headers."""
    found = re.findall(r"(?:^\|.*\n)+", sections()[title], flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]] for table in found
    ]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def shown(title: str) -> list[str]:
    """Return the indented lines of a section."""
    return re.findall(r"^    (.*)$", sections()[title], flags=re.MULTILINE)


COMMANDS = [spans(row[1])[0] for row in tables("Sources")[0]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command verbatim in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda line: call(cli.main, capsys, *shlex.split(line))


def quick(line: str, *more: str) -> str:
    """Return a command without slow options that it does not test."""
    given = shlex.split(line)
    missing = [word for option, value in QUICK.items() if option not in given for word in (option, value)]
    return shlex.join([*given, *missing, *more])


def bundle_of(printed: str) -> Path:
    found = re.search(r"^Bundle: (.*?)  ", printed, flags=re.MULTILINE)
    assert found is not None, printed
    return Path(found[1])


@torch.inference_mode()
def agrees(folder: Path, reference: Reference) -> None:
    """Check that the bundle has the logits and the greedy answer of the reference."""
    bundle = Bundle.open(folder)
    info = bundle.precision("fp32")
    ids = torch.randint(bundle.shape.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    session = open_session(GraphFile.of(bundle, info), ExecutionOptions("cpu", spinning=False))
    expected = reference(ids)[0].numpy()
    assert expected.std() > 0.3  # otherwise the bound would be meaningless
    assert np.abs(session.step(ids[0].tolist(), num_logits=0) - expected).max() < 1e-3
    model = Model.load(folder, "fp32", provider="cpu")
    text = model.tokenizer.encode(PROMPT, add_special_tokens=False)
    answer = list(model.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8)).result().tokens)
    best = reference(torch.tensor([text + answer]))[0].argmax(-1).tolist()
    assert answer == best[len(text) - 1 : -1]


# ---- files for the commands


def meta(folder: Path, **saving: Any) -> Reference:
    return original.save_family(folder, dim=256, n_heads=16, n_kv_heads=4, **saving).model


def meta_params(folder: Path) -> Reference:
    saved = original.save_family(folder, suffix=".pth", n_kv_heads=2)
    saved.path.rename(folder / "consolidated.00.pth")
    (folder / "config.yaml").unlink()
    shape = saved.model.shape
    params = {
        key: getattr(shape, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
    }
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1, "multiple_of": 256}))
    made = ByteLevelBPETokenizer(
        *(str(folder / "tokenizer" / f"family-{name}") for name in ("vocab.json", "merges.txt"))
    )
    made.save(str(folder / "tokenizer.json"))
    shutil.rmtree(folder / "tokenizer")
    return saved.model


def meta_elsewhere(folder: Path) -> Reference:
    saved = original.save_family(folder / "made", suffix=".bin", n_kv_heads=1)
    (folder / "configs").mkdir()
    (folder / "made" / "config.yaml").rename(folder / "configs" / "config.yaml")
    (folder / "made" / "tokenizer").rename(folder / "tokenizer")
    saved.path.rename(folder / "model.bin")
    return saved.model


def meta_flags(folder: Path) -> Reference:
    model = meta(folder, suffix=".safetensors")
    (folder / "config.yaml").unlink()
    return model


def random_llama(seed: int = 0) -> Any:
    return families.model("llama", seed)


def logits_of(model: Any) -> Reference:
    return lambda tokens: model(tokens).logits


def hf_folder(folder: Path) -> Reference:
    model = random_llama()
    families.save(model, folder)
    return logits_of(model)


def hf_shards(folder: Path) -> Reference:
    model = random_llama()
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny.save_tokenizer(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return logits_of(model)


def hf_quantized(folder: Path) -> Reference:
    model = random_llama()
    families.save(model, folder)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    model.load_state_dict(quantized.quantize_folder(folder, config, quantized.gptq))
    return logits_of(model)


def hf_old(folder: Path) -> Reference:
    reference = hf_folder(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return reference


def hf_adapter(folder: Path) -> Reference:
    model = random_llama()
    families.save(model, folder / "folder")
    merged = adapt(model, folder / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    model = random_llama()
    model.load_state_dict(merged)
    return logits_of(model)


def hf_file(folder: Path) -> Reference:
    reference = hf_folder(folder / "tokenizer")
    (folder / "tokenizer" / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "tokenizer" / "config.json").rename(folder / "config.json")
    return reference


def gguf(folder: Path, case: str = "llama") -> Reference:
    model = save_folder(folder / "made", {**GGUF_CASES[case], "num_hidden_layers": 2})
    write_gguf(folder / "made", folder / "model.gguf")
    return logits_of(model)


def hf_plugin(folder: Path) -> Reference:
    model = opt(eos_token_id=2, pad_token_id=2)
    families.save(model, folder)
    return logits_of(model)


@dataclass
class Row:
    """Creates the files of a command in the current folder, and names its bundle."""

    make: Callable[[Path], Reference]
    within: str
    bundle: str = "out"
    more: tuple[str, ...] = field(default=())


ROWS: Mapping[str, Row] = {
    "llm-export run/model.pt": Row(meta, "run", "artifacts/model"),
    "llm-export Llama/consolidated.00.pth -o out": Row(meta_params, "Llama"),
    "llm-export model.bin --config configs/config.yaml --tokenizer tokenizer -o out": Row(meta_elsewhere, "."),
    "llm-export model.safetensors --n-heads 16 --rope-theta 50000 --tokenizer tokenizer -o out": Row(meta_flags, "."),
    "llm-export path/to/folder -o out": Row(hf_folder, "path/to/folder"),
    "llm-export path/to/shards -o out": Row(hf_shards, "path/to/shards"),
    "llm-export path/to/quantized -o out": Row(hf_quantized, "path/to/quantized"),
    "llm-export path/to/old -o out": Row(hf_old, "path/to/old"),
    "llm-export path/to/folder --adapter path/to/adapter -o out": Row(hf_adapter, "path/to"),
    "llm-export weights.safetensors --config config.json --tokenizer tokenizer -o out": Row(hf_file, "."),
    "llm-export model.gguf -o out": Row(gguf, "."),
}
GGUF, HUB, SMOLLM2, PLUGIN = (
    "llm-export model.gguf -o out",
    f"llm-export {HUB_ID}",
    "llm-export smollm2",
    "llm-export path/to/opt -o out",
)


def test_every_command_is_tested() -> None:
    assert sorted(COMMANDS) == sorted([*ROWS, HUB, SMOLLM2, PLUGIN])
    assert len(tables("Sources")[0]) == len(set(COMMANDS))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # raised by peft itself
@pytest.mark.parametrize("command", ROWS)
def test_the_command_works(command: str, run: Run, tmp_path: Path) -> None:
    row = ROWS[command]
    reference = row.make(tmp_path / row.within)
    code, out, err = run(quick(command, "--no-validate"))
    assert (code, err) == (0, "")
    assert bundle_of(out) == Path(row.bundle)
    agrees(tmp_path / row.bundle, reference)


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_other_gguf_architectures(case: str, run: Run, tmp_path: Path) -> None:
    (row,) = (row for row in tables("Sources")[0] if row[0] == "GGUF")
    assert case in row[3].lower()
    reference = gguf(tmp_path, case)
    assert run(quick(GGUF, "--no-validate"))[0] == 0
    agrees(tmp_path / "out", reference)


def test_a_family_from_a_package(
    run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = hf_plugin(tmp_path / "path" / "to" / "opt")
    assert run(quick(PLUGIN, "--no-validate"))[0] == 2
    monkeypatch.syspath_prepend(str(install(tmp_path_factory.mktemp("plugin"))))
    assert run(quick(PLUGIN, "--no-validate"))[0] == 0
    del sys.modules["llm_edge_opt"]
    agrees(tmp_path / "out", reference)


@pytest.mark.slow
def test_smollm2_is_exported(run: Run, smollm2_file: Path, tmp_path: Path) -> None:
    assert smollm2_file.exists()
    code, out, _ = run(quick(SMOLLM2, "--no-validate"))
    assert code == 0
    assert bundle_of(out) == Path("artifacts/smollm2-135m")
    answer = Model.load(tmp_path / bundle_of(out), "fp32").chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=10)
    )
    assert "Paris" in answer.result().text


def test_torchscript_is_exported(run: Run, tmp_path: Path) -> None:
    (command,) = (line for line in shown("Sources") if line.startswith("llm-export"))
    reference = hf_folder(tmp_path / "path" / "to" / "folder")
    code, _, err = run(quick(command, "--no-validate"))
    assert (code, err) == (0, "")
    agrees(tmp_path / "out", reference)


# ---- the Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    hf_folder(tmp_path / "remote")
    fake = FakeHub()
    fake.add(HUB_ID, {path.name: path.read_bytes() for path in (tmp_path / "remote").iterdir()})
    fake.repos[HUB_ID][fake.revisions["main"]]["modeling_llama.py"] = b"raise SystemExit"
    fake.start()
    yield fake
    fake.stop()


@pytest.mark.slow
def test_the_hub_online_and_offline(hub: FakeHub, tmp_path: Path) -> None:
    """In subprocesses, so that the environment variables take effect."""
    (offline,) = shown("Offline")
    assert offline == f"HF_HUB_OFFLINE=1 {HUB} -o out"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache")}
    path = {"PATH": os.pathsep.join([SCRIPTS, os.environ["PATH"]])}
    work = tmp_path / "work"
    work.mkdir()

    def shell(line: str) -> None:
        line += " --precision fp32 --no-validate"
        words, env = ["sh", "-c", line], kept | given | path
        done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr

    shell(HUB)
    assert "model.safetensors" in hub.fetched()
    assert "modeling_llama.py" not in hub.fetched()
    asked = len(hub.log)
    shell(offline)
    assert len(hub.log) == asked
    agrees(work / "artifacts" / HUB_ID.split("/")[1], logits_of(random_llama()))
    agrees(work / "out", logits_of(random_llama()))


# ---- families


def test_the_table_lists_all_families() -> None:
    assert [spans(row[0]) for row in tables("Families")[0]] == [[name] for name in sorted(BUILT_IN)]


def config_of(model_type: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    config = next(config for kind, config in families.CASES.values() if kind == model_type)
    found: dict[str, Any] = CONFIG_MAPPING[model_type](**config).to_dict()
    return found


REFUSED = [(spans(row[0])[0], key) for row in tables("Families")[0] for key in spans(row[3])]


@pytest.mark.parametrize(("model_type", "key"), REFUSED)
def test_documented_limitations_are_rejected(model_type: str, key: str) -> None:
    config = config_of(model_type)
    assert (
        key in config or key.endswith("softcapping") or key.startswith("use_bi")
    )  # the key exists in transformers, or did
    find_family(model_type).read_config(ConfigReader(config))
    with pytest.raises(CheckpointError, match=key):
        find_family(model_type).read_config(ConfigReader({**config, key: 30.0 if "softcapping" in key else True}))


def test_settings_rejected_by_all_families() -> None:
    for model_type in BUILT_IN:
        family, config = find_family(model_type), config_of(model_type)
        for key in config.keys() & {"hidden_act", "hidden_activation", "activation_function"}:
            for name in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"):
                family.read_config(ConfigReader({**config, key: name}))
            with pytest.raises(CheckpointError, match=f"{key} 'mish' is not supported"):
                family.read_config(ConfigReader({**config, key: "mish"}))
        if "rope_parameters" in config:
            dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            nests = any(isinstance(value, dict) for value in config["rope_parameters"].values())
            rope = dict.fromkeys(config["rope_parameters"], dynamic) if nests else dynamic
            with pytest.raises(CheckpointError, match="'dynamic' is not supported; supported: default, linear, llama3"):
                family.read_config(ConfigReader({**config, "rope_parameters": rope}))


@pytest.mark.parametrize("model_type", [name for row in tables("Families")[1] for name in spans(row[0])])
def test_unsupported_formats_are_rejected(model_type: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_type '{model_type}' is not supported.*; llm-export --families "):
        find_family(model_type)


def gptq(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0]).int()


def bits_and_bytes(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)


def fp8(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def test_the_table_lists_all_quantization_methods() -> None:
    assert [spans(row[0])[0] for row in tables("Sources")[1]] == sorted(METHODS)


@pytest.mark.parametrize("change", [gptq, bits_and_bytes, fp8])
def test_quantized_tensors_without_their_config_are_rejected(
    change: Callable[[dict[str, torch.Tensor]], None], run: Run, tmp_path: Path
) -> None:
    hf_folder(tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "folder" / "model.safetensors")
    code, _, err = run(quick("llm-export folder -o out", "--no-validate"))
    assert (code, err.count("\n")) == (2, 1), err
    assert "model.layers.0.self_attn.q_proj" in err
    assert not (tmp_path / "out").exists()


# ---- settings that a state dict does not contain


def test_a_missing_head_count_is_an_error(run: Run, tmp_path: Path) -> None:
    meta_flags(tmp_path)
    code, _, err = run(quick("llm-export model.safetensors --tokenizer tokenizer -o out"))
    assert (code, [err.rstrip()]) == (2, shown("When the head count is not known"))
    code, _, err = run(quick("llm-export model.safetensors --tokenizer tokenizer -o out --n-heads 16"))
    assert code == 2
    assert "a state dict does not contain the rotary base" in err


def test_a_wrong_head_count_is_not_detected(run: Run, tmp_path: Path, few_tokens: None) -> None:
    reference = meta_flags(tmp_path)
    wrong = quick("llm-export model.safetensors --n-heads 8 --rope-theta 50000 --tokenizer tokenizer -o out")
    code, out, _ = run(wrong)
    assert code == 0
    assert "Not validated" not in out
    with pytest.raises(AssertionError):
        agrees(tmp_path / "out", reference)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert f"context {config['max_position_embeddings']} and epsilon 1e-5 unless" in PROSE
    assert config["rms_norm_eps"] == 1e-5


@pytest.mark.slow
@torch.inference_mode()
def test_perplexity_reveals_a_wrong_setting(smollm2_file: Path) -> None:
    section = sections()["When the head count is not known"].replace("\n", " ")
    match = re.search(
        r"is (\d+) on (\d+) tokens; with (\d+) heads instead of (\d+) it is above (\d+)\. .*?: (\d+) with (\d+)",
        section,
    )
    assert match is not None
    right, tokens, more, heads, above, other, base = map(int, match.groups())
    file, checkpoint = GGUFFile(smollm2_file), read_gguf(smollm2_file)
    assert checkpoint.config.num_attention_heads == heads
    ids = torch.tensor([export_module.load_texts(checkpoint).validation[0].tokens[:tokens]])
    load = functools.cache(file.load)

    def perplexity(heads: int, theta: float) -> float:
        """Return the perplexity with these settings; the width of the keys is kept."""
        old = checkpoint.config
        width = old.query_size // heads
        rope = dataclasses.replace(old.ropes[0], dim=width, theta=theta)
        config = dataclasses.replace(
            old,
            num_attention_heads=heads,
            num_key_value_heads=old.key_value_size // width,
            head_dim=width,
            layers=(LayerConfig(rope),) * old.num_hidden_layers,
        )
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        with torch.device("meta"):
            decoder = Decoder(config).eval()
        decoder.load_weights(bind_weights(config, weight_table(config, "llama"), shapes, load, "smollm2"))
        logits, _ = decoder(ids, torch.ones_like(ids), decoder.empty_past())
        return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))

    theta = checkpoint.config.ropes[0].theta
    assert f"{base} instead of {theta:.0f}" in section
    assert round(perplexity(heads, theta)) == right
    assert perplexity(more, theta) > above
    assert round(perplexity(heads, base)) == other


# ---- memory


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on less text."""
    tiny.shorten_texts(monkeypatch, 200)


def test_weights_are_loaded_one_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
    read, max_held = [], 0
    load = WeightFiles.load

    def counted(self: Any, name: str) -> torch.Tensor:
        nonlocal max_held
        tensor = load(self, name)
        held[len(read)] = tensor
        read.append(name)
        max_held = max(max_held, len(held))
        return tensor

    hf_folder(tmp_path / "folder")
    monkeypatch.setattr(WeightFiles, "load", counted)
    assert run("llm-export folder -o out --no-validate --progress none")[0] == 0
    assert len(set(read)) == len(load_file(tmp_path / "folder" / "model.safetensors"))
    assert max_held == 3  # query, key and value, which form one weight of the bundle


# ---- security


class Command:
    """Creates a file when unpickled by Python."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "folder/pytorch_model.bin"])
def test_pickles_are_not_executed(name: str, run: Run, tmp_path: Path) -> None:
    hf_folder(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    tensors = {"tok_embeddings.weight": torch.zeros(4, 4), "more": Command(tmp_path / "witness")}
    torch.save(tensors, tmp_path / name)
    code, _, err = run(quick(f"llm-export {'folder' if '/' in name else name} -o out"))
    assert (code, err.count("\n")) == (2, 1)
    assert name in err
    assert not (tmp_path / "witness").exists()
    pickle.loads(pickle.dumps(Command(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()  # the command does work in Python's pickle
