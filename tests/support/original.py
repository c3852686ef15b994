"""An independent implementation of the model family with Meta's naming, and checkpoints of it with their side files.

Written from the papers to check the reader independently: rotary positions are complex numbers of
neighbouring dimensions (RoFormer, arXiv:2104.09864), key/value heads are repeated, there is no cache. Parameters are
named as in the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import TEXT
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

CONTROL = (
    "<|padding|>",
    "<|question_end|>",
    "<|answer_end|>",
    "<|reserved_3|>",
    "<|reserved_4|>",
    "<|reserved_5|>",
    "<|reserved_6|>",
    "<|think_start|>",
    "<|think_end|>",
)
PADDING, QUESTION_END, ANSWER_END, THINK_START, THINK_END = 0, 1, 2, 7, 8


@dataclass(frozen=True)
class Shape:
    """The keys of the `model:` block."""

    dim: int = 64
    ffn_dim: int = 160
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 4
    vocab_size: int = 331  # slightly more than the number of tokens of the tokenizer
    max_seq_len: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 50_000.0


SIZES = {
    "tiny": Shape(),
    "505m": Shape(1024, 4096, 24, 16, 16, 50_000, 4096),
}


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467), in float32 regardless of the weights' type."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.head_dim = shape, shape.dim // shape.n_heads
        self.wq = nn.Linear(shape.dim, shape.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, shape.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, shape.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(shape.n_heads * self.head_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        """x [B, S, dim]; rotations, complex [S, D / 2]."""
        batch, length, _ = x.shape
        query, key, value = (w(x).view(batch, length, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        query, key = rotate(query, rotations), rotate(key, rotations)
        times = self.shape.n_heads // self.shape.n_kv_heads
        key, value = key.repeat_interleave(times, dim=2), value.repeat_interleave(times, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(self.head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares = F.softmax(scores.masked_fill(future, -math.inf).float(), dim=-1).type_as(x)
        return self.wo(torch.einsum("bhqk,bkhd->bqhd", shares, value).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.w2 = nn.Linear(shape.ffn_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = Norm(shape.dim, shape.norm_eps)
        self.ffn_norm = Norm(shape.dim, shape.norm_eps)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotations)
        return x + self.feed_forward(self.ffn_norm(x))


class Original(nn.Module):
    """The whole model; `llama3` are the arguments of Llama 3.1's frequency scaling, if any."""

    def __init__(self, shape: Shape, llama3: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.shape, self.llama3 = shape, llama3
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = Norm(shape.dim, shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> logits [B, S, V]."""
        x = self.tok_embeddings(tokens)
        rotations = self.rotations(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, rotations)
        return self.output(self.norm(x))

    def rotations(self, length: int) -> Tensor:
        """Rotation of each pair of dimensions at each position, complex [length, D / 2]."""
        head_dim = self.shape.dim // self.shape.n_heads
        speeds = 1.0 / self.shape.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        if self.llama3 is not None:
            speeds = torch.tensor([scaled(float(speed), **self.llama3) for speed in speeds])
        angles = torch.outer(torch.arange(length).float(), speeds)
        return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """x [B, S, heads, D], neighbouring dimensions as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, None, :]).flatten(-2).type_as(x)


def scaled(speed: float, factor: float, low: float, high: float, original: float) -> float:
    """Llama 3.1: divide frequencies of wavelengths above `original / low` by `factor`, interpolating in between."""
    wavelength = 2 * math.pi / speed
    if wavelength < original / high:
        return speed
    if wavelength > original / low:
        return speed / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * speed / factor + smooth * speed


def random_model(shape: Shape, seed: int, *, tied: bool = False, llama3: Mapping[str, float] | None = None) -> Original:
    """A seeded model whose logits are neither flat nor huge, and whose norms are not all ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Original(shape, llama3)
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        value = torch.empty(parameter.shape)
        if "norm" in name:
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0.0, 1.0 if "embed" in name else parameter.shape[1] ** -0.5, generator=generator)
        setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


@dataclass(frozen=True)
class Saved:
    """What `save_family` wrote: the folder, the file of weights in it, and the model as the file holds it."""

    folder: Path
    path: Path
    model: Original


def save_family(
    folder: Path,
    *,
    size: str = "tiny",
    seed: int = 0,
    wrap: str | None = None,
    dtype: torch.dtype = torch.float32,
    suffix: str = ".pt",
    legacy: bool = False,
    tied: bool = False,
    extra: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    **shape: Any,
) -> Saved:
    """Write a random checkpoint in the layout of such a project: `model.pt`, `config.yaml`, `tokenizer/`.

    Args:
        folder: is created.
        size: a key of `SIZES`; `shape` overrides its values.
        seed: of the weights.
        wrap: `model_state_dict`, `state_dict` or `model` put the state dict into a training checkpoint under that key;
            `module.` and `_orig_mod.` are prepended to every name.
        dtype: of the file; the returned model has the same values.
        suffix: of the file; `.safetensors` selects that format, all others torch.save.
        legacy: torch.save's format before torch 1.6.
        tied: omit `output.weight`.
        extra: further tensors in the file.
        config: sections of config.yaml besides `model:`; None omits one.
        shape: see `Shape`.
    """
    created = random_model(replace(SIZES[size], **shape), seed, tied=tied)
    created.to(dtype)
    state: dict[str, Any] = {name: value.detach() for name, value in created.state_dict().items()}
    if tied:
        del state["output.weight"]
    state |= extra or {}
    if wrap is not None and wrap.endswith("."):
        state = {wrap + name: value for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        wrapped = wrap is not None and not wrap.endswith(".")
        content = {wrap: state, "step": 1000, "loss": 2.5} if wrapped else state
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    save_tokenizer(folder / "tokenizer")
    write_config(folder / "config.yaml", created.shape, **(config or {}))
    return Saved(folder, path, created.float())


def save_tokenizer(folder: Path, prefix: str = "family", control: tuple[str, ...] = CONTROL) -> ByteLevelBPETokenizer:
    """Train a byte-level BPE of 320 tokens and write its two files as its library does."""
    created = ByteLevelBPETokenizer()
    created.train_from_iterator(
        [TEXT] * 4, vocab_size=320, min_frequency=1, special_tokens=list(control), show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    created.save_model(str(folder), prefix)
    return created


def write_config(path: Path, shape: Shape, **sections: Any) -> None:
    """Write such a config.yaml; a section that is None is omitted."""
    content: dict[str, Any] = {
        "model": asdict(shape),
        "paths": {
            "tokenizer_dir": "tokenizer",
            "vocab_file": "family-vocab.json",
            "merges_file": "family-merges.txt",
        },
        "tokens": {
            "padding": PADDING,
            "question_end": QUESTION_END,
            "answer_end": ANSWER_END,
            "think_start": THINK_START,
            "think_end": THINK_END,
        },
        "generation": {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 50,
            "repetition_penalty": 1.1,
            "max_length": 100,
        },
        **sections,
    }
    lines = []
    for name, section in content.items():
        if section is not None:
            lines.append(f"{name}:")
            lines += [f"  {key}: {json.dumps(value)}" for key, value in section.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
