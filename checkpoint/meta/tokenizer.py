"""Finds the tokenizer of a state dict and converts it to a `tokenizer.json`.

Supported are a `tokenizer.json`, or the two files of a byte-level BPE, `…vocab.json` and `…merges.txt`, which are read
with the defaults of `tokenizers.ByteLevelBPETokenizer`: GPT-2's pre-tokenizer and no prefix space; or a vocabulary that
`convert_tokenizer` reads, such as Meta's `tokenizer.model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import pre_tokenizers

from llm_edge.checkpoint.huggingface.tokenizer_conversion import convert_tokenizer, find_vocabulary
from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.checkpoint.text.vocab_merges import read_merges
from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json

_JSON, _VOCAB, _MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_MAX_BYTES = 64 * MIB
_MAX_TOKENS = 4_000_000
_PATHS = ("tokenizer_dir", "vocab_file", "merges_file")
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_SUPPORTED = f"a {_JSON}, a tokenizer.model or tekken.json, or …{_VOCAB} with its …{_MERGES}"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Files of a tokenizer."""

    main: Path  # `tokenizer.json`, the vocabulary of a byte-level BPE, or one to convert
    merges: Path | None  # the merges of a byte-level BPE

    def convert(self) -> ConvertedTokenizer | None:
        """Convert a vocabulary of another kind than the first two; None if it is of these."""
        if self.merges is not None or (self.main.suffix == ".json" and self.main.name != "tekken.json"):
            return None
        path = self.main.parent / "tokenizer_config.json"
        config = read_json(path, error=CheckpointError) if _is_file(path) else {}
        return convert_tokenizer(self.main.parent, config)


class Vocabulary:
    """Tokens of a parsed `tokenizer.json`; `where` is its path, for error messages."""

    def __init__(self, spec: Mapping[str, Any], where: str) -> None:
        self._spec = spec
        self.where = where
        model = spec.get("model")
        tokens = model.get("vocab") if isinstance(model, Mapping) else None
        added = spec.get("added_tokens") or []
        if not isinstance(model, Mapping) or not isinstance(tokens, Mapping | list) or not isinstance(added, list):
            self._fail("invalid tokenizer: no vocabulary")
        if isinstance(tokens, list):  # Unigram: [text, score]
            if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in tokens):
                self._fail("invalid tokenizer: a vocabulary entry is not a token with a score")
            tokens = {entry[0]: index for index, entry in enumerate(tokens)}
        if not all(isinstance(entry, Mapping) and _is_id(entry.get("id")) for entry in added):
            self._fail("invalid tokenizer: an entry of added_tokens has no id")
        if not all(isinstance(entry.get("content"), str) for entry in added):
            self._fail("invalid tokenizer: an entry of added_tokens has no content")
        self._added: dict[int, Mapping[str, Any]] = {entry["id"]: entry for entry in added}
        self._ids = {**tokens, **{entry["content"]: index for index, entry in self._added.items()}}
        if not all(isinstance(text, str) and _is_id(index) for text, index in self._ids.items()):
            self._fail("invalid tokenizer: a vocabulary entry is not a token with an id")
        self._texts: dict[int, str] = {index: text for text, index in self._ids.items()}
        merges = model.get("merges") if model.get("type") == "BPE" else None
        self._merged = {"".join(pair) for pair in map(_pair, merges)} if isinstance(merges, list) else None

    def id(self, text: str) -> int | None:
        """Return the id of a token, or None."""
        return self._ids.get(text)

    def text(self, index: int) -> str | None:
        """Return the text of a token, or None."""
        return self._texts.get(index)

    def is_control(self, index: int) -> bool:
        """Whether this id is a token that encoding text never produces: in a BPE, one that no merge produces."""
        text = self._texts.get(index)
        if not text or index in self._added:
            return bool(text)
        return self._merged is None or not (text in self._merged or len(text) == 1)

    def with_special(self, indices: Iterable[int]) -> str:
        """Return the text of the tokenizer.json with these tokens marked as special."""
        added = dict(self._added)
        for index in indices:
            entry = {**_ADDED, "id": index, "content": self._texts[index]}
            added[index] = {**entry, **added.get(index, {}), "special": True}
        content = {**self._spec, "added_tokens": [added[index] for index in sorted(added)]}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            self._fail("invalid tokenizer: a token contains an unpaired surrogate")
        return text

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {reason}")


def find_tokenizer(
    checkpoint: Path, given: Path | None, config: Path | None, paths: ConfigReader | None
) -> TokenizerFiles:
    """Find the tokenizer given by a flag, else by the config, else beside the checkpoint or the config.

    Paths in a config may be relative to its folder, to the two folders above, to the checkpoint's folder, or to the
    folder above that; `vocab_file` and `merges_file` may also be relative to `tokenizer_dir`.

    Raises:
        CheckpointError: there is no tokenizer, or several.
    """
    if given is not None:
        return _from_flag(given)
    beside = [checkpoint.parent] if config is None else [checkpoint.parent, config.parent]
    roots = [*_parents(config, 3), *_parents(checkpoint, 2)]
    named = _from_config(paths, roots) if paths is not None else None
    found = named or next(filter(None, map(_in_folder, beside)), None)
    if found is not None:
        return found
    names = [f"{key}: {paths.text(key)}" for key in _PATHS if paths is not None and key in paths]
    missing = f"; {paths.where} names {', '.join(names)}, which do not exist" if paths is not None and names else ""
    raise CheckpointError(
        f"{checkpoint}: no tokenizer in its folder{missing}: give --tokenizer with the folder of {_SUPPORTED}"
    )


