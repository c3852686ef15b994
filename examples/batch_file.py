"""Answers a file of prompts: JSONL in, JSONL out, in the same order, with all slots busy.

    python examples/batch_file.py prompts.jsonl answers.jsonl

An input line is {"prompt": "…"}; its output line adds "text" and "finish_reason", or "error".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

from llm_edge.runtime import AsyncGeneration, Engine, SamplingParams
from llm_edge.runtime.errors import LlmEdgeError


def line(found: dict[str, Any], answer: AsyncGeneration | LlmEdgeError) -> str:
    """A line of output; waits for the answer."""
    try:
        if isinstance(answer, LlmEdgeError):
            raise answer
        result = answer.result()
        found |= {"text": result.text, "finish_reason": result.finish_reason}
    except LlmEdgeError as error:
        found |= {"error": str(error)}
    return json.dumps(found, ensure_ascii=False) + "\n"


parser = argparse.ArgumentParser(description="Answer a file of prompts.")
parser.add_argument("prompts", type=Path)
parser.add_argument("answers", type=Path)
parser.add_argument("--bundle", default="artifacts/smollm2-135m")
parser.add_argument("--max-tokens", type=int, default=200)
options = parser.parse_args()
running: deque[tuple[dict[str, Any], AsyncGeneration | LlmEdgeError]] = deque()
try:
    records = [json.loads(each) for each in options.prompts.read_text(encoding="utf-8").split("\n") if each.strip()]
    if not all(isinstance(record, dict) and isinstance(record.get("prompt"), str) for record in records):
        sys.exit(f'error: {options.prompts}: each line has to be {{"prompt": "a text"}}')
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    with Engine.load(options.bundle, active=16) as engine, options.answers.open("w", encoding="utf-8") as out:
        for record in records:
            if len(running) == 64:  # a queue, so that no slot is idle
                out.write(line(*running.popleft()))
            try:
                running.append((record, engine.chat([{"role": "user", "content": record["prompt"]}], params)))
            except LlmEdgeError as error:  # of this prompt; the others continue
                running.append((record, error))
        out.writelines(line(*each) for each in running)
except (LlmEdgeError, OSError, ValueError) as error:
    sys.exit(f"error: {error}")
