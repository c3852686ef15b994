"""State dicts with Meta's names: with their config and tokenizer they reproduce the original model."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import original
import pytest
import tiny
import torch
from original import ANSWER_END, CONTROL, PADDING, QUESTION_END, THINK_END, THINK_START, Saved, Shape, save_family
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.meta.checkpoint import read_state_dict
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.model.decoder import Decoder
from llm_edge.model.rope import Llama3Scaling, YarnScaling
from llm_edge.runtime import Model, SamplingParams
from llm_edge.runtime.bundle import Guards, ReasoningTokens
from llm_edge.runtime.errors import CheckpointError, ParameterError, TemplateError
from llm_edge.runtime.text.answer_stream import separate_reasoning
from llm_edge.runtime.text.tokenizer import Tokenizer

SHAPE = original.SIZES["tiny"]
Rewrite = Callable[..., Path]


def read(path: Path, **options: Any) -> Checkpoint:
    return read_state_dict(path, StateDictOptions(**options))


def opened(path: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(str(path), SourceOptions(StateDictOptions(**options)), lambda _: None)


def decoder(checkpoint: Checkpoint) -> Decoder:
    with torch.device("meta"):
        made = Decoder(checkpoint.config).eval()
    made.load_weights(checkpoint.weights)
    return made


@torch.no_grad()
def logits(model: Decoder, tokens: torch.Tensor, *steps: int) -> torch.Tensor:
    """Return the logits of all positions, computed in steps of these lengths."""
    past, parts, done = model.empty_past(tokens.shape[0]), [], 0
    for step in steps or (tokens.shape[1],):
        mask = torch.ones(tokens.shape[0], done + step, dtype=torch.int64)
        part, past = model(tokens[:, done : done + step], mask, past)
        parts.append(part)
        done += step
    assert done == tokens.shape[1]
    return torch.cat(parts, dim=1)


def some_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, SHAPE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))


def agree(saved: Saved, checkpoint: Checkpoint, length: int = 33) -> None:
    tokens = torch.randint(
        0, saved.model.shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(length)
    )
    wanted = saved.model(tokens)
    assert wanted.std() > 0.5  # otherwise the bound would be meaningless
    torch.testing.assert_close(logits(decoder(checkpoint), tokens), wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny model with two query heads per key head; read-only."""
    return save_family(tmp_path_factory.mktemp("family") / "tiny", n_kv_heads=2)


@pytest.fixture
def bare(family: Saved, tmp_path: Path) -> Path:
    """The same weights with a tokenizer but without a config."""
    shutil.copytree(family.folder / "tokenizer", tmp_path / "bare")
    shutil.copy(family.path, tmp_path / "bare")
    return tmp_path / "bare" / "model.pt"


@pytest.fixture
def refused(family: Saved, tmp_path: Path) -> Callable[..., str]:
    """Return a function that reads the model with another config.yaml and returns the error."""

    def refuse(text: str | None = None, **sections: Any) -> str:
        path = tmp_path / "refused.yaml"
        if text is not None:
            path.write_text(text)
        else:
            original.write_config(path, family.model.shape, **sections)
        with pytest.raises(CheckpointError) as caught:
            read(family.path, config=path, tokenizer=family.folder / "tokenizer")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


# ---- logits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_match_the_original(kv_heads: int, seed: int, tmp_path: Path) -> None:
    saved = save_family(tmp_path, n_kv_heads=kv_heads, seed=seed)
    checkpoint = read(saved.path)
    assert checkpoint.config.num_key_value_heads == kv_heads
    for length in (1, 2, 17, 90):
        agree(saved, checkpoint, length)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_steps_with_a_past_match_the_original(kv_heads: int, tmp_path: Path) -> None:
    saved = save_family(tmp_path, n_kv_heads=kv_heads, seed=5)
    model = decoder(read(saved.path))
    tokens = some_tokens(2, 40)
    wanted = saved.model(tokens)
    for steps in ((1,) * 40, (20, *(1,) * 20), (7, 12, 1, 20)):
        torch.testing.assert_close(logits(model, tokens, *steps), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "saving",
    [
        {"wrap": "model_state_dict"},
        {"wrap": "state_dict"},
        {"wrap": "module."},
        {"wrap": "_orig_mod."},
        {"legacy": True},
        {"suffix": ".bin"},
        {"suffix": ".pth", "dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "legacy": True},
        {"suffix": ".safetensors"},
        {"suffix": ".safetensors", "dtype": torch.float16},
    ],
    ids=str,
)
def test_every_way_of_saving_is_read(saving: dict[str, Any], tmp_path: Path) -> None:
    saved = save_family(tmp_path, n_kv_heads=2, **saving)
    checkpoint = read(saved.path)
    agree(saved, checkpoint)
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[saving.get("dtype", torch.float32)]
    assert checkpoint.source.weight_types == kind
    assert checkpoint.source.format == ("safetensors" if saved.path.suffix == ".safetensors" else "PyTorch")


def test_a_model_without_a_separate_head_is_tied(tmp_path: Path) -> None:
    saved = save_family(tmp_path / "a", tied=True)
    checkpoint = read(saved.path)
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.hf_config["tie_word_embeddings"] is True
    agree(saved, checkpoint)
    twice = save_family(tmp_path / "b", tied=True, extra={"output.weight": saved.model.tok_embeddings.weight.clone()})
    assert read(twice.path).config.tie_word_embeddings  # stored twice, as torch.save does with a shared parameter
    agree(twice, read(twice.path))
    assert not read(save_family(tmp_path / "c").path).config.tie_word_embeddings


def test_rotary_tables_are_ignored_but_unknown_tensors_are_errors(tmp_path: Path) -> None:
    tables = {
        "rope.freqs": torch.ones(8),
        "freqs_cis": torch.ones(64, 8, dtype=torch.complex64),
        "causal_mask": torch.ones(8, 8, dtype=torch.bool),
        "layers.1.attention.mask": torch.ones(8, 8),
    }
    saved = save_family(tmp_path / "a", extra=tables)
    agree(saved, read(saved.path))
    for name in ("layers.0.attention.wq.bias", "layers.0.attention.q_norm.weight", "more.weight"):
        strange = save_family(tmp_path / name, extra={name: torch.ones(64)})
        with pytest.raises(CheckpointError, match=re.escape(f"unexpected tensor {name}")):
            read(strange.path)


def test_the_head_size_need_not_divide_the_hidden_size(family: Saved, bare: Path) -> None:
    """Mistral's releases use these names too, with head_dim, hidden_dim, and queries narrower than the model."""
    state = {name: value.clone() for name, value in family.model.state_dict().items()}
    for layer in range(2):
        for name in ("wq", "wk", "wv"):
            weight = state[f"layers.{layer}.attention.{name}.weight"]
            state[f"layers.{layer}.attention.{name}.weight"] = weight[: weight.shape[0] // 2].clone()
        wo = f"layers.{layer}.attention.wo.weight"
        state[wo] = state[wo][:, :32].clone()
    torch.save(state, bare)
    params = {"dim": 64, "n_layers": 2, "head_dim": 8, "hidden_dim": 160, "n_heads": 4, "n_kv_heads": 2}
    (bare.parent / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-5, "rope_theta": 1e6}))
    checkpoint = read(bare)
    assert (checkpoint.config.head_dim, checkpoint.config.num_attention_heads) == (8, 4)
    assert checkpoint.hf_config["head_dim"] == 8