def read_vocabulary(files: TokenizerFiles, converted: ConvertedTokenizer | None = None) -> Vocabulary:
    """Read the files of a tokenizer; `converted` is the result of their `convert`.

    Raises:
        CheckpointError: a file is damaged, or the files do not match.
    """
    if converted is not None:
        return Vocabulary(json.loads(converted.tokenizer_json), str(files.main))
    content = read_json(files.main, _MAX_BYTES, error=CheckpointError)
    if files.merges is None:
        return Vocabulary(content, str(files.main))
    if not all(map(_is_id, content.values())):
        raise CheckpointError(f"{files.main}: not a vocabulary: a JSON object from tokens to ids is required")
    texts = {index: text for text, index in content.items()}
    if len(texts) != len(content):
        duplicate = next(text for text, index in content.items() if texts[index] != text)
        raise CheckpointError(
            f"{files.main}: {duplicate[:80]!a} and {texts[content[duplicate]][:80]!a} have the same id: the file is "
            "damaged"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": content, "merges": list(read_merges(files.merges, content))},
    }
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if not alphabet & content.keys():
        raise CheckpointError(f"{files.main}: not the vocabulary of a byte-level BPE: give a {_JSON} with --tokenizer")
    return Vocabulary(spec, str(files.main))


def _from_flag(path: Path) -> TokenizerFiles:
    if _is_dir(path):
        found = _in_folder(path)
        if found is None:
            raise CheckpointError(f"--tokenizer: {path} has no tokenizer: give {_SUPPORTED}")
        return found
    if not _is_file(path):
        raise CheckpointError(f"--tokenizer: {path}: no such file or folder")
    if path.name.endswith(_VOCAB) or path.name.endswith(_MERGES):
        suffix, other = (_VOCAB, _MERGES) if path.name.endswith(_VOCAB) else (_MERGES, _VOCAB)
        pair = path, path.with_name(path.name.removesuffix(suffix) + other)
        if not _is_file(pair[1]):
            raise CheckpointError(f"--tokenizer: {path} requires {pair[1].name} beside it, which is missing")
        return TokenizerFiles(*(pair if suffix == _VOCAB else pair[::-1]))
    if path.name != _JSON and path != find_vocabulary(path.parent):
        raise CheckpointError(f"--tokenizer: {path}: not a supported tokenizer: give {_SUPPORTED}")
    return TokenizerFiles(path, None)


def _in_folder(folder: Path) -> TokenizerFiles | None:
    """Return the tokenizer in a folder, preferring tokenizer.json and vocabularies with merges, or None."""
    if _is_file(folder / _JSON):
        return TokenizerFiles(folder / _JSON, None)
    if not _is_dir(folder):
        return None
    vocabularies, merges = (sorted(filter(_is_file, folder.glob(f"*{name}"))) for name in (_VOCAB, _MERGES))
    pairs = [
        TokenizerFiles(path, beside)
        for path in vocabularies
        if (beside := path.with_name(path.name.removesuffix(_VOCAB) + _MERGES)) in merges
    ]
    if not pairs and len(vocabularies) == len(merges) == 1:
        pairs = [TokenizerFiles(vocabularies[0], merges[0])]
    if len(pairs) > 1:
        names = ", ".join(pair.main.name for pair in pairs[:3])
        raise CheckpointError(f"{folder} has {len(pairs)} tokenizers ({names}): select one with --tokenizer FILE")
    if pairs:
        return pairs[0]
    found = find_vocabulary(folder)
    return None if found is None else TokenizerFiles(found, None)


def _from_config(paths: ConfigReader, roots: Iterable[Path]) -> TokenizerFiles | None:
    """Return the tokenizer that a config names, from the first root folder that contains it."""
    folder, vocab, merges = (paths.text(key, "") for key in _PATHS)
    if vocab and not merges and vocab.endswith(_VOCAB):
        merges = vocab.removesuffix(_VOCAB) + _MERGES
    for root in roots:
        if vocab and merges:
            for base in dict.fromkeys((root / folder, root)):
                if _is_file(base / vocab) and _is_file(base / merges):
                    return TokenizerFiles(base / vocab, base / merges)
        elif folder and (found := _in_folder(root / folder)) is not None:
            return found
    return None


def _parents(path: Path | None, levels: int) -> list[Path]:
    """Return the folder of a file and the folders above it."""
    return [] if path is None else list(path.absolute().parents[:levels])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system can hold
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_TOKENS


def _pair(merge: Any) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return pair if isinstance(pair, list) and all(isinstance(part, str) for part in pair) else []
