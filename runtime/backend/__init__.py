"""Execution of a graph with onnxruntime or TorchScript, and its KV cache.

onnxruntime's official builds send usage telemetry to Microsoft; importing this package turns that off.
"""

import os

# Both must be set before onnxruntime is imported, which only modules of this package do.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Its tiled attention over several tokens is slower than the plain one; see bench/RESULTS.md.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
