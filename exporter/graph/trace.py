"""From the reference decoder to an ONNX graph without weights. Knows nothing of checkpoints or precisions.

The decoder is traced on fake tensors, so the size of the model does not matter. One trace has two
translations of its attention operator (`GraphStyle`). Projections stay abstract, as nodes
`llm_edge::Linear(x, weight [out, in])` named by their module; `lower.py` gives each its final form, and
fills the initializers, which here are names and shapes only.
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

from llm_edge.exporter.graph.attention import contrib, fused_attention, portable_attention
from llm_edge.exporter.graph.passes.hidden_states import offer_hidden_states
from llm_edge.exporter.graph.passes.last_logits import keep_last_logits
from llm_edge.exporter.graph.passes.names import name_by_module
from llm_edge.exporter.graph.passes.skip_norms import fuse_skip_norms
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder

OPSET = 23
LINEAR_DOMAIN = "llm_edge"
EMBEDDING = "embed_tokens.weight"


class GraphStyle(Enum):
    """How the attention operator and the norms are written.

    FUSED: `com.microsoft` GroupQueryAttention (rotary inside, past and present may share one buffer) and
        SkipSimplifiedLayerNormalization. Rows of a batch are padded on the right.
    PORTABLE: standard operators of opset 23 only.
    """

    FUSED = "fused"
    PORTABLE = "portable"


def trace(config: ModelConfig, style: GraphStyle, *, hidden_states: bool = False) -> ir.Model:
    """Trace the decoder.

    Inputs: input_ids [batch_size, sequence_length] and attention_mask [batch_size, total_sequence_length] (int64),
    past_key_values.N.key|value [batch_size, KV, past_sequence_length, D], and the optional
    num_logits_to_keep (int64 scalar with default 0: all positions). Outputs: logits, present.N.key|value, and
    where they are asked for `hidden_states`; see `offer_hidden_states`.
    """
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        decoder = Decoder(config).eval()
        batch, length, past_length = 2, 3, 5
        past = decoder.empty_past(batch, past_length)
        input_ids = torch.zeros(batch, length, dtype=torch.int64)
        attention_mask = torch.ones(batch, past_length + length, dtype=torch.int64)
        rows = torch.export.Dim("batch_size")
        cache_axes = {0: rows, 2: torch.export.Dim("past_sequence_length")}
        pairs = [f"{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]
        program = torch.onnx.export(
            decoder,
            (input_ids, attention_mask, past),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # its constant folding wants real weights
            verbose=False,
            dynamic_shapes={
                "input_ids": {0: rows, 1: torch.export.Dim("sequence_length")},
                "attention_mask": {0: rows, 1: torch.export.Dim("total_sequence_length")},
                "past": [(cache_axes, cache_axes)] * config.num_hidden_layers,
            },
            custom_translation_table={
                torch.ops.llm_edge.cached_attention.default: (
                    fused_attention if style is GraphStyle.FUSED else portable_attention
                ),
                torch.ops.aten.linear.default: _linear,
                torch.ops.aten.split_with_sizes.default: _split,
            },
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{pair}" for pair in pairs)],
            output_names=["logits", *(f"present.{pair}" for pair in pairs)],
        )
    assert program is not None
    model = program.model
    if config.tie_word_embeddings:
        model.graph.initializers["lm_head.weight"].name = EMBEDDING
    name_by_module(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    if hidden_states:
        offer_hidden_states(model, config.hidden_scale)
    keep_last_logits(model)
    if style is GraphStyle.FUSED:
        fuse_skip_norms(model)
    common_passes.ClearMetadataAndDocStringPass()(model)
    _clear_values(model.graph)
    return model


def _clear_values(graph: ir.Graph) -> None:
    """Take the exporter's notes off all values; onnx-ir's pass clears graphs and nodes alone."""
    made = (value for node in graph for value in node.outputs)
    for value in itertools.chain(graph.inputs, graph.initializers.values(), made):
        value.metadata_props.clear()
        value.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and its advice on axis names that hold on purpose."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)


_LINEAR = contrib(LINEAR_DOMAIN, "Linear", inputs=2, outputs=1)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    product = _LINEAR(x, weight)
    return product if bias is None else op.Add(product, bias)


def _split(x: Any, split_sizes: list[int], dim: int = 0) -> Any:
    assert len(set(split_sizes)) == 1  # the exporter cannot number the outputs of an uneven Split
    return op.Split(x, axis=dim, num_outputs=len(split_sizes))
