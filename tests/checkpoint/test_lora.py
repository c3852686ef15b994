"""LoRA adapters: merging matches peft; incompatible adapters are rejected with a one-line error."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm_edge.checkpoint.lora.adapter import Adapter, open_adapter
from llm_edge.runtime.errors import CheckpointError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# peft warns about embeddings and about GPT-2's transposed weights
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "lm_head.weight"


def llama(*, attention_bias: bool = False, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,  # q_proj and o_proj are square
        num_key_value_heads=2,
        attention_bias=attention_bias,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).eval()


def adapt(model: PreTrainedModel, folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter of a model with peft, and return the model merged by peft."""
    asked = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**asked))
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:  # peft initializes B with zeros, and copies with the original values
            noise = torch.randn_like(weight) * 0.1
            weight.data = weight.data + noise.abs() if "magnitude" in name else noise
    adapted.save_pretrained(folder)
    return {name: weight.clone() for name, weight in adapted.merge_and_unload().state_dict().items()}


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in tensors.items()}


def merge(adapter: Adapter, base: Mapping[str, torch.Tensor], **known: Any) -> dict[str, torch.Tensor]:
    load = adapter.wrap(shapes(base), base.__getitem__, **known)
    return {name: load(name) for name in base}


def check(model: Callable[[], PreTrainedModel], folder: Path, changed: int, **config: Any) -> None:
    """Check that merging an adapter matches peft and changes this many tensors."""
    theirs = adapt(model(), folder, **config)
    base = state(model())
    ours = merge(open_adapter(folder), base)
    assert ours.keys() == theirs.keys()
    moved = 0
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=name)
        moved += not torch.equal(theirs[name], base[name])
        if torch.equal(theirs[name], base[name]):
            assert ours[name] is base[name], name
    assert moved == changed


# ---- adapters saved by peft

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ATTENTION, "use_rslora": True, "r": 9, "lora_alpha": 3}, 8),
        ({"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5, "init_lora_weights": "gaussian"}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, 4),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, 9),
        ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, 3),
        ({"target_modules": ATTENTION, "use_dora": True, "use_rslora": True}, 8),
    ],
    ids=["some", "all", "rslora", "gaussian", "layer", "embedding", "saved", "dora-embedding", "dora"],
)
def test_merging_into_llama_matches_peft(tmp_path: Path, config: dict[str, Any], changed: int) -> None:
    check(llama, tmp_path / "adapter", changed, **config)


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"q_proj": 2, "v_proj": 8}, "alpha_pattern": {"v_proj": 64}},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}, "alpha_pattern": {r"layers\.1\..*\.v_proj": 5}},
        {"alpha_pattern": {r"layers\.[0-9]+\.self_attn\.q_proj": 30, "q_proj": 1, "(?:k|v)_proj": 7}},
        {"alpha_pattern": {"proj": 99, "^q_proj": 98, "1.self_attn.q_pro": 97, "attn.q_proj": 96}},  # none matches
    ],
    ids=["names", "paths", "expressions", "no match"],
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_alpha_patterns_match_peft(tmp_path: Path, patterns: dict[str, Any], use_rslora: bool) -> None:
    check(llama, tmp_path, 4, target_modules=["q_proj", "v_proj"], use_rslora=use_rslora, **patterns)


@pytest.mark.parametrize(("bias", "changed"), [("none", 4), ("all", 4 + 8), ("lora_only", 4 + 4)])
def test_trained_biases_are_merged(tmp_path: Path, bias: str, changed: int) -> None:
    check(lambda: llama(attention_bias=True), tmp_path, changed, target_modules=["q_proj", "v_proj"], bias=bias)


