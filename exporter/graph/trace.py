"""Traces the reference decoder to an ONNX graph without weights.

The decoder is traced with fake tensors, so that the size of the model does not matter. The style of the graph selects
the translation of the attention operator. Projections are abstract nodes `llm_edge::Linear(x, weight [out, in])` named
by their modules, and initializers have names and shapes only; `lower.py` replaces the former and fills the latter.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import opset23 as op
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_edge.exporter.graph.attention import DOMAIN, contrib, fused_attention, portable_attention
from llm_edge.exporter.graph.passes.hidden_states import add_hidden_states
from llm_edge.exporter.graph.passes.last_logits import keep_last_logits
from llm_edge.exporter.graph.passes.names import name_by_module
from llm_edge.exporter.graph.passes.norm_scales import share_unit_scales
from llm_edge.exporter.graph.passes.rotary_angles import compute_rotary_angles
from llm_edge.exporter.graph.passes.skip_norms import fuse_skip_norms
from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder

OPSET = 23


class GraphStyle(Enum):
    """Which operators a graph uses.

    FUSED: onnxruntime's `com.microsoft` operators, among them GroupQueryAttention (with rotary embedding; past and
        present may share one buffer) and SkipSimplifiedLayerNormalization. Batches are padded on the right.
    PORTABLE: standard operators of opset 23 only.
    """

    FUSED = "fused"
    PORTABLE = "portable"


def trace(config: ModelConfig, style: GraphStyle, *, hidden_states: bool = False) -> ir.Model:
    """Trace the decoder.

    Inputs: input_ids [batch_size, sequence_length] and attention_mask [batch_size, total_sequence_length] (int64),
    past_key_values.N.key|value [batch_size, KV, past_sequence_length, D], and the optional num_logits_to_keep (int64
    scalar with default 0: all positions). Outputs: logits, present.N.key|value and, if requested, hidden_states; see
    `add_hidden_states`.
    """
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        decoder = Decoder(config).eval()
        batch, length, past_length = 2, 3, 5
        past = decoder.empty_past(batch, past_length)
        input_ids = torch.zeros(batch, length, dtype=torch.int64)
        attention_mask = torch.ones(batch, past_length + length, dtype=torch.int64)
        batch_dim = torch.export.Dim("batch_size")
        cache_axes = {0: batch_dim, 2: torch.export.Dim("past_sequence_length")}
        caches = [f"{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
        program = torch.onnx.export(
            decoder,
            (input_ids, attention_mask, past),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # constant folding requires real weights
            verbose=False,
            dynamic_shapes={
                "input_ids": {0: batch_dim, 1: torch.export.Dim("sequence_length")},
                "attention_mask": {0: batch_dim, 1: torch.export.Dim("total_sequence_length")},
                "past": [(cache_axes, cache_axes)] * config.num_hidden_layers,
            },
            custom_translation_table={
                torch.ops.llm_edge.cached_attention.default: (
                    fused_attention if style is GraphStyle.FUSED else portable_attention
                ),
                torch.ops.aten.linear.default: linear,
                torch.ops.aten.split_with_sizes.default: split,
            },
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in caches)],
            output_names=["logits", *(f"present.{name}" for name in caches)],
        )
    assert program is not None
    model = program.model
    if config.tie_word_embeddings:
        model.graph.initializers[f"{HEAD}.weight"].name = f"{EMBEDDING}.weight"
    name_by_module(model)
    _share_lengths(model.graph)
    share_unit_scales(model, config.hidden_size)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    compute_rotary_angles(model, config)
    if hidden_states:
        add_hidden_states(model, config.hidden_scale)
    keep_last_logits(model)
    if style is GraphStyle.FUSED:
        fuse_skip_norms(model)
    common_passes.ClearMetadataAndDocStringPass()(model)
    clear_value_metadata(model.graph)
    return model


def _share_lengths(graph: ir.Graph) -> None:
    """Read the number of new tokens from input_ids everywhere, so that what layers derive from it is computed once."""
    for node in graph:
        if node.op_type == "Shape" and node.inputs[0] not in graph.inputs and node.attributes["start"].as_int() == 1:
            node.replace_input_with(0, graph.inputs[0])


def clear_value_metadata(graph: ir.Graph) -> None:
    """Remove the exporter's metadata from all values; onnx-ir's pass only clears graphs and nodes."""
    computed = (value for node in graph for value in node.outputs)
    for value in itertools.chain(graph.inputs, graph.initializers.values(), computed):
        value.metadata_props.clear()
        value.doc_string = None


_QUIET = (
    "torch.onnx._internal.exporter._registration",
    "onnx_ir.passes.common.initializer_deduplication",  # of initializers without values
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's progress output and its warnings about axis names, translations and missing values."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_LINEAR = contrib(DOMAIN, "Linear", inputs=2, outputs=1)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Translate a projection to an abstract node."""
    product = _LINEAR(x, weight)
    return product if bias is None else op.Add(product, bias)


def split(x: Any, split_sizes: list[int], dim: int = 0) -> Any:
    """Translate an even split."""
    assert len(set(split_sizes)) == 1  # the exporter does not support uneven splits
    return op.Split(x, axis=dim, num_outputs=len(split_sizes))