# ---- sources of the config


def test_config_yaml_beside_the_checkpoint_is_sufficient(family: Saved) -> None:
    config = read(family.path).config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (331, 64, 160)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.max_position_embeddings, config.norm_eps) == (512, 1e-5)
    assert [layer.rope.theta for layer in config.layers if layer.rope] == [50_000.0] * 2


def test_params_json_of_meta_is_read(family: Saved, bare: Path) -> None:
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "ffn_dim_multiplier": 1.3, "vocab_size": -1}
    file = bare.parent / "params.json"
    file.write_text(json.dumps({**params, "rope_theta": 50000.0, "norm_eps": 1e-5}))
    checkpoint = read(bare)  # n_kv_heads is derived from wk, as for Meta's models without that key
    assert checkpoint.config.num_key_value_heads == 2
    assert checkpoint.config.max_position_embeddings == 2048  # the documented default
    agree(family, checkpoint)
    file.write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=r"params.json does not set rope_theta.*--rope-theta"):
        read(bare)
    assert read(bare, rope_theta=10_000.0).config.norm_eps == 1e-5


@pytest.mark.parametrize("stated", [{}, {"rope_scaling_factor": 32}])
def test_llama3_rope_scaling_is_read(stated: dict[str, Any], bare: Path) -> None:
    shape = Shape(n_kv_heads=2, max_seq_len=512, rope_theta=500_000.0)
    factor = stated.get("rope_scaling_factor", 8.0)
    scaling = {"factor": factor, "low": 1.0, "high": 4.0, "original": 8192}
    model = original.random_model(shape, 3, llama3=scaling)
    torch.save(model.state_dict(), bare)
    params = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 500000.0, "use_scaled_rope": True, **stated}
    (bare.parent / "params.json").write_text(json.dumps(params))
    checkpoint = read(bare)
    (rope,) = checkpoint.config.ropes
    assert rope.scaling == Llama3Scaling(factor, 1.0, 4.0, 8192)
    agree(Saved(bare.parent, bare, model), checkpoint, 300)


def test_a_hugging_face_config_is_read(family: Saved, bare: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=331, rope_theta=50_000.0, rms_norm_eps=1e-5)
    (bare.parent / "config.json").write_text(made.to_json_string())
    agree(family, read(bare))
    old = {**shape, "model_type": "llama", "rope_theta": 50000.0, "rope_scaling": None, "tie_word_embeddings": True}
    (bare.parent / "config.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is True, but output.weight differs"):
        read(bare)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("left_out", ["factor", "original_max_position_embeddings", "nothing"])
def test_a_shorter_context_does_not_change_frequencies(left_out: str, bare: Path) -> None:
    params = {"dim": 64, "n_heads": 4, "rope_theta": 50000.0, "max_seq_len": 64}
    scaling = {key: value for key, value in YARN.items() if key != left_out}
    (bare.parent / "params.json").write_text(json.dumps({**params, "rope_scaling": scaling}))
    whole, short = opened(bare), opened(bare, max_seq_len=32)
    assert (whole.config.max_position_embeddings, short.config.max_position_embeddings) == (64, 32)
    assert short.config.ropes == whole.config.ropes
    (rope,) = short.config.ropes
    assert isinstance(rope.scaling, YarnScaling)
    assert rope.scaling.factor == 4.0
    assert rope.scaling.original_length == (64 if left_out.startswith("original") else 16)
    tokens = some_tokens(1, 32)
    assert torch.equal(logits(decoder(short), tokens), logits(decoder(whole), tokens))
    with pytest.raises(ParameterError, match=r"--max-seq-len is 65; it must be 2 to 64"):
        opened(bare, max_seq_len=65)


def test_the_context_length_can_be_given_as_an_option(bare: Path) -> None:
    params = {"dim": 64, "n_heads": 4, "rope_theta": 50000.0}
    for length in (32, 4096):  # also more than the default
        checkpoint = opened(bare, n_heads=4, rope_theta=50_000.0, max_seq_len=length)
        assert checkpoint.config.max_position_embeddings == length
        assert checkpoint.tokenizer.tokenizer_config["model_max_length"] == length
    file = bare.parent / "params.json"
    file.write_text(json.dumps({**params, "rope_scaling": YARN}))
    assert opened(bare, max_seq_len=32).config.ropes == opened(bare).config.ropes
    for key in ("factor", "original_max_position_embeddings"):  # would otherwise be derived from the option
        file.write_text(json.dumps({**params, "rope_scaling": {k: v for k, v in YARN.items() if k != key}}))
        with pytest.raises(CheckpointError, match=rf"params.json: neither {key} .* nor max_seq_len.*is set"):
            opened(bare, max_seq_len=32)