def test_a_bias_of_lora_b_is_merged(tmp_path: Path) -> None:
    check(
        lambda: llama(attention_bias=True),
        tmp_path,
        8,
        target_modules=["q_proj", "v_proj"],
        lora_bias=True,
        alpha_pattern={"v_proj": 3},
    )


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"target_modules": ["c_attn"], "fan_in_fan_out": True}, 2),
        ({"target_modules": ["c_attn", "c_proj", "c_fc"]}, 8),  # attn.c_proj is square
        ({"target_modules": ["c_attn", "c_proj"], "use_dora": True}, 6),
        ({"target_modules": ["wte", "wpe", "c_attn"]}, 4),
        ({"target_modules": ["c_fc", "c_attn"], "lora_bias": True}, 8),
        ({"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]}, 5),
    ],
    ids=["attention", "square", "dora", "embeddings", "bias of b", "saved"],
)
def test_merging_into_gpt2_matches_peft(tmp_path: Path, config: dict[str, Any], changed: int) -> None:
    check(gpt2, tmp_path, changed, **config)


def test_the_layout_of_a_square_weight_is_determined(tmp_path: Path) -> None:
    """If an adapter has both layouts, peft's config describes that of the last layer."""
    theirs = adapt(gpt2(), tmp_path, target_modules=["c_proj", "lm_head"])
    base = state(gpt2())
    adapter = open_adapter(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"] is False
    with pytest.raises(CheckpointError, match=r"fan_in_fan_out.*square transformer\.h\.0\.attn\.c_proj\.weight"):
        adapter.wrap(shapes(base), base.__getitem__)
    ours = merge(adapter, base, transposed=lambda name: ".c_" in name)
    for name in base:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=name)
    with pytest.raises(CheckpointError, match=r"mlp\.c_proj"):
        adapter.wrap(shapes(base), base.__getitem__, transposed=lambda _: False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `llama()`; read-only."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    adapt(llama(), folder, target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may damage."""
    return shutil.copytree(saved, tmp_path / "damaged")


def test_adapter_name_base_and_files_are_read(saved: Path, damaged: Path) -> None:
    adapter = open_adapter(saved)
    assert adapter.name == "mine"
    assert [file.name for file in adapter.files] == [CONFIG, WEIGHTS]
    assert adapter.files[1].size == (saved / WEIGHTS).stat().st_size
    assert len(adapter.files[1].sha256) == 64
    edit(damaged, base_model_name_or_path="owner/base")
    assert open_adapter(damaged).base_model == "owner/base"
    assert open_adapter(damaged, "owner/adapter").name == "owner/adapter"
    for odd in (None, "", 3, "a\nb", "x" * 1000):
        edit(damaged, base_model_name_or_path=odd)
        assert open_adapter(damaged).base_model is None


def test_half_precision_adapters_are_merged_in_float32(saved: Path, damaged: Path) -> None:
    edit_weights(damaged, lambda it: it.update({name: weight.bfloat16() for name, weight in it.items()}))
    adapter = open_adapter(damaged)
    base = {name: weight.bfloat16() for name, weight in state(llama()).items()}
    tensors = load_file(damaged / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    ours = merge(adapter, base)
    expected = base[name].double() + 2.5 * tensors[f"{Q_PROJ}.lora_B.weight"].double() @ (
        tensors[f"{Q_PROJ}.lora_A.weight"].double()
    )
    assert ours[name].dtype == torch.float32
    torch.testing.assert_close(ours[name].double(), expected, atol=1e-6, rtol=0)
    assert ours["model.norm.weight"].dtype == torch.bfloat16


def test_a_file_of_torch_save_is_read(saved: Path, damaged: Path) -> None:
    torch.save(load_file(saved / WEIGHTS), damaged / "adapter_model.bin")
    (damaged / WEIGHTS).unlink()
    base = state(llama())
    ours, expected = merge(open_adapter(damaged), base), merge(open_adapter(saved), base)
    assert all(torch.equal(ours[name], expected[name]) for name in base)
    assert open_adapter(damaged).files[1].name == "adapter_model.bin"


def test_tensors_are_read_lazily_and_the_base_is_unchanged(saved: Path) -> None:
    base, asked = state(llama()), list[str]()

    def load(name: str) -> torch.Tensor:
        asked.append(name)
        return base[name]

    before = {name: weight.clone() for name, weight in base.items()}
    merged = open_adapter(saved).wrap(shapes(base), load)
    assert asked == []
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(merged(name), merged(name))
    assert asked == [name, name]
    assert all(torch.equal(base[name], before[name]) for name in base)


@pytest.mark.parametrize("bare", [False, True])
def test_a_base_without_the_outer_module_prefix(tmp_path: Path, bare: bool) -> None:
    theirs = adapt(gpt2(), tmp_path, target_modules=["c_attn"])
    base = state(gpt2())
    if bare:  # as in GPT-2's published files
        base = {name.removeprefix("transformer."): weight for name, weight in base.items()}
    ours = merge(open_adapter(tmp_path), base)
    for name, weight in theirs.items():
        own = name.removeprefix("transformer.") if bare else name
        torch.testing.assert_close(ours[own], weight, atol=1e-6, rtol=0, msg=name)


def test_an_adapter_without_the_outer_module_prefix(saved: Path, damaged: Path) -> None:
    edit(damaged, modules_to_save=["norm"])
    edit_weights(damaged, rename=lambda name: name.replace("base_model.model.model.", "base_model.model."))
    base = state(llama())
    ours, expected = merge(open_adapter(damaged), base), merge(open_adapter(saved), base)
    assert all(torch.equal(ours[name], expected[name]) for name in base)


# ---- errors


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(content))


def edit_weights(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    tensors = {rename(name): weight for name, weight in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, *words: str, base: Mapping[str, torch.Tensor] | None = None, **known: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder) if base is None else merge(open_adapter(folder), base, **known)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in (str(folder), *words):
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'"]),
        ({"peft_type": None}, ["peft_type"]),
        ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens", "some tokens"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"target_parameters": ["experts.gate_up_proj"]}, ["target_parameters"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
        ({"megatron_config": {"a": 1}}, ["megatron_config"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"something_of_tomorrow": 1}, ["something_of_tomorrow", "unknown"]),
        ({"x" * 1000: 1}, ["xxx"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights", "pissa_niter_4"]),
        ({"init_lora_weights": 1}, ["init_lora_weights"]),
        ({"init_lora_weights": ["loftq"]}, ["init_lora_weights"]),
        ({"bias": "some"}, ["bias is 'some'"]),
        ({"bias": ["all"]}, ["bias is"]),
        ({"r": 0}, ["'r' is 0"]),
        ({"r": "8"}, ["'r' is '8'"]),
        ({"r": True}, ["'r' is True"]),
        ({"r": 10**30}, ["'r' is 1000"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"lora_alpha": 10**400}, ["lora_alpha"]),
        ({"use_rslora": "yes"}, ["use_rslora"]),
        ({"use_dora": True}, ["no lora_magnitude_vector", "use_dora"]),
        ({"fan_in_fan_out": 1}, ["fan_in_fan_out"]),
        ({"modules_to_save": "norm"}, ["modules_to_save"]),
        ({"modules_to_save": [["norm"]]}, ["modules_to_save"]),
        ({"modules_to_save": ["a\nb" * 300]}, ["modules_to_save", "a\\nb"]),
        ({"modules_to_save": ["norm", "lm_head"]}, ["modules_to_save", "lm_head"]),
        ({"rank_pattern": [1]}, ["rank_pattern"]),
        ({"rank_pattern": {"q_proj": 2.5}}, ["rank_pattern of q_proj", "2.5"]),
        ({"alpha_pattern": {"q_proj": "4"}}, ["alpha_pattern of q_proj", "'4'"]),
        ({"alpha_pattern": {"q_(proj": 4}}, ["alpha_pattern", "q_(proj", "not a regular expression"]),
        ({"alpha_pattern": {"[[a]q_proj": 4}}, ["alpha_pattern", "[[a]q_proj"]),
        ({"alpha_pattern": {"(.+)+q": 4}}, ["alpha_pattern", "(.+)+q", "too long to match"]),
        ({"alpha_pattern": {"(a|b+" + "\\\\)*": 4}}, ["alpha_pattern", "too long to match"]),
        ({"alpha_pattern": {".*.*.*.*.*x": 4}}, ["alpha_pattern", "too long to match"]),
        ({"alpha_pattern": {"(?=a)a": 4}}, ["alpha_pattern"]),
        ({"alpha_pattern": {f".*{n}": 4 for n in range(40)}}, ["alpha_pattern"]),
        ({"alpha_pattern": {str(n): 4 for n in range(5000)}}, ["alpha_pattern"]),
    ],
    ids=lambda value: next(iter(value))[:20] if isinstance(value, dict) else "",
)
def test_unsupported_configs_are_errors(damaged: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit(damaged, **changes)
    refused(damaged, *words)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "[" * 100_000])
def test_invalid_configs_are_errors(damaged: Path, content: str) -> None:
    (damaged / CONFIG).write_text(content)
    refused(damaged, CONFIG)


def test_unknown_keys_that_are_off_are_ignored(saved: Path, damaged: Path) -> None:
    edit(damaged, something_of_tomorrow=None, another=False, third=[], fourth={}, alpha_pattern=None, rank_pattern=None)
    base = state(llama())
    ours, expected = merge(open_adapter(damaged), base), merge(open_adapter(saved), base)
    assert all(torch.equal(ours[name], expected[name]) for name in base)


def test_patterns_are_matched_quickly(damaged: Path) -> None:
    """The slowest accepted patterns, on paths that almost match."""
    edit(damaged, alpha_pattern={f"{'.' * n}.*.*\\.q_prox": 3 for n in range(16)})
    edit_weights(damaged, rename=lambda name: name.replace(".self_attn.", f".{'.a' * 50}."))
    base = {name.replace(".self_attn.", f".{'.a' * 50}."): weight for name, weight in state(llama()).items()}
    start = time.monotonic()
    open_adapter(damaged).wrap(shapes(base), base.__getitem__)
    assert time.monotonic() - start < 5


def test_a_folder_without_an_adapter_is_an_error(damaged: Path) -> None:
    (damaged / WEIGHTS).unlink()
    refused(damaged, "no adapter_model.safetensors", "save_pretrained")
    (damaged / CONFIG).unlink()
    refused(damaged, "no adapter_config.json")


@pytest.mark.parametrize("keep", [0, 7, 8, 300, -1])
def test_a_truncated_file_is_an_error(damaged: Path, keep: int) -> None:
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[:keep])
    refused(damaged, WEIGHTS)


