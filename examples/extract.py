"""Extracts facts from a text on stdin as JSON that conforms to a schema.

    python examples/extract.py < letter.txt
    python examples/extract.py --schema invoice.json < invoice.txt

Schemas should bound strings, lists and numbers; docs/embedding.md explains why.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llm_edge.runtime import Constraint, FinishReason, Model, SamplingParams
from llm_edge.runtime.errors import LlmEdgeError

NAME = {"type": "string", "maxLength": 40}
SCHEMA = {
    "type": "object",
    "properties": {
        "people": {"type": "array", "items": NAME, "maxItems": 5},
        "places": {"type": "array", "items": NAME, "maxItems": 5},
        "year": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 2100}, {"type": "null"}]},
    },
    "required": ["people", "places", "year"],
    "additionalProperties": False,
}


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description="Extract JSON from a text on stdin.")
    parser.add_argument("--bundle", default="artifacts/smollm2-135m")
    parser.add_argument("--schema", type=Path, help="a JSON schema; people, places and a year otherwise")
    parser.add_argument("--max-tokens", type=int, default=600)
    options = parser.parse_args()
    schema = options.schema.read_text(encoding="utf-8") if options.schema else json.dumps(SCHEMA)
    model = Model.load(options.bundle)
    ask = f"Extract the facts from this text as JSON.\n\n{sys.stdin.read().strip()}"
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens, constraint=Constraint.json_schema(schema))
    result = model.chat([{"role": "user", "content": ask}], params).result()
    if result.finish_reason is FinishReason.LENGTH:
        sys.exit(f"error: cut off after {len(result.tokens)} tokens: give the schema bounds, or --max-tokens more")
    print(json.dumps(json.loads(result.text), ensure_ascii=False, indent=2))


if __name__ == "__main__":
    try:
        main()
    except (LlmEdgeError, OSError) as failure:
        sys.exit(f"error: {failure}")
