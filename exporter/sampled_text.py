"""Text that a model generates itself, as a kind of text for calibration and validation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from llm_edge.exporter.parallel import worker_threads
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder, Past, count_parameters

_MAX_BYTES = 1_600_000_000  # of the float32 weights, which are in memory as a whole
_GROUP = 8  # sequences generated together by one thread: the same on any number of cores


def can_sample(config: ModelConfig) -> bool:
    """Return whether the model is small enough to generate text during an export."""
    return 4 * count_parameters(config) <= _MAX_BYTES


@torch.inference_mode()
def sample_text(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    end_tokens: Collection[int] = (),
) -> list[tuple[int, ...]]:
    """Continue each prompt by tokens drawn from the model at temperature 1, the same ones in every call.

    Args:
        config: shape of the model.
        weights: of the model.
        prompts: at least one token each.
        new_tokens: maximum number of generated tokens.
        end_tokens: tokens after which a sequence ends.

    Returns:
        prompt and continuation of each sequence.
    """
    with torch.device("meta"):
        decoder = Decoder(config, standalone=True).eval()
    decoder.load_weights(weights)
    groups = [prompts[start : start + _GROUP] for start in range(0, len(prompts), _GROUP)]
    with worker_threads() as threads:
        seeds = range(len(groups))
        results = threads.map(lambda group, seed: _sample_group(decoder, group, new_tokens, seed), groups, seeds)
    return [
        _cut(tokens, len(prompt), end_tokens)
        for group, result in zip(groups, results, strict=True)
        for prompt, tokens in zip(group, result, strict=True)
    ]


@torch.inference_mode()  # holds for one thread
def _sample_group(
    decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int
) -> list[tuple[int, ...]]:
    """Return prompts and continuations, all of them `new_tokens` long."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])  # padded on the right
    mask = (torch.arange(width) < lengths[:, None]).long()
    last = lengths - 1
    drawn = []
    past = decoder.empty_past(len(prompts))
    numbers = torch.rand(new_tokens, len(prompts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for uniform in numbers:
        logits, past = _step(decoder, tokens, mask, past, last)
        tokens = _draw(logits, uniform)[:, None]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        last = torch.zeros_like(last)
        drawn.append(tokens)
    continuations = torch.cat(drawn, 1).tolist()
    return [(*prompt, *continuation) for prompt, continuation in zip(prompts, continuations, strict=True)]


def _step(decoder: Decoder, tokens: Tensor, mask: Tensor, past: Past, last: Tensor) -> tuple[Tensor, Past]:
    """Run new tokens [B, S]; return the logits [B, V] of position `last` [B] of each sequence, and the new cache."""
    x = decoder.embed(decoder.embed_tokens(tokens), mask)
    presents: Past = []
    for number, layer_past in enumerate(past):
        x, present = decoder.run_layer(number, x, layer_past, mask)
        presents.append(present)
    logits: Tensor = decoder.lm_head(decoder.normalize(x[torch.arange(len(x)), last]))
    return logits, presents


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the token [B] at which the cumulated probability exceeds a number [B] between 0 and 1."""
    cumulated = logits.softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits.shape[1] - 1
    )


def _cut(tokens: Sequence[int], start: int, end_tokens: Collection[int]) -> tuple[int, ...]:
    """Return a sequence up to the first end token from a position on."""
    for number in range(start, len(tokens)):
        if tokens[number] in end_tokens:
            return tuple(tokens[: number + 1])
    return tuple(tokens)
