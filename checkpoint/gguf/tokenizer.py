"""From a GGUF file's metadata to the files of a Hugging Face tokenizer. It knows no model and no tensors.

Of byte-level BPE a GGUF stores the vocabulary, the merges and the kind of every token, but only the *name* of the
rule by which text is cut before merging (`tokenizer.ggml.pre`). `_PRE_TOKENIZERS` is the table of the names known
here. SentencePiece vocabularies are built in `gguf_sentencepiece.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.gguf import sentencepiece
from llm_edge.checkpoint.gguf.reader import GGUFFile
from llm_edge.checkpoint.gguf.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED
from llm_edge.runtime.errors import CheckpointError

# Control tokens that end a turn, whatever `eos_token_id` says; they count where the template has them.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CAPITALIZED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = rf"{_CAPITALIZED}|{_UPPER}|\p{{N}}{_AFTER_NUMBERS}"
_GPT4O = rf"{_CAPITALIZED}{_CONTRACTION}|{_UPPER}{_CONTRACTION}|\p{{N}}{{1,3}}{_AFTER_NUMBERS}"


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a family cuts text before merging, and what llama.cpp takes for granted with its name."""

    split: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # where the file has no add_bos_token


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by(pattern: str) -> Callable[[], Any]:
    def build() -> Any:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


# The names that llama.cpp's converter writes, and the rule that the family's own tokenizer.json has.
# "default" is left out on purpose: llama.cpp reads it, and a missing name, with a rule it calls degraded.
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "gpt-2": _PreTokenizer(_gpt2),
    "phi-2": _PreTokenizer(_gpt2),
    "smollm": _PreTokenizer(_digits),
    "starcoder": _PreTokenizer(_digits),
    "refact": _PreTokenizer(_digits),
    "codeshell": _PreTokenizer(_digits),
    "llama-bpe": _PreTokenizer(_by(_LLAMA3), ignore_merges=True, add_bos=True),
    "llama-v3": _PreTokenizer(_by(_LLAMA3), ignore_merges=True, add_bos=True),
    "llama3": _PreTokenizer(_by(_LLAMA3), ignore_merges=True, add_bos=True),
    "qwen2": _PreTokenizer(_by(_QWEN2), normalizer=normalizers.NFC),
    "tekken": _PreTokenizer(_by(_TEKKEN), ignore_merges=True, add_bos=True),
    "gpt-4o": _PreTokenizer(_by(_GPT4O)),
}


def tokenizer_assets(gguf: GGUFFile) -> TokenizerAssets:
    """Build the tokenizer that `gguf` describes.

    Raises:
        CheckpointError: it is of another kind than byte-level BPE or SentencePiece BPE, or not described whole.
    """
    model = gguf.meta_str("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        _fail(
            gguf,
            f"has a tokenizer of the kind {model[:80]!a}; byte-level BPE ('gpt2') and SentencePiece BPE ('llama') "
            "can be read",
        )
    pieces = model == "llama"
    pre = None if pieces else _pre_tokenizer(gguf)
    tokens = gguf.meta_strings("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        _fail(gguf, f"has the token {twice[:80]!a} twice in its vocabulary: convert the model again")
    kinds = _kinds(gguf, len(tokens), needed=pieces)
    roles = _roles(gguf, kinds, sentencepiece.ROLES if pieces else {})
    bos, eos = roles["bos_token"], roles["eos_token"]
    bos_is_usual = pieces if pre is None else pre.add_bos
    add_bos = _flag(gguf, "add_bos_token", "bos_token_id", default=bos_is_usual, token=bos)
    add_eos = _flag(gguf, "add_eos_token", "eos_token_id", default=False, token=eos)

    added = _added_tokens(tokens, kinds, {index for index in roles.values() if index is not None})
    tokenizer = sentencepiece.tokenizer(gguf, vocab, kinds) if pre is None else _byte_level(gguf, vocab, pre)
    before = [(tokens[bos], bos)] if add_bos and bos is not None else []
    after = [(tokens[eos], eos)] if add_eos and eos is not None else []
    if before or after:
        tokenizer.post_processor = _template(gguf, before, after)
    tokenizer.add_tokens(list(added.values()))

    chat_template = gguf.meta_str("tokenizer.chat_template", default="") or None
    named = {role: tokens[index] for role, index in roles.items() if index is not None}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "add_prefix_space": pieces and sentencepiece.adds_prefix(gguf),
        "added_tokens_decoder": {str(index): _as_dict(token) for index, token in added.items()},
        **{role: named.get(role) for role in roles},
        "clean_up_tokenization_spaces": False,
    }
    context = f"{gguf.meta_str('general.architecture')}.context_length"
    if context in gguf.metadata:
        config["model_max_length"] = gguf.meta_int(context, minimum=1)
    return TokenizerAssets(
        tokenizer_json=tokenizer.to_str(pretty=not pieces),
        tokenizer_config=config,
        special_tokens_map=dict(named),
        chat_template=chat_template,
        bos_token_id=bos,
        eos_token_ids=_eos_ids(gguf, vocab, kinds, eos, chat_template or ""),
        pad_token_id=roles["pad_token"],
    )


