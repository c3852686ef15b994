"""ONNX graphs: tracing, graph passes and the operators of each weight format."""