def test_a_hostile_header_size_is_an_error(damaged: Path) -> None:
    shape = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}
    header = json.dumps({f"{Q_PROJ}.lora_A.weight": shape}).encode()
    (damaged / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(damaged, WEIGHTS)
    (damaged / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + header)
    refused(damaged, WEIGHTS)


A, B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: it.clear(), ["no tensors"]),
        (lambda it: it.pop(B), ["layers.0.self_attn.q_proj", "invalid set of tensors: lora_A"]),
        (lambda it: it.pop(A), ["layers.0.self_attn.q_proj", "invalid set of tensors: lora_B"]),
        (lambda it: it.update({f"{Q_PROJ}.lora_A.default.weight": it.pop(A)}), ["lora_A.default", "unsupported"]),
        (lambda it: it.update({f"{Q_PROJ}.lora_diag": torch.ones(4)}), ["lora_diag", "unsupported"]),
        (lambda it: it.update({f"{Q_PROJ}.lora_embedding_A": torch.ones(4, 32)}), ["layers.0.self_attn.q_proj"]),
        (lambda it: it.update({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(32)}), ["lora_magnitude_vector"]),
        (lambda it: it.update({A.removeprefix("base_model.model."): it[A].clone()}), ["the same tensor"]),
        (lambda it: it.update({A: it[A].double()}), ["lora_A", "float64", "float32"]),
        (lambda it: it.update({f"{'x.' * 200}lora_A.weight": it[A].clone()}), ["x.x.x", "characters"]),
    ],
    ids=["empty", "no B", "no A", "named", "diag", "embedding", "magnitude", "twice", "double", "long"],
)
def test_inconsistent_adapter_tensors_are_errors(damaged: Path, change: Callable[[Any], Any], words: list[str]) -> None:
    edit(damaged, modules_to_save=None)
    edit_weights(damaged, change)
    refused(damaged, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: it.update({A: torch.ones(3, 32)}), [A, "(3, 32)", "rank 4"]),
        (lambda it: it.update({A: torch.ones(3, 32), B: torch.ones(32, 3)}), ["(3, 32)", "rank 4"]),
        (lambda it: it.update({A: torch.ones(4)}), ["(4,)", "rank 4"]),
        (lambda it: it.update({A: torch.ones(4, 31)}), ["(32, 31)", "(32, 32)", "trained on (owner/base)"]),
        (lambda it: it.update({B: torch.ones(0, 4)}), ["(0, 32)"]),
        (lambda it: it.update({"base_model.model.model.norm.weight": torch.ones(31)}), ["norm.weight", "(31,)"]),
        (
            lambda it: it.update({"base_model.model.score.weight": torch.ones(2, 32)}),
            ["score.weight", "does not match"],
        ),
        (
            lambda it: it.update({"base_model.model.norm.weight": torch.ones(32)}),
            ["two replacements", "model.norm.weight"],
        ),
        (lambda it: it.update({f"{Q_PROJ}.lora_B.bias": torch.ones(32)}), ["lora_B.bias", "q_proj.bias"]),
    ],
    ids=["rank A", "rank", "one axis", "width", "none", "norm", "score", "twice", "bias"],
)
def test_tensors_that_do_not_match_the_base_are_errors(
    damaged: Path, change: Callable[[Any], Any], words: list[str]
) -> None:
    edit(damaged, base_model_name_or_path="owner/base")
    edit_weights(damaged, change)
    refused(damaged, *words, base=state(llama()))


