"""Rotates a model's weights so that its activations have no outliers, without changing what the model computes.

The residual stream is rotated as a whole, and each head between values and output projection. RMSNorm commutes with a
rotation once its weights are folded into the projections that read it (QuaRot, arXiv:2404.00456; SliceGPT,
arXiv:2401.15024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llm_edge.exporter.module_names import HEAD, HEAD_MIX
from llm_edge.exporter.quantization.hadamard import Rotation, rotation
from llm_edge.model.config import ModelConfig, Norm

_HEAD_MIX_WEIGHT = f"{HEAD_MIX}.weight"


def rotates_residual(config: ModelConfig) -> bool:
    """Return whether the residual stream can be rotated: not with LayerNorm or with norms of block outputs."""
    return config.norm is Norm.RMS and config.pre_norm and not config.post_norm


def rotated_config(config: ModelConfig) -> ModelConfig:
    """Return the shape of the rotated model. If the head is tied, the last norm's weights become a separate matrix."""
    return dataclasses.replace(config, head_mix=rotates_residual(config) and config.tie_word_embeddings)


class RotatedWeights(Mapping[str, Tensor]):
    """Weights of a `Decoder` of the shape `rotated_config`, in float32, computed one at a time from the model's."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self._config = config
        self._weights = weights
        self._heads = rotation(config.head_dim)
        self._residual: Rotation | None = rotation(config.hidden_size) if rotates_residual(config) else None
        self._names = dict.fromkeys([*weights, *([_HEAD_MIX_WEIGHT] if rotated_config(config).head_mix else [])])

    def __contains__(self, name: object) -> bool:  # without computing the weight
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        residual = self._residual
        if name == _HEAD_MIX_WEIGHT and residual is not None:
            matrix = residual.matrix()
            return matrix.T @ (self._weights["norm.weight"].float()[:, None] * matrix)
        prefix, _, last = name.rpartition(".")
        role = prefix.rpartition(".")[2]
        weight = self._weights[name]
        if role in ("embed_tokens", "embed_positions"):
            return weight.float() if residual is None else residual.apply(weight)
        weight = weight.float()
        if role == "qkv":
            weight = self._rotate_values(weight)
        elif role == "output" and last == "weight":
            heads = weight.reshape(len(weight), -1, self._config.head_dim)
            weight = self._heads.apply(heads).reshape(weight.shape)
        if residual is None:
            return weight
        if role in ("attention_norm", "mlp_norm", "norm"):
            return torch.ones_like(weight)
        if role in ("output", "down"):  # write to the residual stream
            return residual.apply_to_columns(weight) if last == "weight" else residual.apply(weight)
        if last == "weight" and role in ("qkv", "gate_up", "up", "lm_head"):  # read from it after a norm
            return residual.apply(weight * self._norm_before(prefix, role))
        return weight

    def rows(self, name: str) -> Callable[[Tensor], Tensor]:
        """Load the embedding or the head; return a function that returns rows by number, float32 [..., hidden]."""
        whole, residual = self._weights[name], self._residual
        norm = self._norm_before("", HEAD) if name == f"{HEAD}.weight" and residual is not None else None

        def rotated(numbers: Tensor) -> Tensor:
            rows = whole[numbers].float()
            if norm is not None:
                rows = rows * norm
            return rows if residual is None else residual.apply(rows)

        return rotated

    def _rotate_values(self, weight: Tensor) -> Tensor:
        """Rotate the values in a packed weight [(H + 2K) * D, hidden] or bias [(H + 2K) * D]."""
        config = self._config
        start = config.query_size + config.key_value_size
        values = weight[start:].reshape(config.num_key_value_heads, config.head_dim, -1)
        rotated = self._heads.apply(values.transpose(1, 2)).transpose(1, 2)
        return torch.cat([weight[:start], rotated.reshape(weight[start:].shape)])

    def _norm_before(self, prefix: str, role: str) -> Tensor:
        if role == HEAD:
            return self._weights["norm.weight"].float()
        layer = prefix.rpartition(".")[0].rpartition(".")[0]
        norm = "attention_norm" if role == "qkv" or self._config.shared_norm else "mlp_norm"
        return self._weights[f"{layer}.{norm}.weight"].float()
