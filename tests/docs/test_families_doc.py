"""docs/families.md: its example, installed as a package, is compared with transformers; its statements are checked."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from project import ROOT
from sessions import open_file
from transformers import CohereConfig, CohereForCausalLM, OPTConfig, OPTForCausalLM

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.huggingface.writer import hf_config
from llm_edge.model.config import LayerConfig, ModelConfig, Norm, QKNorm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.decoder import Decoder
from llm_edge.model.families.common import llama_weights, multiply_by
from llm_edge.model.families.llama import FAMILY as LLAMA
from llm_edge.model.family import Family
from llm_edge.model.registry import find_family
from llm_edge.model.rope_reader import read_rope
from llm_edge.model.weights import SourceTensor, WeightTable, bind_weights, half_split
from llm_edge.runtime import Bundle, Model, SamplingParams
from llm_edge.runtime.errors import CheckpointError

EXAMPLE = Path(__file__).parent / "example_family"
DOCUMENT = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
CODE = (EXAMPLE / "llm_edge_opt.py").read_text(encoding="utf-8")
LLM_EXPORT = Path(sysconfig.get_path("scripts")) / "llm-export"
LENGTH, GREEDY = 130, 64
PROMPT = "What is the capital of France?"


def loud(model: Any, seed: int) -> Any:
    """Set random weights large enough for non-uniform attention, and norms and biases other than one and zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.mul_(5 if "embed" in name else 8)
    return model.eval()


