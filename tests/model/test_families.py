"""Compare every family with transformers: logits in one step, in chunks and per token, greedy text, both graphs."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from project import ROOT
from sessions import open_file
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.huggingface.writer import hf_config
from llm_edge.exporter.bundle.onnx_writer import OnnxWriter
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.exporter.validation.parity import model_shape
from llm_edge.model.config import LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.decoder import Decoder
from llm_edge.model.registry import BUILT_IN, find_family
from llm_edge.model.weights import bind_weights
from llm_edge.runtime.errors import CheckpointError

BOUND = 1e-4  # ten times stricter than required
CHUNKS = (20, 20, 1, 1, 28)  # after the first, every chunk is longer than, or extends beyond, a sliding window
LENGTH = sum(CHUNKS)
GREEDY = 64
_ODD_HEADS = (
    "llama with heads of 6",
    "gpt2",
    "gpt_neox with sequential blocks",
)  # the fused operator requires multiples of 8
_FIRST = {kind: name for name, (kind, _) in reversed(families.CASES.items())}
BARE = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GRAPHS = [
    *((name, "fused") for name in families.CASES if name not in _ODD_HEADS),
    *((name, "portable") for name in dict.fromkeys((*_ODD_HEADS, *_FIRST.values(), "llama, longrope"))),
]


class Case:
    """A family's model in transformers, and its checkpoint as read here."""

    def __init__(self, name: str, folder: Path) -> None:
        self.theirs = families.model(name)
        families.save(self.theirs, folder)
        self.folder = folder
        self.checkpoint: Checkpoint = read_folder(folder)
        self.ids = torch.randint(0, 331, (1, LENGTH), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def logits(self, chunks: tuple[int, ...]) -> Tensor:
        """Return the logits of transformers, [T, V]."""
        cache, found, start = None, [], 0
        for length in chunks:
            step = self.theirs(self.ids[:, start : start + length], past_key_values=cache, use_cache=True)
            cache, start = step.past_key_values, start + length
            found.append(step.logits[0])
        return torch.cat(found)

    @torch.inference_mode()
    def greedy(self) -> list[int]:
        step, tokens = self.theirs(self.ids, use_cache=True), []
        for _ in range(GREEDY):
            tokens.append(int(step.logits[0, -1].argmax()))
            step = self.theirs(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
        return tokens


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            cases[name] = Case(name, tmp_path_factory.mktemp("family"))
        return cases[name]

    return get


def decoder(checkpoint: Checkpoint) -> Decoder:
    built = Decoder(checkpoint.config).eval()
    built.load_weights(checkpoint.weights)
    return built


@torch.inference_mode()
def our_logits(model: Decoder, ids: Tensor, chunks: tuple[int, ...]) -> Tensor:
    past, found, start = model.empty_past(), [], 0
    for length in chunks:
        start += length
        mask = torch.ones(1, start, dtype=torch.int64)
        logits, past = model(ids[:, start - length : start], mask, past)
        found.append(logits[0])
    return torch.cat(found)


def test_mistral_with_mixed_layer_types_matches_ministral() -> None:
    """transformers implements such configs as the Ministral family, which differs only in this."""
    from transformers import MinistralConfig, MinistralForCausalLM

    config = {
        **BARE,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 16,
        "head_dim": 32,
    }
    torch.manual_seed(0)
    theirs = MinistralForCausalLM(MinistralConfig(**config, attn_implementation="eager")).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)
    state = theirs.state_dict()
    raw = ConfigReader(config)
    family = find_family("mistral")
    shape = family.read_config(raw)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    ours = Decoder(shape).eval()
    ours.load_weights(bind_weights(shape, family.weight_table(shape, raw), shapes, lambda name: state[name], "state"))
    ids = torch.arange(60)[None] % 331
    with torch.inference_mode():
        assert (our_logits(ours, ids, (60,)) - theirs(ids).logits[0]).abs().max() < BOUND


@pytest.mark.parametrize("window", [256, 2**32 + 4])
def test_a_window_longer_than_the_context_is_ignored(window: int, case: Callable[[str], Case], tmp_path: Path) -> None:
    """2^32 + 4 would overflow to 4 in an operator with 32-bit integers."""
    checkpoint = case("mistral").checkpoint
    config = without(checkpoint.config, window=window)
    windowed = dataclasses.replace(checkpoint, config=config)
    OnnxWriter(GraphStyle.FUSED).write(tmp_path, windowed, (RECIPES["fp32"],), [], lambda *_: None)
    session = open_file(tmp_path / "model.onnx", model_shape(config), True, provider="cpu", spinning=False)
    unlimited = decoder(dataclasses.replace(checkpoint, config=without(checkpoint.config, window=None)))
    ids = case("mistral").ids
    wanted = our_logits(unlimited, ids, (LENGTH,))
    assert np.abs(session.step(ids[0].tolist(), num_logits=0) - wanted.numpy()).max() < BOUND


def test_no_window_is_still_no_window_for_readers_of_the_bundle(case: Callable[[str], Case], tmp_path: Path) -> None:
    """Where transformers would use a window if the key were missing."""
    from transformers import MistralConfig

    source = case("mistral").folder
    for file in source.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | {"sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_folder(tmp_path)
    assert all(layer.window is None for layer in read.config.layers)
    assert MistralConfig(**read.hf_config).sliding_window is None


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in families.CASES.values()} == BUILT_IN.keys()


def test_every_family_module_is_registered() -> None:
    modules = {path.stem for path in (ROOT / "model" / "families").glob("*.py")} - {"__init__", "common"}
    assert set(BUILT_IN.values()) == modules


@pytest.mark.parametrize("chunks", [(LENGTH,), CHUNKS], ids=["at once", "in chunks"])
@pytest.mark.parametrize("name", families.CASES)
def test_the_reference_agrees_with_transformers(
    name: str, chunks: tuple[int, ...], case: Callable[[str], Case]
) -> None:
    found = case(name)
    ours = our_logits(decoder(found.checkpoint), found.ids, chunks)
    theirs = found.logits(chunks)
    assert theirs.std() > 0.5  # otherwise the bound would be meaningless
    assert (ours - theirs).abs().max() < BOUND


@pytest.mark.parametrize(("name", "style"), GRAPHS)
def test_the_graph_agrees_with_transformers(name: str, style: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    found, graph = case(name), GraphStyle(style)
    config = found.checkpoint.config
    OnnxWriter(graph).write(tmp_path, found.checkpoint, (RECIPES["fp32"],), [], lambda *_: None)
    session = open_file(
        tmp_path / "model.onnx", model_shape(config), graph is GraphStyle.FUSED, provider="cpu", spinning=False
    )
    ids = found.ids[0].tolist()
    for chunks in ((LENGTH,), CHUNKS):
        session.clear_cache()
        parts, start = [], 0
        for length in chunks:
            parts.append(session.step(ids[start : start + length], num_logits=0).copy())
            start += length
        assert np.abs(np.concatenate(parts) - found.logits(chunks).numpy()).max() < BOUND
    session.clear_cache()
    logits, tokens = session.step(ids), []
    for _ in range(GREEDY):
        tokens.append(int(logits[-1].argmax()))
        logits = session.step(tokens[-1:])
    assert tokens == found.greedy()


def without(config: ModelConfig, **changes: Any) -> ModelConfig:
    """Return a config with a switch turned off; `rope` and `window` apply to all layers."""
    layer = {key: changes.pop(key) for key in ("rope", "window") if key in changes}
    layers = tuple(dataclasses.replace(entry, **layer) for entry in config.layers)
    return dataclasses.replace(config, layers=layers, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"window": None}),
        ("qwen2", {"window": None}),
        ("smollm3", {"window": None}),
        ("gemma3_text", {"window": None}),
        ("gemma3_text", {"attention_scale": None}),
        ("gemma3_text", {"embedding_scale": 1.0}),
        ("gemma2", {"window": None}),
        ("gemma2", {"attention_scale": None}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("ministral3", {"window": None}),
        ("ministral3", {"query_growth": None}),
        ("olmo3", {"window": None}),
        ("olmo3", {"rope": "unscaled"}),
        ("gemma", {"embedding_scale": 1.0}),
        ("starcoder2", {"window": None}),
        ("stablelm with parallel blocks", {"rope": None}),
        ("exaone4", {"window": None}),
        ("exaone4", {"rope": "everywhere"}),
        ("exaone4 without windows", {"rope": None}),
        ("cohere2", {"window": None}),
        ("cohere2", {"rope": "everywhere"}),
        ("gpt_neo", {"window": None}),
        ("gpt_neo", {"attention_scale": None}),
        ("granite", {"attention_scale": None}),
        ("gpt_neox", {"parallel_blocks": False}),
        *((name, {"rope": "unscaled"}) for name in families.CASES if name.startswith("llama, ")),
        ("smollm3", {"rope": "everywhere"}),
        ("phi3, longrope on a part of each head", {"rope": "unscaled"}),
    ],
)
def test_every_config_switch_changes_the_logits(
    name: str, changes: dict[str, Any], case: Callable[[str], Case]
) -> None:
    """Otherwise agreement with transformers would not test the switch."""
    checkpoint = case(name).checkpoint
    rope = checkpoint.config.ropes[0] if checkpoint.config.ropes else None
    given = {"unscaled": rope and dataclasses.replace(rope, scaling=None), "everywhere": rope}
    changes = {key: given[value] if isinstance(value, str) else value for key, value in changes.items()}
    ids = case(name).ids
    right = our_logits(decoder(checkpoint), ids, (LENGTH,))
    changed = dataclasses.replace(checkpoint, config=without(checkpoint.config, **changes))
    assert (our_logits(decoder(changed), ids, (LENGTH,)) - right).abs().max() > 0.05


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3_text"])
def test_a_checkpoint_without_a_head_is_read(name: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    """`AutoModel.save_pretrained` omits the prefix and the tied head."""
    found = case(name)
    families.save(found.theirs.base_model, tmp_path)
    ours = read_folder(tmp_path)
    assert ours.weights.keys() == found.checkpoint.weights.keys()
    for weight in ours.weights:
        assert torch.equal(ours.weights[weight], found.checkpoint.weights[weight])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gemma3_text", {}),
        ("gemma3_text", {"sliding_window_pattern": 2, "rope_theta": 5e5, "rope_local_base_freq": 2e4}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("olmo3", {}),
        ("olmo3", {"sliding_window": 8, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma", {}),
        ("gemma2", {}),
        ("starcoder2", {}),
        ("exaone4", {}),
        ("cohere2", {"sliding_window_pattern": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 3}),
        ("smollm3", {}),
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 1, 1, 1, 0]}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 3}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)
def test_missing_config_keys_get_their_defaults(kind: str, config: dict[str, Any]) -> None:
    """Configs on the Hub are often older than those that transformers writes today."""
    from transformers import CONFIG_MAPPING

    raw = {**BARE, **config}
    theirs = CONFIG_MAPPING[kind](**copy.deepcopy(raw))
    ours = find_family(kind).read_config(ConfigReader(raw))
    sliding = theirs.layer_types if hasattr(theirs, "layer_types") else ["sliding_attention"] * 8
    window = getattr(theirs, "sliding_window", None)
    assert [layer.window for layer in ours.layers] == [window if "sliding" in entry else None for entry in sliding]
    rotated = getattr(theirs, "no_rope_layers", [1] * 8)
    if kind in ("exaone4", "cohere2"):
        rotated = ["sliding" in entry for entry in sliding]
    assert [layer.rope is not None for layer in ours.layers] == [bool(entry) for entry in rotated]
    for layer, entry in zip(ours.layers, sliding, strict=True):
        rope = theirs.rope_parameters.get(entry, theirs.rope_parameters)
        if layer.rope is not None:
            assert layer.rope.theta == rope["rope_theta"]
            factor = rope["factor"] if rope["rope_type"] == "linear" else None
            assert getattr(layer.rope.scaling, "factor", None) == factor


