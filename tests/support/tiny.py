"""Small seeded models in real file formats, for tests that need a checkpoint but not a good one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter import export as export_module
from llm_edge.exporter.texts import Texts, Window

TEXT = """The quick brown fox jumps over the lazy dog. 0123456789 What is the capital of France? Paris, of course!
def main():
    print("hello, world")
Äpfel, señor, 你好, 🙂 and — dashes. <think> and </think>; a user asked an assistant.
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE of 320 tokens; the first three are special."""
    created = tokenizers.Tokenizer(models.BPE())
    created.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    created.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    created.train_from_iterator([TEXT] * 4, trainer)
    return created


def save_checkpoint(folder: Path, *, seed: int = 0, shard_size: str = "50GB", **config: Any) -> Path:
    """Write a random LlamaForCausalLM with its tokenizer as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 331,  # slightly more than the number of tokens of the tokenizer, as in real models
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # not hidden_size / num_attention_heads
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **config,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer` with a chat template as transformers saves it."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def shorten_texts(patch: pytest.MonkeyPatch, tokens: int) -> None:
    """Make exports validate and calibrate on the first tokens of each text: whole texts dominate the time."""
    whole = export_module.load_texts

    def shorten(windows: list[Window]) -> list[Window]:
        left, kept = tokens, []
        for window in windows:
            kept.append(Window(window.tokens[:left], window.kind))
            left -= len(kept[-1].tokens)
            if left < 2:
                break
        return kept

    def shortened(checkpoint: Checkpoint, *, sampled: bool = False) -> Texts:
        texts = whole(checkpoint, sampled=sampled)
        return Texts(*(shorten(windows) for windows in (texts.calibration, texts.probes, texts.validation)))

    patch.setattr(export_module, "load_texts", shortened)