def opt(seed: int = 0, **config: Any) -> OPTForCausalLM:
    shape = {"vocab_size": 331, "hidden_size": 64, "ffn_dim": 136, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    return loud(OPTForCausalLM(OPTConfig(**shape, max_position_embeddings=256, bos_token_id=0, **config)), seed)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def install(folder: Path) -> Path:
    """Install a copy of the example with pip and return the folder; building writes to the source."""
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", folder / "site"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words), str(folder / "source")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the example importable in this process."""
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("llm_edge_opt", None)


@pytest.fixture(scope="module")
def theirs() -> OPTForCausalLM:
    return opt(eos_token_id=2, pad_token_id=2)


@pytest.fixture(scope="module")
def folder(theirs: OPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(theirs, tmp_path_factory.mktemp("opt") / "opt")


@pytest.fixture(scope="module")
def bundle(site: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's bundle, exported by the command in a process with the package."""
    out = tmp_path_factory.mktemp("opt-bundle") / "opt"
    words = [LLM_EXPORT, folder, "-o", out, "--precision", "fp32", "--no-validate"]
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def ids() -> list[int]:
    found: list[int] = torch.randint(331, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    return found


@torch.inference_mode()
def our_logits(config: ModelConfig, weights: Mapping[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    decoder = Decoder(config).eval()
    decoder.load_weights(weights)
    tokens = torch.tensor([ids])
    logits: torch.Tensor = decoder(tokens, torch.ones_like(tokens), decoder.empty_past())[0][0]
    return logits


@torch.inference_mode()
def their_logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


# ---- the example


def test_the_logits_of_the_bundle_match_transformers(bundle: Path, theirs: OPTForCausalLM, ids: list[int]) -> None:
    opened = Bundle.open(bundle)
    info = opened.precision("fp32")
    session = open_file(opened.file(info.model), opened.shape, info.share_buffer, "cpu", spinning=False)
    expected = their_logits(theirs, ids).numpy()
    assert expected.std() > 0.5  # otherwise the bound would be meaningless
    for chunks in ((LENGTH,), (50, 1, 1, 30, LENGTH - 82)):
        session.clear_cache()
        found, start = [], 0
        for length in chunks:
            found.append(session.step(ids[start : start + length], num_logits=0).copy())
            start += length
        assert np.abs(np.concatenate(found) - expected).max() < 1e-4


def test_the_text_of_the_bundle_matches_transformers(bundle: Path, theirs: OPTForCausalLM) -> None:
    model = Model.load(bundle, "fp32", provider="cpu")
    prompt = model.tokenizer.encode(PROMPT, add_special_tokens=False)
    answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=GREEDY, do_sample=False)[0, len(prompt) :].tolist()
    assert len(answer) == GREEDY
    assert len(set(answer)) > 10
    found = model.generate(PROMPT, SamplingParams(temperature=0, max_tokens=GREEDY)).result()
    assert list(found.tokens) == answer


@pytest.mark.parametrize(
    "changes",
    [{"enable_bias": False}, {"activation_function": "gelu"}, {"tie_word_embeddings": False}],
    ids=str,
)
def test_the_switches_of_the_example(installed: None, changes: dict[str, Any], ids: list[int], tmp_path: Path) -> None:
    model = opt(**changes)
    checkpoint = read_folder(save(model, tmp_path))
    assert (our_logits(checkpoint.config, checkpoint.weights, ids) - their_logits(model, ids)).abs().max() < 1e-4


def test_the_position_offset_changes_the_logits(
    installed: None, folder: Path, theirs: OPTForCausalLM, ids: list[int]
) -> None:
    """Using the first rows of the table instead of the correct ones changes the logits."""
    checkpoint = read_folder(folder)
    right = checkpoint.weights["embed_positions.weight"]
    assert right.shape == (256, 64)
    table = theirs.model.decoder.embed_positions.weight.detach()
    changed = {**checkpoint.weights, "embed_positions.weight": table[:256]}
    wrong = our_logits(checkpoint.config, changed, ids)
    assert (wrong - their_logits(theirs, ids)).abs().max() > 0.05


def test_a_checkpoint_without_a_head_is_read(
    installed: None, folder: Path, theirs: OPTForCausalLM, tmp_path: Path
) -> None:
    ours, whole = read_folder(save(theirs.model, tmp_path)).weights, read_folder(folder).weights
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_the_bundles_config_builds_the_same_model(
    installed: None, folder: Path, theirs: OPTForCausalLM, ids: list[int]
) -> None:
    config = hf_config(read_folder(folder))
    again = OPTForCausalLM(OPTConfig(**config)).eval()
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(their_logits(again, ids), their_logits(theirs, ids))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim is 32; only 64 is supported"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before is False; only True is supported"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is set, which is not supported"),
        ({"activation_function": "silu"}, "activation_function 'silu' is not supported; supported: 'relu', 'gelu'"),
        ({"num_attention_heads": 5}, "hidden_size (64) is not a multiple of num_attention_heads (5)"),
        ({"max_position_embeddings": 255}, "embed_positions.weight has shape (258, 64), the config requires (255, 64)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_settings_are_rejected(
    installed: None, changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError) as refusal:
        read_folder(tmp_path)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_family_is_unknown_unless_installed() -> None:
    with pytest.raises(CheckpointError, match="model_type 'opt' is not supported; llm-export --families"):
        find_family("opt")


# ---- invalid packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that installs a module with entry points; its modules are unloaded afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def install(name: str, code: str, **families: str) -> None:
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{family} = {value}" for family, value in families.items()]
        (info / "entry_points.txt").write_text("\n".join(["[llm_edge.families]", *lines, ""]))
        (tmp_path / "site" / f"{name}.py").write_text(code)
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - before:
        if name.startswith("plugin"):
            del sys.modules[name]


def folder_of(tmp_path: Path, model_type: str) -> Path:
    folder = tiny.save_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    return folder


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import a_package_that_is_not_there", "(ModuleNotFoundError: No module named 'a_package_that_is_not_there')"),
        ("FAMILY = ", "cannot be imported (SyntaxError: invalid syntax"),
        ("raise RuntimeError('two\\nlines')", "cannot be imported (RuntimeError: two lines)"),
        ("import sys; sys.exit(0)", "cannot be imported (SystemExit: 0)"),
        ("", "has no attribute 'FAMILY'"),
        ("FAMILY = {}", "plugins:FAMILY is a dict, not a Family"),
        ("from llm_edge.model.family import Family as FAMILY", "is a type, not a Family"),
    ],
)
def test_a_broken_package_is_reported_in_one_line(
    code: str,
    words: str,
    package: Callable[..., None],
    tmp_path: Path,
    llm_export: Callable[..., tuple[int, str, str]],
) -> None:
    package("plugins", code, odd="plugins:FAMILY", other="plugins:OTHER")
    source = folder_of(tmp_path, "odd")
    status, out, err = llm_export(source, "-o", tmp_path / "out", "--progress", "none")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {source / 'config.json'}: family 'odd': plugins:FAMILY ")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_exception_in_a_package_keeps_its_traceback(package: Callable[..., None], tmp_path: Path) -> None:
    code = "from llm_edge.model.family import Family\nFAMILY = Family(lambda raw: 1 // 0, None)"
    package("plugins", code, odd="plugins:FAMILY")
    with pytest.raises(ZeroDivisionError):
        read_folder(folder_of(tmp_path, "odd"))


def test_packages_cannot_replace_built_in_families(package: Callable[..., None]) -> None:
    package("plugins", "raise SystemExit('imported')", llama="plugins:FAMILY")
    assert find_family("llama") is LLAMA
    assert "plugins" not in sys.modules


def test_two_packages_with_the_same_name_are_an_error(package: Callable[..., None]) -> None:
    package("plugins", "raise SystemExit('imported')", odd="plugins:FAMILY")
    package("plugins2", "raise SystemExit('imported')", odd="plugins2:FAMILY")
    with pytest.raises(CheckpointError, match="registered by plugins2:FAMILY and plugins:FAMILY: uninstall"):
        find_family("odd")
    assert not {"plugins", "plugins2"} & set(sys.modules)


@pytest.mark.parametrize("model_type", ["plugins", "plugins:FAMILY", "plugins.FAMILY", "../plugins", "mine"])
def test_a_config_cannot_trigger_imports(
    model_type: str,
    package: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    llm_export: Callable[..., tuple[int, str, str]],
) -> None:
    """Neither its model_type nor auto_map, files in its folder, or families that it does not name."""
    leave = f"open({str(tmp_path / 'witness')!r}, 'w').close()"
    witness = f"{leave}; from llm_edge.model.families.llama import FAMILY"
    package("plugins", witness, another="plugins:FAMILY")
    source = folder_of(tmp_path, model_type)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "plugins.FAMILY", "AutoConfig": "mine.FAMILY"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "mine.py").write_text(witness)
    monkeypatch.chdir(source)
    code, _, err = llm_export(".", "-o", tmp_path / "out", "--progress", "none")
    assert (code, err.count("\n")) == (2, 1)
    assert f"model_type {model_type!r} is not supported" in err
    assert not (tmp_path / "witness").exists()
    assert isinstance(find_family("another"), Family)  # the module is importable, so the check is meaningful
    assert (tmp_path / "witness").exists()


# ---- the document


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without the header."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_example_is_the_file_that_is_tested() -> None:
    assert blocks("toml") == [(EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")]
    assert blocks("python")[0] == CODE
    assert len(CODE.splitlines()) < 75


def test_the_parity_check_runs(installed: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")[1]
    assert code.count('"path/to/opt"') == 1
    exec(compile(code.replace("path/to/opt", str(folder)), "families.md", "exec"), {})
    printed = re.search(r"^std (\S+) max difference (\S+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert printed is not None
    assert float(printed[1]) > 0.5
    assert float(printed[2]) < 1e-4


def test_every_switch_is_in_the_document() -> None:
    listed = [name for row in table("What the decoder supports") for name in names(row[0])]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(ModelConfig))
    layer = f"`LayerConfig({', '.join(field.name for field in dataclasses.fields(LayerConfig))})`"
    assert layer in DOCUMENT
    for field in dataclasses.fields(ModelConfig):
        row = next(row for row in table("What the decoder supports") if field.name in names(row[0]))
        documented, default = row[1].strip("`"), field.default
        if field.name == "attention_scale":
            assert (documented, default) == ("1 / √`head_dim", None)
        elif default is dataclasses.MISSING:
            assert documented == ""
        else:
            assert documented == (f"{default:g}" if isinstance(default, float) else str(default)), field.name


def test_every_method_of_the_reader_is_in_the_document() -> None:
    listed = [name for row in table("Reading config.json") for name in names(row[0])]
    public = [name for name in vars(ConfigReader) if not name.startswith("_")]
    assert sorted(listed) == sorted([*public, "in"])


def test_every_weight_is_in_the_document() -> None:
    """Decoders with all switches on, gated and not gated, have exactly these weights."""
    shape: dict[str, Any] = {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings"), 8),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1),
        "layers": (LayerConfig(),),
        "norm_eps": 1e-5,
    }
    switches = ("post_norm", "learned_positions", "qkv_bias", "output_bias", "mlp_bias", "head_bias")
    all_on = {**shape, **dict.fromkeys(switches, True), "norm": Norm.LAYER, "qk_norm": QKNorm.HEAD}
    found = {
        name.removeprefix("layers.0.")
        for gated in (True, False)
        for name, _ in Decoder(ModelConfig(**all_on, gated_mlp=gated, tie_word_embeddings=False)).named_parameters()
    }
    assert sorted(name for row in table("Weight tables") for name in names(row[0])) == sorted(found)


# ---- the quirks that the document lists, in a model that has most of them


def cohere_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("use_qk_norm")
    hidden, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    head_dim = raw.head_dim(hidden, heads)
    return ModelConfig(
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=raw.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        max_position_embeddings=raw.integer("max_position_embeddings"),
        layers=(LayerConfig(read_rope(raw, head_dim, theta=500_000.0)),) * raw.layer_count("num_hidden_layers"),
        norm=Norm.LAYER,
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        norm_bias=False,
        parallel_blocks=True,
        shared_norm=True,
    )


def cohere_weights(config: ModelConfig, raw: ConfigReader) -> WeightTable:
    convert = half_split(config.head_dim)
    query, key, value = (f"self_attn.{name}_proj.weight" for name in "qkv")
    return llama_weights(
        outer={
            "norm.weight": SourceTensor("model.norm.weight", multiply_by(raw.positive("logit_scale"))),
        },
        layer={
            "attention.qkv.weight": (SourceTensor(query, convert), SourceTensor(key, convert), value),
        },
    )


def test_a_family_with_many_quirks(ids: list[int]) -> None:
    """Interleaved rotary positions, a folded scale, norms without bias, one norm for two parallel blocks."""
    config = CohereConfig(
        vocab_size=331,
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
        logit_scale=2.0,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    model = loud(CohereForCausalLM(config), 3)
    family = Family(cohere_config, cohere_weights)
    raw = ConfigReader(config.to_dict())
    ours, state = family.read_config(raw), {name: weight.detach() for name, weight in model.state_dict().items()}
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    weights = bind_weights(ours, family.weight_table(ours, raw), shapes, state.__getitem__, "cohere")
    expected = their_logits(model, ids)
    assert expected.std() > 0.5
    assert (our_logits(ours, weights, ids) - expected).abs().max() < 1e-4
