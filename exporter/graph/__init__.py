"""ONNX graphs: tracing, graph passes, and emitters of the weight formats."""
