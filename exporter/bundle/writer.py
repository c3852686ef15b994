"""`BundleWriter`: writes the precisions of a bundle in a file format, and opens them for validation."""

from __future__ import annotations

from typing import TypeAlias

from llm_edge.exporter.bundle.onnx_writer import OnnxWriter
from llm_edge.exporter.bundle.torchscript_writer import TorchScriptWriter

BundleWriter: TypeAlias = OnnxWriter | TorchScriptWriter
