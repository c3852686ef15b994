"""Greedy tokens of a bundle in optimum's ORTModelForCausalLM. Runs in a separate environment without
llm-edge.

`run.py` writes the job to standard input and passes the name of the output file.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Encode and continue every prompt using only what the bundle provides."""
    graph = Path(job["model"])
    default = graph.name == "model.onnx"
    chosen = {} if default else {"subfolder": str(graph.parent), "file_name": graph.name}
    model = ORTModelForCausalLM.from_pretrained(job["bundle"], **chosen)
    assert model.path == Path(job["bundle"]) / graph, f"it took {model.path}"
    tokenizer = AutoTokenizer.from_pretrained(job["bundle"])

    answers = []
    for prompt in job["prompts"]:
        # Everything the tokenizer returns goes into generate(), the usual call.
        if "messages" in prompt:
            inputs = tokenizer.apply_chat_template(
                prompt["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt["text"], return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=job["tokens"], do_sample=False, temperature=None, top_p=None, top_k=None
        )[0].tolist()
        length = inputs["input_ids"].shape[1]
        answers.append({"prompt": output[:length], "tokens": output[length:]})
    return {
        "version": version("optimum-onnx"),
        "onnxruntime": version("onnxruntime"),
        "chosen": "by default" if default else "by file_name",
        "answers": answers,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(main(json.load(sys.stdin))), encoding="utf-8")
