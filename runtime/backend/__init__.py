"""Execution of a graph with onnxruntime or TorchScript, and its KV cache.

onnxruntime's official builds send usage telemetry to Microsoft; importing this package turns that off.
"""

import os

# These must be set before onnxruntime and numpy are imported, which modules of this package do first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Its tiled attention over several tokens is slower than the plain one; see bench/RESULTS.md.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
# Threads of numpy's OpenBLAS wait for work in a loop before they sleep: 2^26 cycles by default, which keeps a processor
# busy while a model is loaded; 2^20 are 0.3 ms.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
