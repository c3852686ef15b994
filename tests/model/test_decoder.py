"""Compare the reference decoder with transformers' LlamaForCausalLM: same weights, same logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.model.decoder import Decoder, Past, count_parameters

BOUND = 1e-4
# Weights large enough for peaked attention: at transformers' usual 0.02 a model with wrong rotary positions
# still agrees to 1e-3. Logits here reach about 5.
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4, "head_dim": 16},
    "mqa, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "odd sizes, untied": {
        "vocab_size": 347,
        "hidden_size": 54,
        "intermediate_size": 77,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Pair:
    ours: Decoder
    theirs: Any

    def expect(self, tokens: Tensor) -> Tensor:
        """Return the logits [S, V] of transformers for one sequence, without padding or cache."""
        logits: Tensor = self.theirs(input_ids=tokens[None], use_cache=False).logits[0]
        return logits


def save_checkpoint(folder: Path, **config: Any) -> Path:
    """Like `tiny.save_checkpoint`, with larger weights and norms that are not all one."""
    tiny.save_checkpoint(folder, initializer_range=0.15, **config)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    weights = {name: torch.rand_like(it) + 0.5 if "norm" in name else it for name, it in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> Decoder:
    checkpoint = read_folder(folder)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    return decoder.requires_grad_(False)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import LlamaForCausalLM

    folder = save_checkpoint(tmp_path_factory.mktemp("model"), **SHAPES[request.param])
    theirs = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return Pair(load(folder), theirs.eval().requires_grad_(False))


def text(pair: Pair, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, pair.ours.config.vocab_size, (length,), generator=generator)


def run(decoder: Decoder, tokens: Tensor, chunks: Sequence[int]) -> tuple[Tensor, Past]:
    """Return the logits [S, V] of one sequence, computed in chunks."""
    past, done, logits = decoder.empty_past(), 0, []
    for size in chunks:
        mask = torch.ones(1, done + size, dtype=torch.int64)
        chunk_logits, past = decoder(tokens[None, done : done + size], mask, past)
        logits.append(chunk_logits[0])
        done += size
    assert done == len(tokens)
    return torch.cat(logits), past


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= BOUND  # False for NaN


def test_the_models_are_sensitive_enough_to_compare(pair: Pair) -> None:
    tokens = text(pair, 40)
    logits = pair.expect(tokens)
    assert logits.std() > 0.5
    swapped = tokens.clone()
    swapped[[3, 20]] = tokens[[20, 3]]
    assert (pair.expect(swapped)[-1] - logits[-1]).abs().max() > 0.01  # the order of far tokens matters


@pytest.mark.parametrize("length", [1, 2, 61, 400])
def test_a_single_step_matches_transformers(pair: Pair, length: int) -> None:
    tokens = text(pair, length)
    close(run(pair.ours, tokens, [length])[0], pair.expect(tokens))


@pytest.mark.parametrize(
    "chunks", [[30, 31], [1, 7, 16, 2, 35], [60, 1], [1] * 61], ids=["two", "uneven", "last", "token by token"]
)
def test_chunks_match_transformers(pair: Pair, chunks: list[int]) -> None:
    tokens = text(pair, 61)
    logits, past = run(pair.ours, tokens, chunks)
    close(logits, pair.expect(tokens))
    config = pair.ours.config
    assert len(past) == config.num_hidden_layers
    assert {tuple(it.shape) for layer in past for it in layer} == {(1, config.num_key_value_heads, 61, config.head_dim)}


def test_the_cache_matches_transformers(pair: Pair) -> None:
    tokens = text(pair, 23)
    theirs = pair.theirs(input_ids=tokens[None], use_cache=True).past_key_values
    for (key, value), layer in zip(run(pair.ours, tokens, [20, 3])[1], theirs.layers, strict=True):
        close(key, layer.keys)
        close(value, layer.values)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_matches_its_sequences_alone(pair: Pair, side: str) -> None:
    """Each sequence of a padded batch, through prefill and decode, matches the sequence on its own."""
    prompts, steps = [9, 1, 17, 5], 4
    rows = [text(pair, length + steps, seed) for seed, length in enumerate(prompts)]
    wanted = [pair.expect(row) for row in rows]
    width = max(prompts)
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.int64)
    spans = [slice(0, length) if side == "right" else slice(width - length, width) for length in prompts]
    for number, (row, span, length) in enumerate(zip(rows, spans, prompts, strict=True)):
        ids[number, span], mask[number, span] = row[:length], 1
    logits, past = pair.ours(ids, mask, pair.ours.empty_past(len(rows)))
    assert logits.isfinite().all()
    for number, (span, length) in enumerate(zip(spans, prompts, strict=True)):
        close(logits[number, span], wanted[number][:length])
    for step in range(steps):
        ids = torch.stack([row[length + step] for row, length in zip(rows, prompts, strict=True)])[:, None]
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.int64)], dim=1)
        logits, past = pair.ours(ids, mask, past)
        for number, length in enumerate(prompts):
            close(logits[number, 0], wanted[number][length + step])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_matches_transformers(pair: Pair, side: str) -> None:
    ids = torch.stack([text(pair, 12, seed) for seed in range(3)])
    mask = torch.ones(3, 12, dtype=torch.int64)
    for row, padding in enumerate([5, 0, 2]):
        mask[row, (12 - padding if side == "right" else 0) : (12 if side == "right" else padding)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = pair.theirs(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    found, _ = pair.ours(ids, mask, pair.ours.empty_past(3))
    close(found[mask.bool()], wanted[mask.bool()])


def test_prefill_after_pasts_of_different_lengths(pair: Pair) -> None:
    rows = [text(pair, 12, 1), text(pair, 15, 2)]
    first = torch.stack([torch.cat([rows[0][:4], torch.zeros(3, dtype=torch.int64)]), rows[1][:7]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    _, past = pair.ours(first, mask, pair.ours.empty_past(2))
    second = torch.stack([rows[0][4:], rows[1][7:]])
    logits, _ = pair.ours(second, torch.cat([mask, torch.ones(2, 8, dtype=torch.int64)], dim=1), past)
    close(logits[0], pair.expect(rows[0])[4:])
    close(logits[1], pair.expect(rows[1])[7:])


def test_num_logits_to_keep_limits_the_logits(pair: Pair) -> None:
    tokens = text(pair, 11)
    mask, past = torch.ones(1, 11, dtype=torch.int64), pair.ours.empty_past()
    everything, presents = pair.ours(tokens[None], mask, past)
    assert everything.shape[1] == 11
    for keep in (1, 3, 11):
        kept, kept_presents = pair.ours(tokens[None], mask, past, num_logits_to_keep=keep)
        close(kept, everything[:, -keep:])
        for ours, theirs in zip(itertools.chain(*presents), itertools.chain(*kept_presents), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 9), (1, 11), (2, 10), (1, 6), (10,)])
def test_a_mask_of_the_wrong_shape_is_rejected(pair: Pair, shape: tuple[int, ...]) -> None:
    past = pair.ours.empty_past(length=4)
    with pytest.raises(ValueError, match=r"attention_mask has the shape .* past and new tokens require \(1, 10\)"):
        pair.ours(text(pair, 6)[None], torch.ones(shape, dtype=torch.int64), past)


def test_an_empty_past_has_the_shape_of_a_cache(pair: Pair) -> None:
    config = pair.ours.config
    past = pair.ours.empty_past(3, 5)
    assert len(past) == config.num_hidden_layers
    for layer in past:
        for part in layer:
            assert part.shape == (3, config.num_key_value_heads, 5, config.head_dim)
            assert part.dtype == torch.float32
            assert not part.any()


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("tied", [True, False])
def test_load_weights_keeps_ties(tmp_path: Path, device: str, tied: bool) -> None:
    checkpoint = read_folder(save_checkpoint(tmp_path / "a", tie_word_embeddings=tied))
    with torch.device(device):
        decoder = Decoder(checkpoint.config)
    decoder.load_weights(checkpoint.weights)
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) is tied
    assert dict(decoder.named_parameters()).keys() == checkpoint.weights.keys()
    assert ("lm_head.weight" in checkpoint.weights) is not tied
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, checkpoint.weights[name])
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count_parameters(checkpoint.config)
    assert {it.device.type for it in itertools.chain(decoder.parameters(), decoder.buffers())} == {"cpu"}


def test_load_weights_converts_any_float_type_to_float32(tmp_path: Path) -> None:
    checkpoint = read_folder(save_checkpoint(tmp_path / "a"))
    halves = {name: checkpoint.weights[name].bfloat16() for name in checkpoint.weights}
    decoder = Decoder(checkpoint.config)
    decoder.load_weights(halves)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert torch.equal(decoder.norm.weight, halves["norm.weight"].float())
