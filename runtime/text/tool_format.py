"""`ToolFormat`: how a model's chat template writes calls of tools.

    opening  begin NAME between ARGUMENTS end  separator  begin NAME between ARGUMENTS end  closing

Arguments are a JSON object, or `ParameterFormat` for templates that write each argument in wrappers of its own. The
export stores the format in the manifest (`tool_calls`); `tool_format_of` finds it by rendering the chat template.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_edge.runtime.errors import BundleError

_MAX_TEXT = 200  # characters of a wrapper
# A leading tag such as <tool_call> or [TOOL_CALLS]: whatever the model writes after it is held to the format.
_TAG = re.compile(r"\s*(?:<[^<>\s]{2,60}>|\[[A-Z_]{4,40}\])")


@dataclass(frozen=True, slots=True)
class ParameterFormat:
    """How each argument is written where arguments are not a JSON object: begin NAME between VALUE end.

    Attributes:
        begin, between, end: around the name and the value.
        separator: between two arguments.
        quoted: strings are written as JSON, as other values always are.
    """

    begin: str
    between: str
    end: str
    separator: str = ""
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls are written; see the module.

    Attributes:
        opening, closing: before the first and after the last call.
        begin, between, end: around the name and the arguments of a call.
        separator: between two calls; None = the template writes one call only.
        item_separator, key_separator: of the JSON of arguments.
        parameters: None = arguments are a JSON object.
        native: the template writes calls itself, and lists the tools.
    """

    begin: str
    between: str
    end: str
    opening: str = ""
    closing: str = ""
    separator: str | None = None
    item_separator: str = ", "
    key_separator: str = ": "
    parameters: ParameterFormat | None = None
    native: bool = True

    @property
    def prefix(self) -> str:
        """The text before the first name."""
        return self.opening + self.begin

    @property
    def trigger(self) -> str:
        """The text that starts calls: once the model has written it, the rest is held to the format."""
        tag = _TAG.match(self.prefix)
        return tag[0].lstrip() if tag else self.prefix.lstrip()

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entry: object, where: str) -> ToolFormat:
        """Read the manifest's entry.

        Raises:
            BundleError: it is malformed.
        """
        try:
            if not isinstance(entry, Mapping):
                raise TypeError
            fields = dict(entry)
            if fields.get("parameters") is not None:
                fields["parameters"] = ParameterFormat(**fields["parameters"])
            found = cls(**fields)
        except TypeError as error:
            raise BundleError(f"{where}: tool_calls is malformed: export the bundle again") from error
        texts = [found.begin, found.between, found.end, found.opening, found.closing, found.separator or ""]
        texts += [found.item_separator, found.key_separator]
        if found.parameters is not None:
            each = found.parameters
            texts += [each.begin, each.between, each.end, each.separator]
        if not all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in texts) or not found.trigger:
            raise BundleError(f"{where}: tool_calls is malformed: export the bundle again")
        return found


GENERIC = ToolFormat(
    begin='<tool_call>\n{"name": "',
    between='", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
    native=False,
)
"""For templates without tools: that of Hermes and Qwen, explained to the model in the system message."""
