"""The pre-tokenizers of byte-level BPE vocabularies by the names of GGUF's `tokenizer.ggml.pre`.

The names and what they stand for are those of llama.cpp (`src/llama-vocab.cpp`, version of llama-cpp-python 0.3.36).
Where llama.cpp adapts a pattern to its own regex engine, the pattern of the model's tokenizer.json is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

from llm_edge.runtime.text import known_patterns as known


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is split into words, and the settings that llama.cpp derives from the name.

    Attributes:
        patterns: applied in turn; each splits what it matches off from the rest.
        normalizer: makes the normalizer of the text, or None.
        ignore_merges: a word in the vocabulary is one token even if no merges form it.
        add_bos: default of `tokenizer.ggml.add_bos_token`.
    """

    patterns: tuple[str, ...]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> Any:
        """Build the pre-tokenizer of a tokenizer.json."""
        *others, last = self.patterns
        # GPT-2's pattern is built into ByteLevel, and other readers of the bundle know the usual steps by name.
        built_in = last == known.GPT2
        patterns = others if built_in else self.patterns
        steps = [_split(pattern) for pattern in patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=built_in))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _split(pattern: str) -> Any:
    if pattern == known.DIGIT:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_LLAMA3_RULE = PreTokenizer((known.LLAMA3,), ignore_merges=True, add_bos=True)
_LLAMA3_SPLIT = PreTokenizer((known.LLAMA3,))
_GLM_RULE = PreTokenizer((known.LLAMA3,), ignore_merges=True)
_QWEN2_RULE = PreTokenizer((known.QWEN2,), normalizers.NFC)
_QWEN2_SPLIT = PreTokenizer((known.QWEN2,))
_GPT2_RULE = PreTokenizer((known.GPT2,))
_DIGITS_RULE = PreTokenizer((known.DIGIT, known.GPT2))
_GPT4O_RULE = PreTokenizer((known.GPT4O,))
_DEEPSEEK3_RULE = PreTokenizer(known.DEEPSEEK3)
_NO_PUNCTUATION_RULE = PreTokenizer((known.NO_PUNCTUATION,))
_BAILING_RULE = PreTokenizer((known.BAILING,))

_GROUPS: tuple[tuple[str, PreTokenizer], ...] = (
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3_RULE),
    ("dbrx smaug-bpe chatglm-bpe", _LLAMA3_SPLIT),
    ("glm4 glm5", _GLM_RULE),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez", _QWEN2_RULE),
    ("stablelm2 hunyuan solar-open grok-2", _QWEN2_SPLIT),
    ("qwen35", PreTokenizer((known.QWEN35,), normalizers.NFC)),
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert",
        _GPT2_RULE,
    ),
    ("jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe", _GPT2_RULE),
    ("smollm starcoder refact codeshell command-r exaone minerva-7b mellum2", _DIGITS_RULE),
    ("tekken", PreTokenizer((known.TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O_RULE),
    ("granite-embed-multi-97m", PreTokenizer((known.GPT4O,), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((known.THOUSANDS, known.GPT4O))),
    ("youtu", PreTokenizer((known.YOUTU_SCRIPTS, known.YOUTU), ignore_merges=True)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3_RULE),
    ("deepseek-llm", PreTokenizer(known.DEEPSEEK_LLM)),
    ("deepseek-coder", PreTokenizer(known.DEEPSEEK_CODER)),
    ("spark2_5", PreTokenizer(known.SPARK)),
    ("falcon", PreTokenizer(known.FALCON)),
    ("bloom poro-chat gpt3-finnish", _NO_PUNCTUATION_RULE),
    ("viking", PreTokenizer((known.NO_PUNCTUATION, r"\p{N}"))),
    ("chameleon", PreTokenizer(known.CHAMELEON, add_bos=True)),
    ("jais-2", PreTokenizer((known.JAIS2,))),
    ("minicpm5", PreTokenizer(known.MINICPM5, ignore_merges=True)),
    ("bailingmoe bailingmoe2 llada-moe", _BAILING_RULE),
    ("seed-coder", PreTokenizer((known.SEED,))),
    ("ufakzeka", PreTokenizer((known.UFAKZEKA,))),
    ("laguna", PreTokenizer((known.LINES, known.QWEN2))),
    ("exaone-moe", PreTokenizer((known.EXAONE_MOE,))),
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: rule for names, rule in _GROUPS for name in names.split()}
"""The supported names. "default" is deliberately missing: llama.cpp itself warns that it degrades the output."""

UNSUPPORTED = frozenset(
    # Vocabularies that are not byte-level, splits at positions instead of characters, and hand-written rules.
    ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace", "superbpe", "kimi-k2", "afmoe")
)
"""Names that llama.cpp knows and this reader does not."""
