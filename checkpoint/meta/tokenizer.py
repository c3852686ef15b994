"""Finds the tokenizer of a state dict and makes a `tokenizer.json` of it. Knows no tensors, no roles and no template.

Either there is a `tokenizer.json`, or the two files of a byte-level BPE, `…vocab.json` and `…merges.txt`, which are
read as `tokenizers.ByteLevelBPETokenizer` reads them by default: cut by GPT-2's rule, no space put in front.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import pre_tokenizers

from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, read_text

_JSON, _VOCAB, _MERGES, _SENTENCEPIECE = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"
_MOST_BYTES = 64 * MIB
_MOST_TOKENS = 4_000_000
_PATHS = ("tokenizer_dir", "vocab_file", "merges_file")
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_UNREAD = "a SentencePiece or tiktoken model, which is not read"
_WANTED = f"a {_JSON}, or …{_VOCAB} with its …{_MERGES}"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Where a tokenizer lies: one file, or a vocabulary and its merges."""

    main: Path
    merges: Path | None


class Vocabulary:
    """The content of a tokenizer.json.

    Args:
        spec: the parsed file.
        where: its path, for messages.

    Attributes:
        where: as above.
    """

    def __init__(self, spec: Mapping[str, Any], where: str) -> None:
        self._spec = spec
        self.where = where
        model = spec.get("model")
        tokens = model.get("vocab") if isinstance(model, Mapping) else None
        added = spec.get("added_tokens") or []
        if not isinstance(model, Mapping) or not isinstance(tokens, Mapping | list) or not isinstance(added, list):
            self._fail("not a tokenizer that can be used: it has no vocabulary")
        if isinstance(tokens, list):  # Unigram: [text, score]
            if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in tokens):
                self._fail("not a tokenizer that can be used: an entry of its vocabulary is no token with a score")
            tokens = {entry[0]: index for index, entry in enumerate(tokens)}
        if not all(isinstance(entry, Mapping) and _is_id(entry.get("id")) for entry in added):
            self._fail("not a tokenizer that can be used: an entry of added_tokens has no id")
        if not all(isinstance(entry.get("content"), str) for entry in added):
            self._fail("not a tokenizer that can be used: an entry of added_tokens has no text for its content")
        self._added: dict[int, Mapping[str, Any]] = {entry["id"]: entry for entry in added}
        self._ids = {**tokens, **{entry["content"]: index for index, entry in self._added.items()}}
        if not all(isinstance(text, str) and _is_id(index) for text, index in self._ids.items()):
            self._fail("not a tokenizer that can be used: an entry of its vocabulary is no token with an id")
        self._texts: dict[int, str] = {index: text for text, index in self._ids.items()}
        merges = model.get("merges") if model.get("type") == "BPE" else None
        self._made = {"".join(pair) for pair in map(_pair, merges)} if isinstance(merges, list) else None

    def id(self, text: str) -> int | None:
        """Id of the token that is written so."""
        return self._ids.get(text)

    def text(self, index: int) -> str | None:
        """How a token is written."""
        return self._texts.get(index)

    def is_control(self, index: int) -> bool:
        """Whether there is a token of this id that no text is cut into: in a BPE, one that no merges lead to."""
        text = self._texts.get(index)
        if not text or index in self._added:
            return bool(text)
        return self._made is None or not (text in self._made or len(text) == 1)

    def with_special(self, indices: Iterable[int]) -> str:
        """Text of the tokenizer.json with these tokens special, under their own spellings."""
        added = dict(self._added)
        for index in indices:
            entry = {**_ADDED, "id": index, "content": self._texts[index]}
            added[index] = {**entry, **added.get(index, {}), "special": True}
        content = {**self._spec, "added_tokens": [added[index] for index in sorted(added)]}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            self._fail("not a tokenizer that can be used: half a surrogate pair, which is no character, is in it")
        return text

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {reason}")


def find_tokenizer(
    checkpoint: Path, given: Path | None, config: Path | None, paths: ConfigReader | None
) -> TokenizerFiles:
    """The tokenizer a user gives, else the one its config names, else the one beside the checkpoint or the config.

    Paths in a config may be relative to its folder, to one of the two above, to that of the checkpoint, or to the one
    above that; `vocab_file` and `merges_file` lie in `tokenizer_dir` or are relative to the same places.

    Args:
        checkpoint: the file of weights.
        given: folder or file (`--tokenizer`), or None.
        config: the config file, or None.
        paths: its section `paths`, or None.

    Raises:
        CheckpointError: there is none, or it is not clear which.
    """
    if given is not None:
        return _given(given)
    beside = [checkpoint.parent] if config is None else [checkpoint.parent, config.parent]
    roots = [*_up(config, 3), *_up(checkpoint, 2)]
    named = _named(paths, roots) if paths is not None else None
    found = named or next(filter(None, map(_inside, beside)), None)
    if found is not None:
        return found
    names = [f"{key}: {paths.text(key)}" for key in _PATHS if paths is not None and key in paths]
    looked = f"; {paths.where} names {', '.join(names)}, not found there" if paths is not None and names else ""
    where = f"{checkpoint}: no tokenizer beside it{_sentencepiece(beside)}{looked}"
    raise CheckpointError(f"{where}: give --tokenizer with the folder of {_WANTED}")