def test_a_rank_that_differs_from_the_config_is_an_error(damaged: Path) -> None:
    edit(damaged, rank_pattern={"q_proj": 5})
    refused(damaged, "(4, 32)", "rank 5", base=state(llama()))


def test_another_base_is_an_error(saved: Path) -> None:
    refused(saved, "model.norm.weight", "does not match", base=state(gpt2()))
    base = state(llama())
    layer = {name: weight for name, weight in base.items() if ".layers.1." not in name}
    refused(saved, "layers.1.", "does not match", base=layer)
    ambiguous = {f"{prefix}.{name[6:]}": weight for name, weight in base.items() for prefix in ("transformer", "model")}
    merge(open_adapter(saved), ambiguous)  # exact names take precedence
    ambiguous = {name.removeprefix("model."): weight for name, weight in ambiguous.items()}
    refused(saved, "is ambiguous", base=ambiguous)


def test_low_rank_changes_of_norms_are_errors(damaged: Path) -> None:
    edit_weights(damaged, rename=lambda name: name.replace("layers.0.self_attn.q_proj", "layers.0.input_layernorm"))
    refused(damaged, "input_layernorm", "(32,)", base=state(llama()))


def test_weights_that_are_not_finite_are_errors(damaged: Path) -> None:
    edit_weights(damaged, lambda it: it[A].fill_(float("inf")))
    base = state(llama())
    load = open_adapter(damaged).wrap(shapes(base), base.__getitem__)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight is not finite"):
        load("model.layers.0.self_attn.q_proj.weight")