def _byte_level(gguf: GGUFFile, vocab: dict[str, int], pre: _PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(gguf, vocab), ignore_merges=pre.ignore_merges))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(gguf: GGUFFile) -> _PreTokenizer:
    name = gguf.meta_str("tokenizer.ggml.pre", default="default")
    if name == "default":
        _fail(
            gguf,
            "does not name its pre-tokenizer (tokenizer.ggml.pre), so text would be cut wrongly: "
            "convert the model again with a current llama.cpp",
        )
    found = _PRE_TOKENIZERS.get(name)
    if found is None:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        _fail(gguf, f"has the pre-tokenizer {name[:80]!a}, which is not known here; known are {known}")
    return found


def _kinds(gguf: GGUFFile, n_tokens: int, *, needed: bool) -> list[int]:
    key = "tokenizer.ggml.token_type"
    return gguf.meta_ints(key, length=n_tokens) if needed or key in gguf.metadata else [1] * n_tokens


def _roles(gguf: GGUFFile, kinds: list[int], usual: Mapping[str, int]) -> dict[str, int | None]:
    """Which token has which role; where the file does not say, the `usual` one if that is no ordinary token."""
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    roles = {role: _token_id(gguf, key, len(kinds)) for role, key in keys.items()}
    for role, index in usual.items():
        if roles[role] is None and index < len(kinds) and kinds[index] in (UNKNOWN, CONTROL):
            roles[role] = index
    return roles


def _token_id(gguf: GGUFFile, key: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{key}"
    return gguf.meta_int(key, minimum=0, maximum=n_tokens - 1) if key in gguf.metadata else None


def _flag(gguf: GGUFFile, key: str, token_key: str, *, default: bool, token: int | None) -> bool:
    key = f"tokenizer.ggml.{key}"
    wanted = gguf.meta_bool(key, default=default)
    if wanted and token is None and key in gguf.metadata:
        _fail(gguf, f"{key} is true, but there is no tokenizer.ggml.{token_key}: convert the model again")
    return wanted


def _merges(gguf: GGUFFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in gguf.meta_strings("tokenizer.ggml.merges"):
        left, space, right = line.partition(" ")
        if not (space and left in vocab and right in vocab and left + right in vocab):
            _fail(gguf, f"merge {len(merges)} is not of two tokens into one: {line[:80]!a}")
        merges.append((left, right))
    return merges


def _added_tokens(tokens: list[str], kinds: list[int], with_role: set[int]) -> dict[int, AddedToken]:
    """The tokens that are found in text whole, before it is cut: id -> token, ids ascending."""
    added: dict[int, AddedToken] = {}
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        special = kind in (UNKNOWN, CONTROL) or index in with_role
        if token and (special or kind == USER_DEFINED):
            added[index] = AddedToken(token, normalized=False, special=special)
    return added


def _eos_ids(
    gguf: GGUFFile, vocab: dict[str, int], kinds: list[int], eos: int | None, chat_template: str
) -> tuple[int, ...]:
    ids = [eos, _token_id(gguf, "eot_token_id", len(vocab)), _token_id(gguf, "eom_token_id", len(vocab))]
    for token in _TURN_ENDS:
        index = vocab.get(token)
        if index is not None and kinds[index] == CONTROL and token in chat_template:
            ids.append(index)
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def _template(gguf: GGUFFile, before: list[tuple[str, int]], after: list[tuple[str, int]]) -> Any:
    def around(sequence: str, kind: int) -> list[str]:
        return [f"{piece}:{kind}" for piece in (*(t for t, _ in before), sequence, *(t for t, _ in after))]

    for token, _ in (*before, *after):
        if ":" in token or token.startswith("$"):  # these mean something else in a template
            _fail(gguf, f"wants {token[:80]!a} around every text, which a tokenizer.json cannot say")
    return processors.TemplateProcessing(
        single=around("$A", 0), pair=around("$A", 0) + around("$B", 1), special_tokens=[*before, *after]
    )


def _as_dict(token: AddedToken) -> dict[str, Any]:
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
    }


def _fail(gguf: GGUFFile, reason: str) -> NoReturn:
    raise CheckpointError(f"{gguf.path}: {reason}")
