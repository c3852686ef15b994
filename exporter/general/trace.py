"""Traces a decoder of transformers to an ONNX graph without weights; see `trace.py`, which traces our own decoder."""

from __future__ import annotations

import itertools
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch

from llm_edge.exporter.general.decoder import GeneralDecoder
from llm_edge.exporter.general.fold import fold
from llm_edge.exporter.general.functions import outside_of_traces
from llm_edge.exporter.graph import attention, recurrence
from llm_edge.exporter.graph.experts import experts
from llm_edge.exporter.graph.passes.last_logits import keep_last_logits
from llm_edge.exporter.graph.passes.names import name_by_module
from llm_edge.exporter.graph.passes.rms_norms import fuse_rms_norms
from llm_edge.exporter.graph.passes.rotary import fuse_rotary
from llm_edge.exporter.graph.passes.skip_norms import fuse_skip_norms
from llm_edge.exporter.graph.passes.views import simplify_views
from llm_edge.exporter.graph.trace import OPSET, clear_value_metadata, linear, quiet
from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.runtime.model_shape import CacheTensor

_SCATTER_OPSET = 24  # the first with TensorScatter


def trace_general(decoder: GeneralDecoder) -> ir.Model:
    """Trace a decoder, whose weights may be fake.

    Inputs and outputs are those of `trace`, but for the cache: each tensor of `GeneralDecoder.caches` is an input
    past_key_values.<name> and an output present.<name>; keys and values share a buffer, and states do not. Projections
    are abstract nodes `llm_edge::Linear` and `llm_edge::Experts`.
    """
    batch, length, past_length = 2, 3, 5
    past = decoder.empty_past(batch, past_length)
    batch_dim = torch.export.Dim("batch_size")
    past_dim = torch.export.Dim("past_sequence_length")
    names = [tensor.name for layer in decoder.caches for tensor in layer]
    device = next(decoder.parameters()).device
    input_ids = torch.full((batch, length), 5, device=device)
    attention_mask = torch.ones(batch, length + past_length, dtype=torch.int64, device=device)

    def axes(tensor: CacheTensor) -> dict[int, Any]:
        return {0: batch_dim, 2: past_dim} if tensor.grows else {0: batch_dim}

    operators = torch.ops.llm_edge
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            decoder,
            (input_ids, attention_mask, past),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            dynamic_shapes={
                "input_ids": {0: batch_dim, 1: torch.export.Dim("sequence_length")},
                "attention_mask": {0: batch_dim, 1: torch.export.Dim("total_sequence_length")},
                "past": [[axes(tensor) for tensor in layer] for layer in decoder.caches],
            },
            custom_translation_table={
                operators.cached_attention.default: attention.fused_attention,
                operators.append_to_cache.default: attention.append_to_cache,
                operators.causal_convolution.default: recurrence.causal_convolution,
                operators.linear_attention.default: recurrence.linear_attention,
                operators.experts.default: experts,
                torch.ops.aten.linear.default: linear,
            },
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
        )
    assert program is not None
    model = program.model
    name_by_module(model, decoder.public_name)
    _name_initializers(model, decoder)
    with quiet(), outside_of_traces():  # constants are real
        _simplify(model)
    keep_last_logits(model)
    fuse_skip_norms(model)
    common_passes.ClearMetadataAndDocStringPass()(model)
    clear_value_metadata(model.graph)
    return model


def _simplify(model: ir.Model) -> None:
    """Fuse what transformers' modules compute in many nodes."""
    scatters = [node for node in model.graph if node.op_type == "TensorScatter"]
    if scatters:
        model.opset_imports[""] = _SCATTER_OPSET
    for node in scatters:
        assert node.inputs[0] is not None
        node.outputs[0].shape = node.inputs[0].shape  # of the buffer; the exporter has that of the tokens in it
    fold(model)
    common_passes.DeduplicateInitializersPass()(model)  # of small constants: weights have no values
    simplify_views(model)
    fuse_rms_norms(model)
    fuse_rotary(model)
    simplify_views(model)


def _name_initializers(model: ir.Model, decoder: GeneralDecoder) -> None:
    """Give initializers their public names, and remove their fake values; a tied head uses the embedding's weight."""
    tied = decoder.model.get_output_embeddings().weight is decoder.model.get_input_embeddings().weight
    initializers = model.graph.initializers
    stored = {name for name, _ in itertools.chain(decoder.named_parameters(), decoder.named_buffers())}
    for name, value in list(initializers.items()):
        if name in stored:
            value.const_value = None
        public = decoder.public_name(name)
        if tied and public == f"{HEAD}.weight":
            public = f"{EMBEDDING}.weight"
        if public in initializers and initializers[public] is not value:
            ir.convenience.replace_all_uses_with(value, initializers[public])
            del initializers[name]
        else:
            value.name = public
