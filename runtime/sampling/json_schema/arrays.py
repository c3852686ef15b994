"""Arrays without equal items."""

from __future__ import annotations

from itertools import permutations
from math import perm
from typing import Any

from llm_edge.runtime.sampling.json_schema.canonical import Lookup, values_of
from llm_edge.runtime.sampling.json_schema.document import Place, Schema, not_enforced

MAX_ORDERS = 400  # arrays that a set of listed values can be


def without_repeats(out: dict[str, Any], place: Place, lookup: Lookup) -> Schema:
    """An array without equal items: all orders of a few listed values."""
    least, most = out.get("minItems", 0), out.get("maxItems")
    if most is not None and most <= 1:
        return out
    values = None if "prefixItems" in out else values_of(out.get("items", True), lookup)
    if values is not None:
        most = len(values) if most is None else min(most, len(values))
        if least > most:
            return False
        if sum(perm(len(values), size) for size in range(least, most + 1)) <= MAX_ORDERS:
            orders = [list(each) for size in range(least, most + 1) for each in permutations(values, size)]
            return {"enum": orders}
    raise not_enforced(place, "uniqueItems", "an item may be generated again")
