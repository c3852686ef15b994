"""Prepares a decoder for training: loads its weights, and decides which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import tokenizers
import torch
from torch import Tensor, nn

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.finetune.fused import fuse
from llm_edge.finetune.lora import add_lora, lora_layers
from llm_edge.finetune.options import FinetuneOptions, Method, Precision
from llm_edge.finetune.saving import Naming, lora_rows
from llm_edge.model.decoder import Decoder
from llm_edge.model.weights import EMBEDDING, HEAD
from llm_edge.runtime.errors import CheckpointError, ParameterError

EMBEDDINGS = (EMBEDDING, "embed_positions.weight", HEAD)
"""Matrices without weight decay."""

_FEW_TOKENS = 64  # embeddings trained with LoRA: beyond, training all weights is meant


def prepare(checkpoint: Checkpoint, options: FinetuneOptions, device: str) -> Decoder:
    """Return the decoder with the weights to train as its parameters that require gradients, all float32.

    Raises:
        CheckpointError: a weight is not finite, or the model could not be saved after training.
        ParameterError: a token to train is not a token of the model.
    """
    Naming.of(checkpoint)  # fails now rather than after training
    tokens = _token_ids(checkpoint, options.train_token or [])
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    decoder.load_weights(_Finite(checkpoint))
    decoder.to(device)
    fuse(decoder)
    if options.method is Method.FULL:
        return decoder.requires_grad_(True)
    add_lora(decoder, lora_rows(checkpoint), options.rank, options.alpha, options.seed)
    if tokens:
        _train_embeddings(decoder, tokens)
    if options.precision is Precision.BF16 and not options.shard:  # a sharded layer has one dtype
        for _, module in lora_layers(decoder):  # frozen: autocast would round them in every step
            module.weight.data = module.weight.data.bfloat16()
    return decoder


def trained_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}


class _Finite(Mapping[str, Tensor]):
    """The weights of a checkpoint, each checked for NaN and infinity when it is read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        weight = self._checkpoint.weights[name]
        if not torch.isfinite(weight).all():
            sources = " + ".join(source.name for source in self._checkpoint.weights.sources(name))
            raise CheckpointError(
                f"{self._checkpoint.source.name}: {sources} contains NaN or infinity: the checkpoint is damaged, use "
                "an earlier one"
            )
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.weights)

    def __len__(self) -> int:
        return len(self._checkpoint.weights)


def _token_ids(checkpoint: Checkpoint, texts: list[str]) -> list[int]:
    if not texts:
        return []
    if len(texts) > _FEW_TOKENS:
        raise ParameterError(f"--train-token: {len(texts)} tokens are given, at most {_FEW_TOKENS} are supported")
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)
    found = [tokenizer.token_to_id(text) for text in texts]
    for text, token in zip(texts, found, strict=True):
        if token is None or token >= checkpoint.config.vocab_size:
            raise ParameterError(
                f"--train-token {text!a} is not a token of the model: add it to the tokenizer and, if there is no "
                "unused row, to the embedding first"
            )
    return [token for token in found if token is not None]


def _train_embeddings(decoder: Decoder, tokens: list[int]) -> None:
    """Train the embedding and output rows of a few tokens: the gradient of all other rows is zero."""
    weights: list[Tensor] = [decoder.embed_tokens.weight]
    if not decoder.config.tie_word_embeddings:
        weights.append(decoder.lm_head.weight)
    mask = torch.zeros(decoder.config.vocab_size, 1, device=weights[0].device)
    mask[tokens] = 1
    for weight in weights:
        weight.requires_grad_(True)
        weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[no-untyped-call]
