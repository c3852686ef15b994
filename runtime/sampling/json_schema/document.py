"""A JSON schema as a document: where a part of it is, what a `$ref` names, and how a refusal is worded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

from llm_edge.runtime.errors import ParameterError

MAX_NODES = 100_000  # values in a schema
MAX_DEPTH = 120  # of nested values; llguidance reads 128

Schema = dict[str, Any] | bool


class Place(NamedTuple):
    """Where a schema is: its JSON pointer, and the URI that its references are relative to."""

    pointer: str
    base: str

    def __truediv__(self, key: str | int) -> Place:
        return Place(f"{self.pointer}/{str(key).replace('~', '~0').replace('/', '~1')}", self.base)


def refuse(place: Place, reason: str) -> ParameterError:
    """The error for a schema of which one part cannot be used."""
    pointer = json.dumps(place.pointer or "/", ensure_ascii=True)[1:-1]
    if len(pointer) > 120:
        pointer = f"{pointer[:60]}…{pointer[-59:]}"
    return ParameterError(f"constraint (json_schema): {pointer}: {reason}")


def not_enforced(place: Place, keyword: str, reason: str, instead: str = "remove it") -> ParameterError:
    """The error for a keyword that answers cannot be held to, with the remedy."""
    remedy = f'{instead}, or pass unchecked=("{keyword}",) and check answers yourself'
    return refuse(place / keyword, f"cannot be enforced, {reason}: {remedy}")


class Document:
    """A whole schema; finds what references name.

    References are JSON pointers (`#/$defs/a`), anchors (`#a`) and URIs of an `$id` in the same document; nothing is
    ever downloaded.

    Raises:
        ParameterError: the schema is nested too deeply or too large.
    """

    def __init__(self, root: Schema) -> None:
        self._named: dict[str, tuple[Any, Place]] = {}
        self.root = Place("", "")
        for count, (node, place, depth) in enumerate(_parts(root, self.root, 0)):
            if depth > MAX_DEPTH:
                raise refuse(place, f"nested more than {MAX_DEPTH} levels deep")
            if count >= MAX_NODES:
                raise refuse(self.root, f"more than {MAX_NODES:,} values: simplify the schema")
            if place.base not in self._named and (place.base or not place.pointer):
                self._named[place.base] = node, place
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(node, dict) and isinstance(node.get(key), str):
                    self._named.setdefault(f"{place.base}#{node[key]}", (node, place))

    def resolve(self, reference: str, place: Place) -> tuple[Schema, Place]:
        """The schema that a reference at a place names.

        Raises:
            ParameterError: there is none in the document.
        """
        try:
            base, fragment = urldefrag(urljoin(place.base, reference) if not reference.startswith("#") else reference)
        except ValueError as e:
            raise refuse(place / "$ref", f"{_short(reference)} is not a reference") from e
        base = place.base if reference.startswith("#") else base
        fragment = unquote(fragment)
        found = self._named.get(f"{base}#{fragment}" if fragment and not fragment.startswith("/") else base)
        if found is None and not base.startswith("#") and base:
            raise refuse(place / "$ref", f"{_short(reference)} is not in the schema: put it under $defs")
        node, target = found or (None, place)
        for key in fragment.split("/")[1:] if fragment.startswith("/") else []:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and key.isascii() and key.isdigit() and int(key[:9]) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                node = None
                break
            target = target_of(node, target / key)
        if not isinstance(node, dict | bool):
            raise refuse(place / "$ref", f"{_short(reference)} names no schema in this document")
        return node, target


def target_of(node: object, place: Place) -> Place:
    """The place with the base URI that the schema there declares."""
    own = node.get("$id") if isinstance(node, dict) else None
    if not isinstance(own, str):
        return place
    try:
        return Place(place.pointer, urldefrag(urljoin(place.base, own))[0])
    except ValueError as e:
        raise refuse(place / "$id", f"{_short(own)} is not a URI") from e


def _parts(root: object, place: Place, depth: int) -> Iterator[tuple[Any, Place, int]]:
    """Every value of the document, its place and its depth."""
    waiting = [(root, place, depth)]
    while waiting:
        node, place, depth = waiting.pop()
        place = target_of(node, place)
        yield node, place, depth
        if depth <= MAX_DEPTH:
            entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            waiting += [(each, place / key, depth + 1) for key, each in entries]


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 80 else text[:79] + "…", ensure_ascii=True)
