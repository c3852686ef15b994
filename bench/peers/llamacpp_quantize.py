"""Requantizes a GGUF: `python llamacpp_quantize.py SOURCE TARGET TYPE`, run where llama-cpp-python is installed."""

from __future__ import annotations

import ctypes
import os
import sys


def main() -> None:
    """Quantize as llama-quantize does by default, including tensors that are quantized already."""
    from llama_cpp import llama_cpp as lib  # type: ignore[import-not-found]

    source, target, kind = sys.argv[1:4]
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
        sys.exit(f"error: llama.cpp cannot quantize {source} to {kind}")


if __name__ == "__main__":
    main()
