"""Finds the tokens that end an answer in the vocabulary of a GGUF file, by the rules of llama.cpp.

The metadata names one or a few of them; llama.cpp also recognizes the others by their text (`src/llama-vocab.cpp`), and
treats them as control tokens whatever type the file gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

from llm_edge.checkpoint.gguf.file import GGUFFile

END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip
# Tokens of code infilling that end an answer too: the key that names one, else the first of these texts.
INFILL_ENDS: Mapping[str, tuple[str, ...]] = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# In vocabularies with all of one set, the message goes on after "<|end|>".
_MESSAGE_ENDS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}, {"<|call|>", "<|flush|>"})
_WITH_NORMAL_S = {"<|tool_response>", "<|plamo:eos|>"}  # in vocabularies with one of these, "</s>" is ordinary text


def find_end_tokens(gguf: GGUFFile, vocab: Mapping[str, int]) -> list[int]:
    """Return the ids that end an answer, in ascending order.

    Raises:
        CheckpointError: a key of the metadata is not the id of a token.
    """
    found = {vocab[text] for text in END_TEXTS if text in vocab}
    for key, texts in INFILL_ENDS.items():
        named = token_id(gguf, key, len(vocab))
        found.update([named] if named is not None else [vocab[text] for text in texts if text in vocab][:1])
    found.update(index for key in _END_KEYS if (index := token_id(gguf, key, len(vocab))) is not None)
    texts_found = {text for text in {*END_TEXTS, *_WITH_NORMAL_S} if vocab.get(text) in found}
    if any(ends <= texts_found for ends in _MESSAGE_ENDS):
        found.discard(vocab.get("<|end|>", -1))
    if texts_found & _WITH_NORMAL_S:
        found.discard(vocab.get("</s>", -1))
    return sorted(found)


def token_id(gguf: GGUFFile, key: str, n_tokens: int) -> int | None:
    """Return the id that a key below `tokenizer.ggml` names; None without the key, or if its value means "none"."""
    key = f"tokenizer.ggml.{key}"
    if key not in gguf.metadata or gguf.metadata[key] in (-1, 2**32 - 1):
        return None
    return gguf.meta_int(key, minimum=0, maximum=n_tokens - 1)