def test_unsupported_rope_scalings_are_rejected(bare: Path) -> None:
    file = bare.parent / "params.json"
    llama3 = {"rope_type": "llama3", "factor": 8.0}
    for keys, message in (
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters: has no rope_type or one entry"),
        ({"rope_parameters": {"rope_type": "default", "full_attention": YARN}}, "rope_parameters: has no rope_type or"),
        ({"rope_parameters": {"rope_type": None, "factor": 8.0}}, "rope_parameters: has no rope_type or one entry"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling: has no rope_type or one entry"),
        ({"use_scaled_rope": True, "rope_scaling": llama3}, "use_scaled_rope and rope_scaling are both set"),
        ({"use_scaled_rope": True, "rope_parameters": llama3}, "use_scaled_rope and rope_parameters are both set"),
        ({"rope_parameters": YARN, "rope_scaling": YARN}, "rope_parameters and rope_scaling are both set"),
        ({"rope_parameters": {}, "rope_scaling": YARN}, "rope_parameters and rope_scaling are both set"),
        ({"rope_high_freq_factor": 2.0}, "rope_high_freq_factor is set without use_scaled_rope"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 50000.0, but 1000000.0 in the section"),
    ):
        file.write_text(json.dumps({"dim": 64, "n_heads": 4, "rope_theta": 50000.0, "max_seq_len": 64, **keys}))
        with pytest.raises(CheckpointError) as caught:
            read(bare)
        assert message in str(caught.value)
        assert str(file) in str(caught.value)


def test_the_original_context_length_of_a_scaling_is_read(bare: Path) -> None:
    """The Llama of transformers has the same frequencies and amplitude."""
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 331, "max_position_embeddings": 512}
    section = {"rope_type": "yarn", "factor": 32.0, "rope_theta": 50000.0}
    content = {**shape, "model_type": "llama", "rope_parameters": section, "original_max_position_embeddings": 16}
    (bare.parent / "config.json").write_text(json.dumps(content))
    (rope,) = read(bare).config.ropes
    assert isinstance(rope.scaling, YarnScaling)
    assert rope.scaling.original_length == 16
    theirs = LlamaForCausalLM(LlamaConfig.from_pretrained(bare.parent)).model.rotary_emb
    cosines, sines = theirs(torch.zeros(1), torch.arange(512)[None])
    ours = rope.tables(512)
    torch.testing.assert_close(ours[0], cosines[0, :, :8], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], sines[0, :, :8], rtol=0, atol=1e-4)


UNKNOWN = {
    "attention_scale": 0.5,
    "embedding_multiplier": 12,
    "is_causal": False,
    "n_experts": 8,
    "rope_scale": 2.0,
    "softcap": 30.0,
}
OTHERWISE = {
    "act_fn": "gelu",
    "attn_logit_softcapping": 50.0,
    "norm_type": "layernorm",
    "pos_encoding": "alibi",
    "qk_norm": True,
    "window": 128,
}


@pytest.mark.parametrize("key", [*UNKNOWN, *OTHERWISE])
def test_keys_that_may_change_the_model_are_rejected(
    key: str, family: Saved, bare: Path, refused: Callable[..., str]
) -> None:
    value = {**UNKNOWN, **OTHERWISE}[key]
    message = refused(model={**asdict(family.model.shape), key: value})
    why = "remove keys that do not affect" if key in UNKNOWN else "not supported"
    assert "refused.yaml: model: " in message
    assert key in message
    assert why in message
    (bare.parent / "params.json").write_text(json.dumps({"n_heads": 4, "rope_theta": 5e4, key: value}))
    with pytest.raises(CheckpointError, match=rf"params\.json: .*{key}.*{why}"):
        read(bare)


def test_many_unknown_keys_yield_one_short_line(refused: Callable[..., str]) -> None:
    message = refused(model={"n_heads": 4, **{f"{index}{'x' * 500}": 1 for index in range(50)}})
    assert "and 47 more" in message
    assert len(message) < 1000


def test_irrelevant_keys_are_ignored(family: Saved, bare: Path, tmp_path: Path) -> None:
    harmless = {
        "dropout": 0.1,
        "init_std": 0.02,
        "dtype": "bfloat16",
        "use_cache": True,
        "gradient_checkpointing": True,
        "name": "family-505m",
        "max_batch_size": 32,
        "norm_type": "RMSNorm",
        "activation": "SwiGLU",
        "bias": False,
        "qk_norm": False,
        "sliding_window": None,
        "attention_scale": None,
        "tie_embeddings": False,
    }
    path = tmp_path / "harmless.yaml"
    original.write_config(path, family.model.shape, model={**asdict(family.model.shape), **harmless})
    agree(family, read(family.path, config=path, tokenizer=family.folder / "tokenizer"))
    (bare.parent / "params.json").write_text(
        json.dumps({"n_heads": 4, "rope_theta": 5e4, "multiple_of": 256, "ffn_dim_multiplier": 1.3, **harmless})
    )
    agree(family, read(bare))


def test_options_are_sufficient_and_override_a_file(family: Saved, bare: Path) -> None:
    agree(family, read(bare, n_heads=4, rope_theta=50_000.0))
    checkpoint = opened(family.path, rope_theta=123.0, max_seq_len=64, norm_eps=1e-3)
    assert (checkpoint.config.max_position_embeddings, checkpoint.config.norm_eps) == (64, 1e-3)
    assert checkpoint.hf_config["rope_theta"] == 123.0
    assert read(family.path, n_heads=8, n_kv_heads=4).config.head_dim == 8
    with pytest.raises(CheckpointError, match=r"^--n-kv-heads is 3, but layers.0.attention.wk.weight has 32 rows"):
        read(family.path, n_kv_heads=3)


