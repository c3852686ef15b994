"""Writes an untrained model of the original project's family, and arithmetic with reasoning to train it on.

    python examples/arithmetic.py arithmetic
    llm-finetune arithmetic/model arithmetic/data.jsonl -o arithmetic/trained --method full --lr 3e-3 --epochs 5 \
        --batch-size 32 --max-length 128
    llm-export arithmetic/trained -o arithmetic/bundle
    llm-chat arithmetic/bundle --ask "What is 47 + 85?"

docs/finetuning.md describes the steps. The folder `model` looks like a checkpoint of that project: `model.pt` with
Meta's tensor names, `config.yaml`, and `tokenizer/` with a vocabulary and merges; control tokens 0, 1, 2, 7 and 8.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer

DIM, LAYERS, HEADS, FFN_DIM, VOCAB = 128, 4, 4, 384, 320
CONTROL = (
    *("<|padding|>", "<|question_end|>", "<|answer_end|>", "<|reserved_3|>", "<|reserved_4|>", "<|reserved_5|>"),
    *("<|reserved_6|>", "<|think_start|>", "<|think_end|>"),
)
QUESTIONS = ("What is {}?", "Compute {}.", "{} = ?", "How much is {}?", "Please work out {}.")
CONFIG = f"""\
model:
  dim: {DIM}
  ffn_dim: {FFN_DIM}
  n_layers: {LAYERS}
  n_heads: {HEADS}
  n_kv_heads: {HEADS}
  vocab_size: {VOCAB}
  max_seq_len: 512
  norm_eps: 1.0e-5
  rope_theta: 10000.0
paths:
  tokenizer_dir: tokenizer
  vocab_file: arithmetic-vocab.json
  merges_file: arithmetic-merges.txt
tokens:
  padding: 0
  question_end: 1
  answer_end: 2
  think_start: 7
  think_end: 8
generation:
  temperature: 0
  repetition_penalty: 1.0
  max_length: 200
"""


def add(a: int, b: int) -> tuple[str, int]:
    """Reasoning and result of a sum of two numbers below 100, column by column."""
    ones = a % 10 + b % 10
    carry, tens = ones // 10, a // 10 + b // 10 + ones // 10
    steps = f"ones {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}"
    return f"{steps}; tens {a // 10} + {b // 10} + {carry} = {tens}; {tens} and {ones % 10}", a + b


def subtract(a: int, b: int) -> tuple[str, int]:
    """Reasoning and result of a difference of two numbers below 100, the first one not smaller."""
    borrow = int(a % 10 < b % 10)
    ones, tens = a % 10 + 10 * borrow - b % 10, a // 10 - b // 10 - borrow
    steps = f"ones {a % 10 + 10 * borrow} - {b % 10} = {ones}, borrow {borrow}"
    return f"{steps}; tens {a // 10} - {b // 10} - {borrow} = {tens}; {tens} and {ones}", a - b


def rows(count: int, seed: int) -> list[list[str]]:
    """Different questions, each with its reasoning and answer."""
    rng = random.Random(seed)  # noqa: S311
    found: dict[str, str] = {}
    while len(found) < count:
        a, b = rng.randrange(100), rng.randrange(100)
        plus = rng.random() < 0.5
        a, b = (a, b) if plus else (max(a, b), min(a, b))
        reasoning, result = add(a, b) if plus else subtract(a, b)
        question = rng.choice(QUESTIONS).format(f"{a} {'+' if plus else '-'} {b}")
        found[question] = f"<think>{reasoning}</think>{result}"
    return [[question, answer] for question, answer in found.items()]


def untrained_weights(seed: int) -> dict[str, torch.Tensor]:
    """Random weights with Meta's tensor names."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

    weights = {"tok_embeddings.weight": matrix(VOCAB, DIM), "output.weight": matrix(VOCAB, DIM)}
    for i in range(LAYERS):
        layer = f"layers.{i}"
        for name in ("wq", "wk", "wv"):
            weights[f"{layer}.attention.{name}.weight"] = matrix(DIM, DIM)
        weights[f"{layer}.feed_forward.w1.weight"] = matrix(FFN_DIM, DIM)
        weights[f"{layer}.feed_forward.w3.weight"] = matrix(FFN_DIM, DIM)
        residual = (2 * LAYERS) ** -0.5  # keeps the sum of all layers' outputs at the scale of one
        weights[f"{layer}.attention.wo.weight"] = matrix(DIM, DIM, residual)
        weights[f"{layer}.feed_forward.w2.weight"] = matrix(DIM, FFN_DIM, residual)
        weights[f"{layer}.attention_norm.weight"] = torch.ones(DIM)
        weights[f"{layer}.ffn_norm.weight"] = torch.ones(DIM)
    return {**weights, "norm.weight": torch.ones(DIM)}


def write(folder: Path, count: int, seed: int) -> None:
    """Write the model's folder and the data file."""
    data = rows(count, seed)
    model = folder / "model"
    (model / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    texts = [re.sub(r"\d|</?think>", "", text) for row in data[:1000] for text in row]
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=list(CONTROL), show_progress=False)
    tokenizer.save_model(str(model / "tokenizer"), "arithmetic")  # without merges of digits: each is a token
    (model / "config.yaml").write_text(CONFIG, encoding="utf-8")
    torch.save(untrained_weights(seed), model / "model.pt")
    lines = [json.dumps({"data": row}) for row in data]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description="Write an untrained model and arithmetic to train it on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.rows, options.seed)
    print(f"{options.folder / 'model'}: untrained model; {options.folder / 'data.jsonl'}: {options.rows} rows")


if __name__ == "__main__":
    main()