@pytest.mark.parametrize("name", families.CASES)
def test_the_bundles_config_builds_the_same_transformers_model(name: str, case: Callable[[str], Case]) -> None:
    """The bundle's config.json has the keys that the family read, and transformers builds the same model from it."""
    from transformers import CONFIG_MAPPING

    found = case(name)
    config = hf_config(found.checkpoint)
    again = CONFIG_MAPPING[config["model_type"]](**config)
    original, copied = found.theirs.config.to_dict(), again.to_dict()
    for key in config.keys() & original.keys() - {"architectures"}:
        assert copied[key] == original[key], key
    again._attn_implementation = "eager"
    rebuilt = type(found.theirs)(again).eval()
    rebuilt.load_state_dict(found.theirs.state_dict())
    with torch.inference_mode():
        assert torch.equal(rebuilt(found.ids).logits, found.theirs(found.ids).logits)


def test_an_empty_window_is_rejected() -> None:
    layer = LayerConfig(window=0)
    with pytest.raises(CheckpointError, match="sliding_window"):
        ModelConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=8,
            layers=(layer,),
            norm_eps=1e-5,
            tie_word_embeddings=True,
            norm=Norm.LAYER,
        )


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "factor is nan"),
        ("llama, longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}}, "short_factor is not"),
        (
            "llama, llama3",
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 1}},
            "low",
        ),
        ("llama", {"max_position_embeddings": 2_000_000, "head_dim": 4096}, "--max-seq-len"),
        ("mistral", {"sliding_window": -1}, "sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is not a list"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "x"]}, "layer_types has entries other"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "sliding_window is not set"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": "LLLG"}, "is 'LLLG', not an integer"),
        ("seed_oss", {"head_dim": None}, "head_dim is missing"),
        ("cohere", {"logit_scale": 0}, "logit_scale is 0"),
        ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": None}}, "llama_4_scaling_beta is missing"),
        ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": -1}}, "llama_4_scaling_beta is -1"),
        ("ministral3", {"layer_types": ["full_attention"] * 2}, "layer_types is set"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
        ("gemma2", {"attn_logit_softcapping": 1e9}, "attention_softcap is 1000000000.0"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv is set"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("granite", {"embedding_multiplier": float("inf")}, "embedding_scale is inf"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is set"),
        ("gpt2", {"activation_function": "mish"}, "'mish' is not supported"),
        ("gpt_neo", {"attention_layers": None, "attention_types": [[["global"], 3]]}, "attention_types"),
        ("gpt_neo", {"attention_layers": None, "attention_types": [[["global"], 10**12]]}, "attention_types"),
        ("gpt_neo", {"attention_layers": None, "attention_types": {"a": 1}}, "attention_types"),
        ("gpt_neo", {"attention_layers": None, "attention_types": [[["local"] * 4000, 4000]]}, "attention_types"),
        ("gpt_neo", {"attention_layers": ["local", "near"]}, "attention_types"),
        ("gpt_neo", {"num_attention_heads": 2}, "but its alias"),
        ("gpt2", {"num_attention_heads": 2}, "but its alias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is set"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is set"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "both set"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "one entry per layer type"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": None}}, "no sliding_attention"),
        ("llama, yarn", {"rope_parameters": {"beta_fast": 1e308}}, "beta_fast is 1e+308"),
        ("llama, yarn", {"rope_parameters": {"mscale": 1.0, "mscale_all_dim": -1e-9}}, "mscale_all_dim is -1e-09"),
        (
            "phi3, longrope on a part of each head",
            {"original_max_position_embeddings": None},
            "but 4096 at the top level of the config",
        ),
        ("llama", {"is_causal": False}, "is_causal is False"),
        ("llama", {"max_position_embeddings": 1}, "max_position_embeddings is 1"),
        ("gpt_neo", {"num_layers": 10**9}, "num_layers is 1000000000"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.1}}, "rotary dimension 3 is invalid"),
        ("qwen3", {"model_type": "qwen9"}, "'qwen9' is not supported (similar: qwen3, qwen2); llm-export"),
        ("qwen3", {"model_type": ["llama"]}, "model_type"),
        ("olmo2", {"hidden_size": 10**4000}, "hidden_size is"),
    ],
)
def test_unsupported_config_options_are_rejected(
    name: str, changes: dict[str, Any], words: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    source = case(name).folder
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if key == "rope_parameters" else value
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refusal:
        read_folder(tmp_path)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
