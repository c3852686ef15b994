"""Weight formats: how a weight is quantized, stored, described, and multiplied in the graph. One module per format."""

from llm_edge.exporter.quantization.formats.base import WeightFormat
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.quantization.formats.int8_static import Int8Static
from llm_edge.exporter.quantization.formats.source import OriginalBlocks, Source

__all__ = ["Blocks", "Dense", "Int8Static", "OriginalBlocks", "Source", "WeightFormat"]
