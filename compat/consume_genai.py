"""Greedy tokens of a bundle in onnxruntime-genai. Runs in a separate environment without llm-edge.

`run.py` writes the job to standard input and passes the name of the output file.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime_genai as og


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Encode and continue every prompt using only what the bundle provides."""
    bundle = Path(job["bundle"])
    config = og.Config(str(bundle))
    shipped = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    if job["model"] != shipped:
        config.overlay(json.dumps({"model": {"decoder": {"filename": job["model"]}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)

    answers = []
    for prompt in job["prompts"]:
        text = prompt.get("text")
        if text is None:
            text = tokenizer.apply_chat_template(json.dumps(prompt["messages"]), add_generation_prompt=True)
        ids = [int(token) for token in tokenizer.encode(text)]
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + job["tokens"])
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        answers.append({"prompt": ids, "tokens": tokens})
    return {
        "version": version("onnxruntime-genai"),
        "onnxruntime": version("onnxruntime"),
        "chosen": "as shipped" if job["model"] == shipped else "by overlay",
        "answers": answers,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(main(json.load(sys.stdin))), encoding="utf-8")