# ---- one tensor for embedding and head


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_an_adapter_of_only_a_tied_embedding_is_an_error(tmp_path: Path, config: dict[str, Any]) -> None:
    """Merged into the shared tensor, the change would also affect the other use, unlike in training."""
    adapt(llama(tied=True), tmp_path, **config)
    base = state(llama(tied=True))
    refused(tmp_path, "output head", base=base, tied_head=True)  # the head exists as a copy
    del base[HEAD]
    refused(tmp_path, "embed_tokens" if "lm_head" not in str(config) else HEAD, base=base)


def test_a_tied_embedding_may_be_replaced_with_its_head(damaged: Path) -> None:
    new = torch.randn(50, 32)
    saved = {f"base_model.model.{name}": new.clone() for name in (HEAD, "model.embed_tokens.weight")}
    edit_weights(damaged, lambda it: it.update(saved))
    base = state(llama(tied=True))
    assert torch.equal(merge(open_adapter(damaged), base, tied_head=True)["model.embed_tokens.weight"], new)


def test_adapters_of_other_weights_work_with_a_tied_model(saved: Path) -> None:
    base = {name: weight for name, weight in state(llama(tied=True)).items() if name != HEAD}
    assert not torch.equal(merge(open_adapter(saved), base)["model.norm.weight"], base["model.norm.weight"])