def test_missing_settings_are_requested(bare: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not contain the head count.*give --config FILE or --n-heads N"):
        read(bare)
    with pytest.raises(
        CheckpointError, match=r"does not contain the rotary base.*give --config FILE or --rope-theta N"
    ):
        read(bare, n_heads=4)


def test_contradictions_name_both_sources(refused: Callable[..., str]) -> None:
    model = asdict(replace(SHAPE, n_kv_heads=2))
    for key, value, other in (
        ("dim", 1024, "tok_embeddings.weight has 64 columns"),
        ("ffn_dim", 4096, "layers.0.feed_forward.w1.weight has 160 rows"),
        ("n_layers", 24, "model.pt has 2 layers"),
        ("vocab_size", 50_000, "tok_embeddings.weight has 331 rows"),
        ("n_kv_heads", 4, "layers.0.attention.wk.weight has 32 rows, 2 heads of 16"),
        ("n_heads", 16, "layers.0.attention.wk.weight has 32 rows, 8 heads of 4"),
    ):
        message = refused(model={**model, key: value})
        assert f"refused.yaml: model: {key if key != 'n_heads' else 'n_kv_heads'} is " in message
        assert other in message


def test_incomplete_and_sharded_checkpoints_are_errors(family: Saved, tmp_path: Path) -> None:
    state = family.model.state_dict()

    def attempt(**changes: Any) -> str:
        path = tmp_path / "broken.pt"
        torch.save({name: value for name, value in {**state, **changes}.items() if value is not None}, path)
        with pytest.raises(CheckpointError) as caught:
            read(path, config=family.folder / "config.yaml", tokenizer=family.folder / "tokenizer")
        return str(caught.value)

    assert "tok_embeddings.weight is missing" in attempt(**{"tok_embeddings.weight": None})
    assert "layers.1.ffn_norm.weight is missing" in attempt(**{"layers.1.ffn_norm.weight": None})
    assert "layer 2 of 10 is missing" in attempt(**{"layers.9.ffn_norm.weight": torch.ones(64)})
    assert "layers.1.attention.wv.weight" in attempt(**{"layers.1.attention.wv.weight": torch.ones(64, 64)})
    assert "weights of type int8" in attempt(**{"norm.weight": torch.ones(64, dtype=torch.int8)})
    shutil.copy(family.path, tmp_path / "consolidated.00.pth")
    options = {"config": family.folder / "config.yaml", "tokenizer": family.folder / "tokenizer"}
    checkpoint = read(tmp_path / "consolidated.00.pth", **options)
    assert checkpoint.source.name == tmp_path.name


NEST = "model:\n  dim: " + "[" * 10_000
MODEL = "model:\n  dim: 64\n  ffn_dim: 160\n  n_layers: 2\n  vocab_size: 331\n  rope_theta: 50000\n"
ABSURD = {
    "empty": "",
    "only a comment": "# nothing",
    "a list": "- 1\n- 2",
    "a text": "model",
    "not YAML": "model: [1, 2",
    "two documents": MODEL + "---\n" + MODEL,
    "lists in lists": NEST,
    "mappings in mappings": "model: " + "{a: " * 10_000,
    "sequences in sequences": "- " * 10_000,
    "keys that are lists": "? [a]\n: 1",
    "an alias": "a: &x [1]\nmodel: *x",
    "a billion laughs": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nmodel: *c",
    "a merge key": "model:\n  <<: {dim: 64}",
    "a tag": "model: !!python/object/apply:os.system ['true']",
    "a number's tag": "model:\n  n_heads: !!int '1:1:1'",
    "a repeated key": "model:\n  n_heads: 4\n  n_heads: 8",
    "a NUL": "model:\n  n_heads: \0",
    "20,000 keys": "\n".join(f"a{i}:" for i in range(10_001)),
    "too large": "# " + "x" * 70_000,
    "model is a number": "model: 4",
    "model is a list": "model: [4]",
    "no head count": MODEL,
    "zero heads": MODEL + "  n_heads: 0",
    "negative heads": MODEL + "  n_heads: -4",
    "heads that do not divide": MODEL + "  n_heads: 5",
    "heads of an odd size": MODEL + "  n_heads: 64",
    "10^400 heads": MODEL + "  n_heads: 1" + "0" * 400,
    "10^5000 heads": MODEL + "  n_heads: 1" + "0" * 5000,
    "half a head": MODEL + "  n_heads: 4.5",
    "NaN heads": MODEL + "  n_heads: .nan",
    "heads in words": MODEL + "  n_heads: four",
    "a list of heads": MODEL + "  n_heads: [4]",
    "true heads": MODEL + "  n_heads: yes",
    "huge dim": "model:\n  dim: 100000000000000000000\n  n_heads: 4",
    "negative layers": "model:\n  n_layers: -1\n  n_heads: 4",
    "NaN theta": "model:\n  n_heads: 4\n  rope_theta: .nan",
    "infinite theta": "model:\n  n_heads: 4\n  rope_theta: .inf",
    "negative theta": "model:\n  n_heads: 4\n  rope_theta: -1",
    "10^400 theta": "model:\n  n_heads: 4\n  rope_theta: 1" + "0" * 400,
    "NaN eps": MODEL + "  n_heads: 4\n  norm_eps: .nan",
    "huge eps": MODEL + "  n_heads: 4\n  norm_eps: 1e30",
    "no context": MODEL + "  n_heads: 4\n  max_seq_len: 0",
    "endless context": MODEL + "  n_heads: 4\n  max_seq_len: 1000000000000",
    "a list for a context": MODEL + "  n_heads: 4\n  max_seq_len: [1]",
    "a window": MODEL + "  n_heads: 4\n  sliding_window: 4096",
    "experts": MODEL + "  n_heads: 4\n  moe: {num_experts: 8}",
    "another activation": MODEL + "  n_heads: 4\n  activation: gelu",
    "another family": MODEL + "  n_heads: 4\n  model_type: gpt2",
    "paths in a list": MODEL + "  n_heads: 4\npaths: [a]",
    "a path that is a number": MODEL + "  n_heads: 4\npaths:\n  tokenizer_dir: 5",
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_configs_are_rejected_quickly(name: str, family: Saved, tmp_path: Path) -> None:
    path = tmp_path / "absurd.yaml"
    path.write_text(ABSURD[name])
    times = []
    for _ in range(3):  # the machine may be busy during one of them
        began = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            read(family.path, config=path)
        times.append(time.process_time() - began)
    assert min(times) < 0.05
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "absurd.yaml" in str(caught.value)


def test_absurd_json_configs_are_rejected_quickly(family: Saved, tmp_path: Path) -> None:
    for text in (
        "",
        "[]",
        "[" * 100_000,
        '{"n_heads": 1' + "0" * 5000 + "}",
        '{"n_heads": NaN}',
        '{"dim": 1e400}',
        "{}",
    ):
        path = tmp_path / "absurd.json"
        path.write_text(text)
        began = time.process_time()
        with pytest.raises(CheckpointError, match=r"absurd\.json"):
            read(family.path, config=path)
        assert time.process_time() - began < 0.2


def test_common_yaml_number_notations_are_read(family: Saved, tmp_path: Path) -> None:
    path = tmp_path / "written.yaml"
    path.write_text(
        "# a comment\nmodel: {dim: 64, n_heads: 4,\n  rope_theta: 5e4, norm_eps: 1e-5, vocab_size: 0_331}\nother: ~\n"
    )
    config = read(family.path, config=path, tokenizer=family.folder / "tokenizer").config
    assert (config.norm_eps, config.ropes[0].theta) == (1e-5, 50_000.0)
    with pytest.raises(CheckpointError, match=r"no such file"):
        read(family.path, config=tmp_path / "missing.yaml")
    with pytest.raises(CheckpointError, match=r"give a \.yaml, \.yml or \.json file"):
        read(family.path, config=family.path)


# ---- tokenizer


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ByteLevelBPETokenizer:
    """Return the tokenizer as built by its library, without special tokens."""
    folder = tmp_path_factory.mktemp("library")
    original.save_tokenizer(folder)
    return ByteLevelBPETokenizer.from_file(str(folder / "family-vocab.json"), str(folder / "family-merges.txt"))


def runtime_tokenizer(checkpoint: Checkpoint, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(checkpoint.tokenizer.tokenizer_json, encoding="utf-8")
    return Tokenizer.from_files(path, checkpoint.tokenizer.tokenizer_config, checkpoint.tokenizer.chat_template)


def test_text_is_tokenized_like_the_library(family: Saved, library: ByteLevelBPETokenizer, tmp_path: Path) -> None:
    made = runtime_tokenizer(read(family.path), tmp_path)
    for text in (*tiny.TEXT.splitlines(), " two  spaces", "\n\n\ttabs\r\n", "x=5 12345", "🙂🙃 é", "", "it's we'll"):
        ids = library.encode(text).ids
        assert made.encode(text) == ids
        assert made.decode(ids) == text == library.decode(ids)
    assert made.special_ids == {PADDING, QUESTION_END, ANSWER_END, THINK_START, THINK_END}
    assert made.token_text(QUESTION_END) == "<|question_end|>"
    assert QUESTION_END not in made.encode("a text that spells <|question_end|>")


def test_the_tokenizer_is_found_in_documented_places(family: Saved, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "checkpoints" / "run1").mkdir(parents=True)
    weights = project / "checkpoints" / "run1" / "model.pt"
    shutil.copy(family.path, weights)
    (project / "configs").mkdir()
    config = project / "configs" / "config.yaml"
    shutil.copy(family.folder / "config.yaml", config)
    options = {"config": config}
    with pytest.raises(CheckpointError, match=r"tokenizer_dir: tokenizer.*do not exist.*--tokenizer"):
        read(weights, **options)
    files = family.folder / "tokenizer"
    for place in (project / "tokenizer", project / "configs" / "tokenizer", project / "checkpoints" / "tokenizer"):
        shutil.copytree(files, place)  # above the config, beside it, and above the checkpoint
        assert read(weights, **options).tokenizer.chat_template
        shutil.rmtree(place)
    shutil.copytree(files, tmp_path / "elsewhere")
    vocab = tmp_path / "elsewhere" / "family-vocab.json"
    for given in (tmp_path / "elsewhere", vocab, vocab.with_name("family-merges.txt")):
        assert read(weights, **options, tokenizer=given).tokenizer.chat_template
    paths = {"tokenizer_dir": str(tmp_path / "elsewhere")}  # a folder name alone, and an absolute path on this machine
    original.write_config(config, family.model.shape, paths=paths)
    assert read(weights, **options).tokenizer.chat_template
    original.write_config(config, family.model.shape, paths={"vocab_file": "\0", "merges_file": "x" * 5000})
    shutil.copytree(files, weights.parent, dirs_exist_ok=True)  # beside the checkpoint
    assert read(weights, **options).tokenizer.chat_template
    shutil.copy(vocab, weights.with_name("other-vocab.json"))
    shutil.copy(vocab.with_name("family-merges.txt"), weights.with_name("other-merges.txt"))
    with pytest.raises(CheckpointError, match=r"has 2 tokenizers.*--tokenizer FILE"):
        read(weights, **options)


def test_unusable_tokenizers_are_errors(family: Saved, bare: Path) -> None:
    vocab, merges = bare.with_name("family-vocab.json"), bare.with_name("family-merges.txt")
    content = json.loads(vocab.read_text())

    def attempt(message: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            read(bare, config=family.folder / "config.yaml", **options)

    options = {"tokenizer": bare.parent}
    merges_text = merges.read_text()
    for line in ("a", "a b c", "quite unknown"):
        merges.write_text(merges_text + line + "\n")
        attempt(r"family-merges.txt: line \d+ does not join two tokens", **options)
    merges.write_text(merges_text)
    for broken in ({**content, "x": -1}, {**content, "x": "1"}, {**content, "x": 10**400}, {**content, "x": 1.5}):
        vocab.write_text(json.dumps(broken))
        attempt("family-vocab.json: not a vocabulary", **options)
    vocab.write_text(json.dumps({**content, "once more": 1}))
    attempt("have the same id", **options)
    vocab.write_text(json.dumps({**content, "\ud800": 321}))
    attempt("unpaired surrogate", **options)
    vocab.write_text(json.dumps({"hello": 0}))
    merges.write_text("")
    attempt("not the vocabulary of a byte-level BPE", **options)
    vocab.unlink()
    attempt("has no tokenizer", **options)
    (bare.parent / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    attempt("tokenizer.model: is not a SentencePiece model, or truncated: .*tokenizer.json", **options)
    attempt("SentencePiece", tokenizer=bare.parent / "tokenizer.model")
    (bare.parent / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer in its folder: give --tokenizer"):
        read(bare, n_heads=4, rope_theta=10_000.0)
    attempt("no such file or folder", tokenizer=bare.parent / "nothing")
    (bare.parent / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    attempt("invalid tokenizer: no vocabulary", **options)
    for added in ([1], {"a": 1}, None, 5):
        entries = [{"id": 0, "content": added}]
        spec = {"added_tokens": entries, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        (bare.parent / "tokenizer.json").write_text(json.dumps(spec))
        attempt("an entry of added_tokens has no content", **options)
    for entry in ([[1], 0], [{}, 0], [None, 0], [], "a", 5):
        spec = {"model": {"type": "Unigram", "vocab": [["a", 0], entry]}}
        (bare.parent / "tokenizer.json").write_text(json.dumps(spec))
        attempt("a vocabulary entry is not a token", **options)


def test_plain_checkpoints_keep_the_settings_of_their_tokenizer(family: Saved, bare: Path, tmp_path: Path) -> None:
    """Like Meta's models: a Hugging Face tokenizer beside the weights, and no `tokens:`."""
    folder = tiny.save_checkpoint(tmp_path / "hf")
    (folder / "generation_config.json").unlink()
    options = {"n_heads": 4, "rope_theta": 10_000.0, "tokenizer": folder}
    checkpoint = read(bare, **options)
    assert checkpoint.tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert checkpoint.tokenizer.tokenizer_json == (folder / "tokenizer.json").read_text()
    assert (checkpoint.reasoning, checkpoint.guards) == (None, None)
    assert checkpoint.generation == {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    assert checkpoint.tokenizer.eos_token_ids == (2,)


def test_without_control_tokens_there_is_no_chat_template(bare: Path, tmp_path: Path) -> None:
    original.save_tokenizer(tmp_path / "plain", control=("<s>", "<pad>", "</s>"))
    checkpoint = read(bare, n_heads=4, rope_theta=50_000.0, tokenizer=tmp_path / "plain")
    assert checkpoint.tokenizer.chat_template is None
    assert (checkpoint.generation, checkpoint.reasoning) == ({}, None)
    known = read(bare, n_heads=4, rope_theta=50_000.0)  # those of the family are known
    assert known.tokenizer.chat_template is not None
    assert known.reasoning == ReasoningTokens(THINK_START, THINK_END)


# ---- control tokens and sampling


def test_control_tokens_are_found_by_common_names(family: Saved, tmp_path: Path) -> None:
    path = tmp_path / "named.yaml"
    for tokens in (
        {"pad": 0, "question_end_id": 1, "answer_end_token": 2, "think_start_token_id": 7, "THINK_END": 8},
        {"PAD_ID": 0, "eoq": 1, "eoa": 2, "thinking-start": 7, "thinking-end": 8, "unknown": 3},
        {"question_end": "<|question_end|>", "think_end": "<|think_end|>"},
        {},
    ):
        original.write_config(path, family.model.shape, tokens=tokens)
        checkpoint = read(family.path, config=path, tokenizer=family.folder / "tokenizer")
        assert checkpoint.reasoning == ReasoningTokens(THINK_START, THINK_END)
        assert (checkpoint.tokenizer.eos_token_ids, checkpoint.tokenizer.pad_token_id) == ((ANSWER_END,), PADDING)
        assert "<|question_end|>" in (checkpoint.tokenizer.chat_template or "")
    original.write_config(path, family.model.shape, tokens={"answer_end": 5, "think_start": 3, "think_end": 4})
    checkpoint = read(family.path, config=path, tokenizer=family.folder / "tokenizer")
    assert checkpoint.reasoning == ReasoningTokens(3, 4)
    assert checkpoint.generation["eos_token_id"] == [5]
    assert checkpoint.tokenizer.special_tokens_map == {"eos_token": "<|reserved_5|>", "pad_token": "<|padding|>"}


def test_invalid_control_tokens_are_errors(refused: Callable[..., str]) -> None:
    for tokens, message in (
        ({"answer_end": 1}, "question_end and answer_end are both token 1"),
        ({"answer_end": 5000}, "answer_end is 5000, which is not a token of"),
        ({"answer_end": -1}, "answer_end is -1, which is not a token of"),
        ({"answer_end": 2.5}, "answer_end is 2.5, which is not a token of"),
        ({"answer_end": [2]}, "answer_end is [2], which is not a token of"),
        ({"answer_end": True}, "answer_end is True, which is not a token of"),
        ({"answer_end": None}, "answer_end is None, which is not a token of"),
        ({"answer_end": "<eos>"}, "answer_end is '<eos>', which is not a token of"),
        ({"answer_end": 10**400}, "answer_end is an integer of 1329 bits, which is not a token of"),
        ({"answer_end": 20}, "which is an ordinary text token"),
        ({"answer_end": 2, "eoa": 3}, "second id for the token answer_end"),
        ({"think_start": 7, "think_end": None}, "must both be set"),
        ({"padding": 0, "question_finish": 1, "answer_end": 2}, "no key for the token question_end"),
    ):
        assert message in refused(tokens=tokens)
    assert "tokens is not an object" in refused("tokens: [1, 2]\n" + MODEL + "  n_heads: 4\n")


def test_sampling_parameters_of_the_config_are_read(family: Saved, tmp_path: Path, refused: Callable[..., str]) -> None:
    ends = {"eos_token_id": [ANSWER_END], "pad_token_id": PADDING}
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    own["repetition_window"] = 64
    checkpoint = read(family.path)
    assert checkpoint.generation == {**own, "max_new_tokens": 100, **ends}
    assert checkpoint.guards == Guards(max_newlines=3, single_think_end=True)
    path = tmp_path / "sampling.yaml"

    def sampled(generation: dict[str, Any] | None) -> Checkpoint:
        original.write_config(path, family.model.shape, generation=generation)
        return read(family.path, config=path, tokenizer=family.folder / "tokenizer")

    assert sampled(None).generation == checkpoint.generation
    given = {
        "temperature": 1,
        "top_k": 0,
        "penalty_window": 128,
        "max_new_tokens": 7,
        "max_length": 9,
        "max_newlines": 0,
    }
    made = sampled(given)
    assert made.generation == {
        **own,
        "temperature": 1,
        "top_k": 0,
        "repetition_window": 128,
        "max_new_tokens": 7,
        **ends,
    }
    assert made.guards == Guards(max_newlines=None, single_think_end=True)
    greedy = sampled({"temperature": 0.0})
    penalty = {"repetition_penalty": 1.1, "repetition_window": 64}
    assert greedy.generation == {"do_sample": False, **penalty, "max_new_tokens": 100, **ends}
    for key, value in (
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("max_length", 0),
        ("max_length", "many"),
        ("do_sample", 3),
        ("max_newlines", [1]),
    ):
        text = MODEL + f"  n_heads: 4\ngeneration:\n  {key}: {'.nan' if value != value else json.dumps(value)}\n"
        assert f"generation: {key} is " in refused(text)


# ---- conversations


@pytest.fixture(scope="module")
def chat(family: Saved, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return runtime_tokenizer(read(family.path), tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def hugging_face(family: Saved, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    assets = read(family.path).tokenizer
    folder = tmp_path_factory.mktemp("transformers")
    (folder / "tokenizer.json").write_text(assets.tokenizer_json, encoding="utf-8")
    config = {**assets.tokenizer_config, "chat_template": assets.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


Q1, Q2 = "What is the capital\nof France? ", " And 你好?"
A1, REASONING = "\nParis, of  course!", "The user asked an assistant.\n"
FULL = f"<|think_start|>{REASONING}<|think_end|>{A1}"
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[Any]]] = {
    "a question": ([say("user", Q1)], {}, [Q1, 1, 7]),
    "without reasoning": ([say("user", Q1)], {"enable_thinking": False}, [Q1, 1]),
    "with reasoning": ([say("user", Q1)], {"enable_thinking": True}, [Q1, 1, 7]),
    "no prompt": ([say("user", Q1)], {"add_generation_prompt": False}, [Q1, 1]),
    "two turns": ([say("user", Q1), say("assistant", A1), say("user", Q2)], {}, [Q1, 1, A1, 2, Q2, 1, 7]),
    "reasoning in a field": (
        [say("user", Q1), say("assistant", A1, reasoning_content=REASONING), say("user", Q2)],
        {},
        [Q1, 1, A1, 2, Q2, 1, 7],
    ),
    "three turns": (
        [say("user", Q1), say("assistant", A1), say("user", Q2), say("assistant", Q1), say("user", A1)],
        {"enable_thinking": False},
        [Q1, 1, A1, 2, Q2, 1, Q1, 2, A1, 1],
    ),
    "a system message": ([say("system", "Be kind. "), say("user", Q1)], {}, ["Be kind. " + Q1, 1, 7]),
    "parts": (
        [say("user", [{"type": "text", "text": "Who "}, {"type": "text", "text": "asked?"}])],
        {},
        ["Who asked?", 1, 7],
    ),
    "an answer for training": (
        [say("user", Q1), say("assistant", A1, reasoning_content=REASONING)],
        {"add_generation_prompt": False},
        [Q1, 1, 7, REASONING, 8, A1, 2],
    ),
    "a plain answer for training": (
        [say("user", Q1), say("assistant", A1)],
        {"add_generation_prompt": False},
        [Q1, 1, A1, 2],
    ),
    "nothing said": ([say("user", ""), say("assistant", ""), say("user", "")], {}, [1, 2, 1, 7]),
}
# Content that spells reasoning tags: transformers parses the tokens in it, the runtime uses `separate_reasoning`.
SPELLED = {
    "an earlier answer": ([say("user", Q1), say("assistant", FULL), say("user", Q2)], {}, [Q1, 1, A1, 2, Q2, 1, 7]),
    "ended twice": (
        [say("user", Q1), say("assistant", f"{REASONING}<|think_end|>{Q2}<|think_end|>{A1}"), say("user", Q2)],
        {},
        [Q1, 1, A1, 2, Q2, 1, 7],
    ),
    "the last answer": (
        [say("user", Q1), say("assistant", FULL)],
        {"add_generation_prompt": False},
        [Q1, 1, 7, REASONING, 8, A1, 2],
    ),
    "without its start": (
        [say("user", Q1), say("assistant", FULL.removeprefix("<|think_start|>"))],
        {"add_generation_prompt": False},
        [Q1, 1, 7, REASONING, 8, A1, 2],
    ),
}


def by_hand(parts: list[Any], library: ByteLevelBPETokenizer) -> list[int]:
    """Return the ids of texts and control tokens, each encoded separately."""
    return [index for part in parts for index in ([part] if isinstance(part, int) else library.encode(part).ids)]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_match_token_for_token(
    name: str, chat: Tokenizer, hugging_face: PreTrainedTokenizerFast, library: ByteLevelBPETokenizer
) -> None:
    messages, variables, parts = CONVERSATIONS[name]
    wanted = by_hand(parts, library)
    assert chat.encode_chat(messages, **variables) == wanted
    variables = {"add_generation_prompt": True, **variables}
    assert hugging_face.apply_chat_template(messages, return_dict=False, **variables) == wanted


@pytest.mark.parametrize("name", SPELLED)
def test_reasoning_spelled_in_an_answer_is_separated(
    name: str, chat: Tokenizer, hugging_face: PreTrainedTokenizerFast, library: ByteLevelBPETokenizer
) -> None:
    messages, variables, parts = SPELLED[name]
    wanted = by_hand(parts, library)
    given = {"add_generation_prompt": True, **variables}
    assert hugging_face.apply_chat_template(messages, return_dict=False, **given) == wanted
    if variables:
        return  # `separate_reasoning` trims white space around the tags, which training data keeps
    split = separate_reasoning(messages, CONTROL[THINK_START], CONTROL[THINK_END])
    assert chat.encode_chat(split, **variables) == by_hand([A1.lstrip("\n") if p == A1 else p for p in parts], library)


def test_typed_control_tokens_stay_text(chat: Tokenizer, library: ByteLevelBPETokenizer) -> None:
    ids = chat.encode_chat([say("user", "a<|question_end|><|think_end|>b"), say("user", "<|answer_end")])
    assert [index for index in ids if index in chat.special_ids] == [1, 1, 7]
    assert chat.decode(ids) == "a<|question_end|><|think_end|>b<|answer_end"


def test_unsupported_conversations_are_errors(chat: Tokenizer) -> None:
    for messages, why in (
        ([say("tool", "4")], "no role tool; it knows system, user and assistant"),
        ([say("user", Q1), say("system", "Be kind.")], "a system message can only be the first"),
        ([say("user", [{"type": "image", "image": "x"}])], "reads text only, not image"),
    ):
        with pytest.raises(TemplateError, match=why):
            chat.encode_chat(messages)


def test_a_model_without_reasoning_tokens(family: Saved, library: ByteLevelBPETokenizer, tmp_path: Path) -> None:
    original.write_config(tmp_path / "c.yaml", family.model.shape, tokens={"think_start": None, "think_end": None})
    checkpoint = read(family.path, config=tmp_path / "c.yaml", tokenizer=family.folder / "tokenizer")
    assert checkpoint.reasoning is None
    assert checkpoint.guards == Guards(max_newlines=3, single_think_end=False)
    made = runtime_tokenizer(checkpoint, tmp_path)
    messages = [say("user", Q1), say("assistant", A1, reasoning_content=REASONING), say("user", Q2)]
    assert made.encode_chat(messages) == by_hand([Q1, 1, A1, 2, Q2, 1], library)


def test_control_tokens_may_have_any_text(family: Saved, tmp_path: Path) -> None:
    odd = ("p'", "\\q{{ x }}", 'a"%}', "r3", "r4", "r5", "r6", "<▁think▁>", "🙂 end")
    original.save_tokenizer(tmp_path / "odd", control=odd)
    checkpoint = read(family.path, tokenizer=tmp_path / "odd")
    made = runtime_tokenizer(checkpoint, tmp_path)
    assert made.encode_chat([say("user", ""), say("assistant", "", reasoning_content="x"), say("user", "")]) == [
        1,
        2,
        1,
        7,
    ]
    tokens = {"question_end": "\\q{{ x }}"}
    original.write_config(tmp_path / "c.yaml", family.model.shape, tokens=tokens)
    assert read(family.path, config=tmp_path / "c.yaml", tokenizer=tmp_path / "odd").reasoning is not None


def test_a_tokenizer_json_gets_the_chat_template_of_the_family(
    family: Saved, library: ByteLevelBPETokenizer, tmp_path: Path
) -> None:
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "something else"}))
    checkpoint = read(family.path, tokenizer=tmp_path)
    made = runtime_tokenizer(checkpoint, tmp_path)
    assert made.special_ids == {PADDING, QUESTION_END, ANSWER_END, THINK_START, THINK_END}
    assert made.encode_chat([say("user", Q1)]) == by_hand([Q1, 1, 7], library)


# ---- end to end


@pytest.fixture(scope="module")
def bundle(family: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "family"
    export(str(family.path), ExportOptions(folder, precision="fp32", validate=False))
    return folder


def test_the_bundle_answers_like_the_original(family: Saved, bundle: Path) -> None:
    model = Model.load(bundle)
    prompt = model.encode_chat([say("user", Q1)])
    params = SamplingParams(temperature=0, max_tokens=256)
    tokens = model.generate(prompt, params).result().tokens
    assert len(tokens) == 256
    assert len(set(tokens)) > 20
    # Each token is the original's choice after the previous ones, so the whole answer is the original's.
    chosen = family.model(torch.tensor([[*prompt, *tokens]]))[0].argmax(-1)
    assert chosen[len(prompt) - 1 : -1].tolist() == list(tokens)


def test_the_bundle_describes_the_model(bundle: Path) -> None:
    model = Model.load(bundle)
    assert model.bundle.reasoning == ReasoningTokens(THINK_START, THINK_END)
    params = model.default_params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.9, 50, 1.1)
    assert (params.max_tokens, params.max_newlines, params.single_think_end) == (100, 3, True)


def test_transformers_reads_the_config(family: Saved, bundle: Path) -> None:
    """The Llama of transformers computes the same with the weights in its order."""
    config = LlamaConfig.from_pretrained(bundle)
    theirs = LlamaForCausalLM(config).eval()
    ours = decoder(read(family.path))
    state = {name: value for name, value in ours.state_dict().items() if not name.startswith(("layers", "lm_head"))}
    state = {f"model.{name}": value for name, value in state.items()} | {"lm_head.weight": ours.lm_head.weight}
    for i, layer in enumerate(ours.layers):
        here, sizes = f"model.layers.{i}.", [64, 32, 32]
        for name, part in zip("qkv", layer.attention.qkv.weight.split(sizes), strict=True):
            state[f"{here}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), layer.mlp.gate_up.weight.chunk(2), strict=True):
            state[f"{here}mlp.{name}_proj.weight"] = part
        state[f"{here}self_attn.o_proj.weight"] = layer.attention.output.weight
        state[f"{here}mlp.down_proj.weight"] = layer.mlp.down.weight
        state[f"{here}input_layernorm.weight"] = layer.attention_norm.weight
        state[f"{here}post_attention_layernorm.weight"] = layer.mlp_norm.weight
    theirs.load_state_dict(state)
    tokens = some_tokens(1, 50)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, family.model(tokens), rtol=0, atol=1e-4)


# ---- wrapped models


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "net.model.",
        "module._orig_mod.",
        "_fsdp_wrapped_module._fpw_module.",
        "model._orig_mod.",
        "model.module.",
        "base_model.model.",
    ],
)
@pytest.mark.parametrize("key", ["state_dict", "module", "ema", "anything"])
def test_wrapped_models_are_read(family: Saved, tmp_path: Path, prefix: str, key: str) -> None:
    folder = Path(shutil.copytree(family.folder, tmp_path / "wrapped"))
    tensors = {f"{prefix}{name}": tensor for name, tensor in torch.load(family.path).items()}
    torch.save({key: tensors | {"loss.weight": torch.ones(2)}, "epoch": 3}, folder / family.path.name)
    if prefix.split(".")[0] in ("module", "_fsdp_wrapped_module"):  # then every name has it
        torch.save({key: tensors, "epoch": 3}, folder / family.path.name)
    checkpoint = opened(folder / family.path.name)
    agree(family, checkpoint)
    if prefix == "net.model.":
        assert checkpoint.notes == (
            "the model is read from the module net.model; 1 tensors outside of it are left out, such as loss.weight",
        )


def test_two_wrapped_models_are_ambiguous(family: Saved, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family.folder, tmp_path / "wrapped"))
    tensors = torch.load(family.path)
    both = {f"{part}.{name}": tensor for part in ("ema", "model") for name, tensor in tensors.items()}
    torch.save(both, folder / family.path.name)
    with pytest.raises(CheckpointError, match=r"several models, with tensors in 'ema\.' and 'model\.'"):
        opened(folder / family.path.name)


def test_a_tied_weight_may_be_stored_as_the_head(tmp_path: Path) -> None:
    saved = save_family(tmp_path / "tied", tied=True)
    tensors = torch.load(saved.path)
    tensors["output.weight"] = tensors.pop("tok_embeddings.weight")
    torch.save(tensors, saved.path)
    config = saved.folder / "config.yaml"
    config.write_text(config.read_text().replace("model:\n", "model:\n  tie_word_embeddings: true\n"))
    agree(saved, opened(saved.path, config=config, tokenizer=saved.folder / "tokenizer"))
