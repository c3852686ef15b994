"""Reads the tokenizer of a GGUF file and converts it to the files of a Hugging Face tokenizer.

For byte-level BPE, GGUF stores the vocabulary, the merges and the type of every token, but only the *name* of the
pre-tokenizer (`tokenizer.ggml.pre`); `_PRE_TOKENIZERS` lists the supported names. SentencePiece vocabularies are
converted in `sentencepiece.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.gguf import sentencepiece
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED

# Control tokens that end a turn in addition to `eos_token_id`, if the chat template uses them.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CAPITALIZED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPERCASE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = rf"{_CAPITALIZED}|{_UPPERCASE}|\p{{N}}{_AFTER_NUMBERS}"
_GPT4O = rf"{_CAPITALIZED}{_CONTRACTION}|{_UPPERCASE}{_CONTRACTION}|\p{{N}}{{1,3}}{_AFTER_NUMBERS}"


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """Pre-tokenization of a family, and the settings that llama.cpp derives from its name."""

    split: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False  # a word in the vocabulary is one token even if no merges form it
    add_bos: bool = False  # default of add_bos_token


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _regex(pattern: str) -> Callable[[], Any]:
    def build() -> Any:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


# Names that llama.cpp's converter writes, and the pre-tokenizer of the family's tokenizer.json. "default" is
# deliberately not supported: llama.cpp itself warns that the pre-tokenizer it uses for it degrades the output.
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "gpt-2": _PreTokenizer(_gpt2),
    "phi-2": _PreTokenizer(_gpt2),
    "smollm": _PreTokenizer(_digits),
    "starcoder": _PreTokenizer(_digits),
    "refact": _PreTokenizer(_digits),
    "codeshell": _PreTokenizer(_digits),
    "llama-bpe": _PreTokenizer(_regex(_LLAMA3), ignore_merges=True, add_bos=True),
    "llama-v3": _PreTokenizer(_regex(_LLAMA3), ignore_merges=True, add_bos=True),
    "llama3": _PreTokenizer(_regex(_LLAMA3), ignore_merges=True, add_bos=True),
    "qwen2": _PreTokenizer(_regex(_QWEN2), normalizer=normalizers.NFC),
    "tekken": _PreTokenizer(_regex(_TEKKEN), ignore_merges=True, add_bos=True),
    "gpt-4o": _PreTokenizer(_regex(_GPT4O)),
}


def read_tokenizer(gguf: GGUFFile) -> TokenizerAssets:
    """Build the tokenizer from the metadata of a GGUF file.

    Raises:
        CheckpointError: the tokenizer is neither byte-level BPE nor SentencePiece BPE, or its metadata is invalid.
    """
    model = gguf.meta_str("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        gguf.fail(
            f"the tokenizer type {model[:80]!a} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' "
            "(SentencePiece BPE)"
        )
    is_sentencepiece = model == "llama"
    pre = None if is_sentencepiece else _pre_tokenizer(gguf)
    tokens = gguf.meta_strings("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        duplicate = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        gguf.fail(f"has the token {duplicate[:80]!a} twice in its vocabulary: convert the model again")
    types = _token_types(gguf, len(tokens), required=is_sentencepiece)
    roles = _roles(gguf, types, sentencepiece.DEFAULT_ROLES if is_sentencepiece else {})
    bos, eos = roles["bos_token"], roles["eos_token"]
    add_bos_default = is_sentencepiece if pre is None else pre.add_bos
    add_bos = _flag(gguf, "add_bos_token", "bos_token_id", default=add_bos_default, token=bos)
    add_eos = _flag(gguf, "add_eos_token", "eos_token_id", default=False, token=eos)

    added = _added_tokens(tokens, types, {index for index in roles.values() if index is not None})
    if pre is None:
        tokenizer = sentencepiece.build_tokenizer(gguf, vocab, types)
    else:
        tokenizer = _build_byte_level(gguf, vocab, pre)
    before = [(tokens[bos], bos)] if add_bos and bos is not None else []
    after = [(tokens[eos], eos)] if add_eos and eos is not None else []
    if before or after:
        tokenizer.post_processor = _post_processor(gguf, before, after)
    tokenizer.add_tokens(list(added.values()))

    chat_template = gguf.meta_str("tokenizer.chat_template", default="") or None
    named = {role: tokens[index] for role, index in roles.items() if index is not None}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "add_prefix_space": is_sentencepiece and sentencepiece.adds_prefix_space(gguf),
        "added_tokens_decoder": {str(index): _as_dict(token) for index, token in added.items()},
        **{role: named.get(role) for role in roles},
        "clean_up_tokenization_spaces": False,
    }
    context = f"{gguf.meta_str('general.architecture')}.context_length"
    if context in gguf.metadata:
        config["model_max_length"] = gguf.meta_int(context, minimum=1)
    return TokenizerAssets(
        tokenizer_json=tokenizer.to_str(pretty=not is_sentencepiece),
        tokenizer_config=config,
        special_tokens_map=dict(named),
        chat_template=chat_template,
        bos_token_id=bos,
        eos_token_ids=_eos_ids(gguf, vocab, types, eos, chat_template or ""),
        pad_token_id=roles["pad_token"],
    )


def _build_byte_level(gguf: GGUFFile, vocab: dict[str, int], pre: _PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(gguf, vocab), ignore_merges=pre.ignore_merges))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(gguf: GGUFFile) -> _PreTokenizer:
    name = gguf.meta_str("tokenizer.ggml.pre", default="default")
    if name == "default":
        gguf.fail(
            "does not name its pre-tokenizer (tokenizer.ggml.pre), so text would be split incorrectly: "
            "convert the model again with a current llama.cpp"
        )
    found = _PRE_TOKENIZERS.get(name)
    if found is None:
        supported = ", ".join(sorted(_PRE_TOKENIZERS))
        gguf.fail(f"the pre-tokenizer {name[:80]!a} is not supported; supported: {supported}")
    return found


def _token_types(gguf: GGUFFile, n_tokens: int, *, required: bool) -> list[int]:
    key = "tokenizer.ggml.token_type"
    return gguf.meta_ints(key, length=n_tokens) if required or key in gguf.metadata else [1] * n_tokens


def _roles(gguf: GGUFFile, types: list[int], defaults: Mapping[str, int]) -> dict[str, int | None]:
    """Return the token id of each role; a missing one is the default if that is an unknown or control token."""
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    roles = {role: _token_id(gguf, key, len(types)) for role, key in keys.items()}
    for role, index in defaults.items():
        if roles[role] is None and index < len(types) and types[index] in (UNKNOWN, CONTROL):
            roles[role] = index
    return roles


def _token_id(gguf: GGUFFile, key: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{key}"
    return gguf.meta_int(key, minimum=0, maximum=n_tokens - 1) if key in gguf.metadata else None


def _flag(gguf: GGUFFile, key: str, token_key: str, *, default: bool, token: int | None) -> bool:
    key = f"tokenizer.ggml.{key}"
    value = gguf.meta_bool(key, default=default)
    if value and token is None and key in gguf.metadata:
        gguf.fail(f"{key} is true, but tokenizer.ggml.{token_key} is missing: convert the model again")
    return value


def _merges(gguf: GGUFFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in gguf.meta_strings("tokenizer.ggml.merges"):
        left, space, right = line.partition(" ")
        if not (space and left in vocab and right in vocab and left + right in vocab):
            gguf.fail(f"merge {len(merges)} does not join two tokens of the vocabulary into a third: {line[:80]!a}")
        merges.append((left, right))
    return merges


def _added_tokens(tokens: list[str], types: list[int], with_role: set[int]) -> dict[int, AddedToken]:
    """Return the tokens that are matched before pre-tokenization: id -> token, in ascending order of ids."""
    added: dict[int, AddedToken] = {}
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        special = token_type in (UNKNOWN, CONTROL) or index in with_role
        if token and (special or token_type == USER_DEFINED):
            added[index] = AddedToken(token, normalized=False, special=special)
    return added


def _eos_ids(
    gguf: GGUFFile, vocab: dict[str, int], types: list[int], eos: int | None, chat_template: str
) -> tuple[int, ...]:
    ids = [eos, _token_id(gguf, "eot_token_id", len(vocab)), _token_id(gguf, "eom_token_id", len(vocab))]
    for token in _TURN_ENDS:
        index = vocab.get(token)
        if index is not None and types[index] == CONTROL and token in chat_template:
            ids.append(index)
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def _post_processor(gguf: GGUFFile, before: list[tuple[str, int]], after: list[tuple[str, int]]) -> Any:
    def template(sequence: str, type_id: int) -> list[str]:
        return [f"{item}:{type_id}" for item in (*(t for t, _ in before), sequence, *(t for t, _ in after))]

    for token, _ in (*before, *after):
        if ":" in token or token.startswith("$"):  # syntax of the template
            gguf.fail(f"adds {token[:80]!a} to every text, which a tokenizer.json cannot express")
    return processors.TemplateProcessing(
        single=template("$A", 0), pair=template("$A", 0) + template("$B", 1), special_tokens=[*before, *after]
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
