"""`Tokenizer`: text to token ids and back, where text that users typed can never become a special token.

Special tokens control a model (the end of a turn, the start of a text). Only the chat template can write them; in user
text the same spelling stays text.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llm_edge.runtime.errors import ContextLengthError, TemplateError
from llm_edge.runtime.safe_io import MIB, read_text
from llm_edge.runtime.text import tokenizer_library as library
from llm_edge.runtime.text.chat_template import ChatTemplate, plain_messages, plain_tools
from llm_edge.runtime.text.lazy_tokenizer import Backend
from llm_edge.runtime.text.special_token_mask import SpecialTokenMask, Spellings, any_of
from llm_edge.runtime.text.table_cache import cached_tokenizer
from llm_edge.runtime.text.template_budget import plain_data
from llm_edge.runtime.text.tokenizer_files import (
    configured_templates,
    load_checked,
    load_spec,
    named_tokens,
    with_names,
)

_CONTROL = re.compile(r"[<\[|].*\S.*[>\]|]")  # no white space, which some tokenizers have tokens for
_ALWAYS_ENCODED = 16  # characters per token of the context; the longest token is looked for beyond that
_HELD = 3  # maximum number of tokens held back: a character has at most four bytes
_BATCH = 64  # tokens decoded at once when searching the vocabulary
_WINDOW = 32  # tokens after which a stream drops the first half of an undecodable run


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A conversation that can be rendered, as a whole or in parts, and encoded.

    Attributes:
        chat: the template.
        messages: the messages, in which characters that would spell a special token are replaced.
        variables: further variables of the template, likewise.
        encode: the ids of text rendered from `messages`; raises ContextLengthError for a text that certainly has more
            than the given number of tokens (None = no limit), and InputError.
    """

    chat: ChatTemplate
    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    encode: Callable[[str, int | None], list[int]]

    def render(self, messages: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> str:
        """The text of all or of the given messages; `variables` replace those of the conversation."""
        return self.chat.render(self.messages if messages is None else messages, **{**self.variables, **variables})


class Tokenizer:
    """A bundle's tokenizer.

    Attributes:
        vocab_size: number of ids, including added tokens.
        special_ids: ids of the special tokens.
        special_tokens: their text by role (`bos_token`, ...), from tokenizer_config.json.
        bos_token_id, eos_token_id: None if tokenizer_config.json does not name them.
        chat: the chat template, if there is one.
        tool_chat: the chat template for conversations with tools, if it is another one.
    """

    def __init__(
        self,
        backend: Backend,
        named: Mapping[str, str],
        chat: ChatTemplate | None,
        tool_chat: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self.chat = chat
        self.tool_chat = tool_chat
        self.special_tokens = dict(named)
        added = backend.get_added_tokens_decoder()
        self._specials = {token.content: number for number, token in added.items() if token.special}
        self.special_ids = frozenset(self._specials.values())
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self.token_id(named["bos_token"]) if "bos_token" in named else None
        self.eos_token_id = self.token_id(named["eos_token"]) if "eos_token" in named else None
        # A token that is matched in normalized text has further spellings.
        self._many_spellings = any(token.special and token.normalized for token in added.values()) and bool(
            backend.normalizer
        )
        self._added = [token.content for token in added.values()]
        secret = secrets.token_hex(12)
        self._renamed = {text: f"<|{secret}{number:08d}|>" for text, number in self._specials.items()}
        sources = "".join(template.source for template in (chat, tool_chat) if template is not None)
        others = {token.content: number for number, token in added.items() if not token.special}
        self._controls = {
            text: f"<|{secret}{number:08d}|>"
            for text, number in others.items()
            if _CONTROL.fullmatch(text) and text in sources
        }

    @classmethod
    def from_files(
        cls,
        tokenizer_json: Path,
        config: Mapping[str, Any],
        chat_template: str | None,
        named_templates: Mapping[str, str] | None = None,
        *,
        vocab_size: int | None = None,
        cached: bool = False,
    ) -> Tokenizer:
        """Read tokenizer.json.

        Args:
            tokenizer_json: the file.
            config: content of tokenizer_config.json.
            chat_template: source of the chat template; None = the one in `config`, if any.
            named_templates: sources of further templates, by name.
            vocab_size: number of tokens of the model, which limits the size of the file.
            cached: a large vocabulary may be loaded in parts, from a table in the user's cache; see `cached_tokenizer`.

        Without `chat_template` and `named_templates`, the config's own templates are used.

        Raises:
            BundleError: the file, or the config's special tokens, cannot be used.
            TemplateError: the chat template cannot be used.
        """
        if cached:
            named = named_tokens(config, tokenizer_json)
            backend = cached_tokenizer(tokenizer_json, named, vocab_size)
            return cls.of(backend, named, config, chat_template, named_templates)
        text = read_text(tokenizer_json, 256 * MIB)
        return cls.from_json(text, tokenizer_json, config, chat_template, named_templates, vocab_size=vocab_size)

    @classmethod
    def from_json(
        cls,
        text: str,
        where: Path,
        config: Mapping[str, Any],
        chat_template: str | None,
        named_templates: Mapping[str, str] | None = None,
        *,
        vocab_size: int | None = None,
    ) -> Tokenizer:
        """As `from_files`, from the content of a tokenizer.json; `where` names it in messages."""
        named = named_tokens(config, where)
        backend = load_checked(text, where, named, vocab_size)
        return cls.of(backend, named, config, chat_template, named_templates)

    @classmethod
    def of(
        cls,
        backend: Backend,
        named: Mapping[str, str],
        config: Mapping[str, Any],
        chat_template: str | None,
        named_templates: Mapping[str, str] | None,
    ) -> Tokenizer:
        """As `from_files`, from a loaded tokenizer and the special tokens that the config names."""
        templates = dict(named_templates or {})
        if chat_template is not None:
            templates["default"] = chat_template
        templates = templates or configured_templates(config)
        chats = {name: ChatTemplate(text, named) for name, text in templates.items() if name in ("default", "tool_use")}
        return cls(backend, named, chats.get("default"), chats.get("tool_use"))

    # Some vocabularies have thousands of special tokens, which take long to compile.

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        return any_of(self._added)

    @functools.cached_property
    def _special_spellings(self) -> Spellings:
        return Spellings(self._specials)

    @functools.cached_property
    def _control_spellings(self) -> Spellings:
        return Spellings([*self._specials, *self._controls]) if self._controls else self._special_spellings

    def token_id(self, text: str) -> int | None:
        """The id of the token with this text in the vocabulary."""
        return self._backend.token_to_id(text)

    def token_text(self, number: int) -> str | None:
        """The text of a token in the vocabulary; None if there is no such id."""
        text: str | None = self._backend.id_to_token(number)
        return text

    def to_json(self) -> str:
        """The content of an equivalent tokenizer.json."""
        return str(self._backend.to_str())

    def texts_with(self, char: str, ids: range) -> dict[int, str]:
        """The texts of the tokens that contain a character, by id; special tokens have no text.

        Searching a vocabulary of 262,144 tokens takes about 0.2 s.
        """
        found = {}
        byte = self.token_id(f"<0x{ord(char):02X}>")  # next to other bytes it would not decode
        for start in range(0, len(ids), _BATCH):
            some = list(ids[start : start + _BATCH])
            if char not in self.decode(some, skip_special=False) and byte not in some:
                continue
            for number in some:
                once = self.decode([number])  # empty for special tokens
                if char in once:  # decoders may trim the first token, so the second one counts
                    found[number] = self.decode([number, number])[len(once) :]
        return found

    def encode(self, text: str, *, parse_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            text: to encode.
            parse_special: trust the text: spelled special tokens become these tokens. Otherwise they stay text.
            add_special_tokens: add what the model expects around a text, often a bos token.
        """
        if parse_special or not (self._many_spellings or self._special_spellings.occur_in(text)):
            return library.encode(self._backend, text, add_special_tokens)
        return library.encode(self._without_specials, text, add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; unknown ids are skipped."""
        return library.decode(self._backend, ids, skip_special)

    def check_length(self, text: str, max_tokens: int | None) -> None:
        """Raise ContextLengthError for a text with more characters than so many tokens have; None = no limit.

        Some texts take long to encode, or make the library panic, so prompts are checked first.
        """
        if max_tokens is not None and len(text) > _ALWAYS_ENCODED * max_tokens:
            least = -(-len(text) // self._longest_token)
            if least > max_tokens:
                raise ContextLengthError(least, max_tokens, at_least=True)

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token; never more than it decodes to."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int | None = None, /, **variables: Any
    ) -> list[int]:
        """The ids of a conversation rendered with the chat template; see `prepare_chat` and `check_length`.

        Raises:
            TemplateError: there is no template, or it rejects the conversation.
            ContextLengthError: the conversation certainly has more than `max_tokens`.
            InputError: the library cannot encode it.
        """
        prepared = self.prepare_chat(messages, **variables)
        return prepared.encode(prepared.render(), max_tokens)

    def prepare_chat(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> PreparedChat:
        """A conversation, ready to be rendered and encoded; `variables` are those of `ChatTemplate.render`.

        As in transformers, the template named `tool_use` is taken if there is one and tools are given.

        Special tokens that the template writes become tokens; what messages, tools and other variables spell does not,
        not even where the end of a string and the template's text or another string together spell one. Not covered:
        the ends of strings that equal a literal of the template, and templates that remove from the middle of a string
        what kept such a spelling apart.

        Other added tokens that occur in the template, such as `<think>`, are treated likewise in questions, tools and
        their results. In answers and system messages they become tokens, because the model generates them, and
        instructions are written with them.

        Raises:
            TemplateError: there is no template, or the conversation or the variables are malformed.
        """
        tools = variables.get("tools")
        chat = self.tool_chat if tools is not None and self.tool_chat is not None else self.chat
        if chat is None:
            only = " without tools" if self.tool_chat is not None else ""
            raise TemplateError(f"the model has no chat template{only}: give a prompt instead of messages")
        plain = plain_messages(messages)
        data = {name: plain_data(value, name) for name, value in variables.items() if name != "tools"}
        data["tools"] = plain_tools(tools)
        unmasked = [plain, data, chat.source]
        mask = SpecialTokenMask(self._special_spellings, self._control_spellings, chat.literals, unmasked)
        masked = [mask.message(message, i) for i, message in enumerate(plain)]
        masked_data = {name: mask.data(value, controls=name == "tools") for name, value in data.items()}
        return PreparedChat(chat, masked, masked_data, functools.partial(self._encode_rendered, mask))

    def _encode_rendered(self, mask: SpecialTokenMask, text: str, max_tokens: int | None) -> list[int]:
        """The ids of a text that was rendered from masked messages."""
        if not (mask.used or self._many_spellings):
            self.check_length(text, max_tokens)
            return library.encode(self._backend, text)
        # In the masked text, only the template can have written the spelling of a special token.
        names = {**self._renamed, **self._controls}
        text = self._added_pattern.sub(lambda match: names.get(match[0], match[0]), text)
        text = mask.restore(text)
        self.check_length(text, max_tokens)
        return library.encode(self._without_controls, text)

    @functools.cached_property
    def _without_specials(self) -> tokenizers.Tokenizer:
        """The same tokenizer with its special tokens under secret names, so that their spelling is ordinary text."""
        return self._with_names(self._renamed)

    @functools.cached_property
    def _without_controls(self) -> tokenizers.Tokenizer:
        """Likewise, with the other control tokens under secret names too."""
        return self._with_names({**self._renamed, **self._controls}) if self._controls else self._without_specials

    def _with_names(self, names: Mapping[str, str]) -> tokenizers.Tokenizer:
        spec = with_names(json.loads(self._backend.to_str()), names)
        return load_spec(json.dumps(spec), "tokenizer.json with its special tokens renamed")


class TextStream:
    """Incremental detokenizer: turns token ids into text that is never revised.

    For byte-level tokenizers the parts add up to `Tokenizer.decode` of all ids; with a byte fallback they do if the
    bytes are valid text. Special tokens have no text, except those in `shown`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: Iterable[int] = ()) -> None:
        self._decode: Callable[[list[int]], str] = functools.partial(tokenizer.decode, skip_special=False)
        self._skipped = tokenizer.special_ids.difference(shown) if skip_special else frozenset()
        self._window: list[int] = []  # ids already returned, kept as context, and those after them
        self._context = 0  # number of ids kept as context
        self._returned = 0  # characters of the window's text returned so far

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is final now, possibly none."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip("\ufffd")
        waited = len(self._window) - self._context > _HELD  # so the first token after the context is final
        certain = max(len(whole), len(text) - _HELD) if waited else len(whole)
        piece = text[self._returned : certain]
        self._returned = max(self._returned, certain)
        if len(whole) == len(text) and piece:  # the window ends at a character boundary
            self._restart(self._context, held=0)
        elif len(self._window) > _WINDOW:  # a long undecodable run
            self._restart(_WINDOW // 2, held=len(text) - certain)
        return piece

    def flush(self) -> str:
        """Return what was held back."""
        piece = self._decode(self._window)[self._returned :]
        self._window, self._context, self._returned = [], 0, 0
        return piece

    def _restart(self, start: int, held: int) -> None:
        del self._window[:start]
        self._context = len(self._window)
        self._returned = max(0, len(self._decode(self._window)) - held)
