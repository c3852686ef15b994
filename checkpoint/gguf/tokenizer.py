"""Reads the tokenizer of a GGUF file and converts it to the files of a Hugging Face tokenizer.

For byte-level BPE, GGUF stores the vocabulary, the merges and the type of every token, but only the *name* of the
pre-tokenizer (`tokenizer.ggml.pre`), see `checkpoint/text/pre_tokenizers.py`. SentencePiece vocabularies are converted
in `sentencepiece.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, processors
from tokenizers.models import BPE

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.gguf import sentencepiece
from llm_edge.checkpoint.gguf.end_tokens import find_end_tokens, token_id
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.text.pre_tokenizers import PRE_TOKENIZERS, UNSUPPORTED, PreTokenizer
from llm_edge.checkpoint.text.sentencepiece_bpe import CONTROL, UNKNOWN, USER_DEFINED


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
    ends = find_end_tokens(gguf, vocab)
    types = [CONTROL if index in ends else each for index, each in enumerate(types)]
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

    named = {role: tokens[index] for role, index in roles.items() if index is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "add_prefix_space": is_sentencepiece and sentencepiece.adds_prefix_space(gguf),
        "added_tokens_decoder": {str(index): _as_dict(token) for index, token in added.items()},
        **{role: named.get(role) for role in roles},
        "clean_up_tokenization_spaces": False,
        **_max_length(gguf),
    }
    return TokenizerAssets(
        tokenizer_json=tokenizer.to_str(pretty=not is_sentencepiece),
        tokenizer_config=config,
        special_tokens_map=dict(named),
        chat_template=gguf.meta_str("tokenizer.chat_template", default="") or None,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys([eos, *ends] if eos is not None else ends)),
        pad_token_id=roles["pad_token"],
        named_templates=_named_templates(gguf),
    )


def _named_templates(gguf: GGUFFile) -> dict[str, str]:
    """Return the template for conversations with tools; llama.cpp uses no other one."""
    tools = gguf.meta_str("tokenizer.chat_template.tool_use", default="")
    return {"tool_use": tools} if tools else {}


def _max_length(gguf: GGUFFile) -> dict[str, int]:
    context = f"{gguf.meta_str('general.architecture')}.context_length"
    return {"model_max_length": gguf.meta_int(context, minimum=1)} if context in gguf.metadata else {}


def _build_byte_level(gguf: GGUFFile, vocab: dict[str, int], pre: PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(gguf, vocab), ignore_merges=pre.ignore_merges))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(gguf: GGUFFile) -> PreTokenizer:
    name = gguf.meta_str("tokenizer.ggml.pre", default="default")
    if name == "default":
        gguf.fail(
            "does not name its pre-tokenizer (tokenizer.ggml.pre), so text would be split incorrectly: "
            "convert the model again with a current llama.cpp"
        )
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        known = "is not supported" if name in UNSUPPORTED else "(tokenizer.ggml.pre) is not known"
        gguf.fail(f"the pre-tokenizer {name[:80]!a} {known}: export the model's Hugging Face folder instead")
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
    roles = {role: token_id(gguf, key, len(types)) for role, key in keys.items()}
    for role, index in defaults.items():
        if roles[role] is None and index < len(types) and types[index] in (UNKNOWN, CONTROL):
            roles[role] = index
    return roles


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