def read_vocabulary(files: TokenizerFiles) -> Vocabulary:
    """Read a tokenizer's files.

    Raises:
        CheckpointError: they are damaged, or do not belong together.
    """
    content = read_json(files.main, _MOST_BYTES, error=CheckpointError)
    if files.merges is None:
        return Vocabulary(content, str(files.main))
    if not all(map(_is_id, content.values())):
        raise CheckpointError(f"{files.main}: not a vocabulary: a JSON object from tokens to their ids is needed")
    texts = {index: text for text, index in content.items()}
    if len(texts) != len(content):
        twice = next(text for text, index in content.items() if texts[index] != text)
        raise CheckpointError(
            f"{files.main}: {twice[:80]!a} and {texts[content[twice]][:80]!a} have the same id: the file is damaged"
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
        "model": {"type": "BPE", "vocab": content, "merges": list(_merges(files.merges, content))},
    }
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if not alphabet & content.keys():
        raise CheckpointError(f"{files.main}: not the vocabulary of a byte-level BPE: give a {_JSON} with --tokenizer")
    return Vocabulary(spec, str(files.main))


def _merges(path: Path, vocabulary: Mapping[str, int]) -> Iterator[list[str]]:
    """Lines of two tokens each; those that begin with `#version` are skipped, as `tokenizers` does."""
    lines = read_text(path, _MOST_BYTES, error=CheckpointError).split("\n")
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise CheckpointError(
                f"{path}: line {number} is not a merge of two tokens into one of the vocabulary: {line[:80]!a}"
            )
        yield pair


def _given(path: Path) -> TokenizerFiles:
    if _is_dir(path):
        found = _inside(path)
        if found is None:
            raise CheckpointError(f"--tokenizer: {path} holds no tokenizer{_sentencepiece([path])}: give {_WANTED}")
        return found
    if not _is_file(path):
        raise CheckpointError(f"--tokenizer: {path}: no such file or folder")
    if path.name.endswith(_VOCAB) or path.name.endswith(_MERGES):
        suffix, other = (_VOCAB, _MERGES) if path.name.endswith(_VOCAB) else (_MERGES, _VOCAB)
        pair = path, path.with_name(path.name.removesuffix(suffix) + other)
        if not _is_file(pair[1]):
            raise CheckpointError(f"--tokenizer: {path} needs {pair[1].name} beside it, which is missing")
        return TokenizerFiles(*(pair if suffix == _VOCAB else pair[::-1]))
    if path.name != _JSON:
        why = _UNREAD if path.suffix == ".model" else "no known tokenizer"
        raise CheckpointError(f"--tokenizer: {path}: {why}: give {_WANTED}")
    return TokenizerFiles(path, None)


def _inside(folder: Path) -> TokenizerFiles | None:
    """The tokenizer in a folder; a tokenizer.json before all others."""
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
        raise CheckpointError(f"{folder} holds {len(pairs)} tokenizers ({names}): name one with --tokenizer FILE")
    return pairs[0] if pairs else None


def _named(paths: ConfigReader, roots: Iterable[Path]) -> TokenizerFiles | None:
    """The tokenizer that a config names, in the first place that holds it."""
    folder, vocab, merges = (paths.text(key, "") for key in _PATHS)
    if vocab and not merges and vocab.endswith(_VOCAB):
        merges = vocab.removesuffix(_VOCAB) + _MERGES
    for root in roots:
        if vocab and merges:
            for base in dict.fromkeys((root / folder, root)):
                if _is_file(base / vocab) and _is_file(base / merges):
                    return TokenizerFiles(base / vocab, base / merges)
        elif folder and (found := _inside(root / folder)) is not None:
            return found
    return None


def _up(path: Path | None, levels: int) -> list[Path]:
    """The folder of a file and those above it."""
    return [] if path is None else list(path.absolute().parents[:levels])


def _sentencepiece(folders: Iterable[Path]) -> str:
    found = next((folder / _SENTENCEPIECE for folder in folders if _is_file(folder / _SENTENCEPIECE)), None)
    return f" but {found}, {_UNREAD}" if found is not None else ""


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
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS


def _pair(merge: Any) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return pair if isinstance(pair, list) and all(isinstance(part, str) for part in pair) else []
