"""Writes a GGUF as a Hugging Face folder in float32: `python hf_folder.py FILE.gguf BUNDLE FOLDER`.

Run in a peer's environment: transformers reads the GGUF, so peers get their weights in the usual way, independent of
our code. The tokenizer is the bundle's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def main() -> None:
    """Read, write, copy."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf, bundle, folder = map(Path, sys.argv[1:4])
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        if (bundle / name).exists():
            shutil.copy(bundle / name, folder)


if __name__ == "__main__":
    main()
