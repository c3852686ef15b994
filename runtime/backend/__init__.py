"""Execution of a graph with onnxruntime or TorchScript, and its KV cache."""
