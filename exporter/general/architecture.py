"""`Architecture`: a decoder of transformers without weights, as the general route of the export knows it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_edge.exporter.families import families
from llm_edge.exporter.general.decoder import GeneralDecoder, general_decoder
from llm_edge.exporter.general.functions import UnsupportedModelError, short_reason
from llm_edge.exporter.validation.independent import silence_transformers
from llm_edge.model.registry import unknown_family
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.model_shape import ModelShape
from llm_edge.runtime.safe_io import short_repr

_UNLIMITED = 1_048_576  # tokens in the context of a model without positions


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers with its sizes.

    Attributes:
        where: path of the config.json, for messages.
        content: of the config.json.
        config: transformers' config.
        max_position_embeddings: maximum number of tokens in the context.
    """

    where: str
    content: Mapping[str, Any]
    config: Any
    max_position_embeddings: int

    @property
    def vocab_size(self) -> int:
        """V, width of the logits."""
        size: int = self.decoder.model.get_output_embeddings().weight.shape[0]
        return size

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head has the weight of the embedding."""
        model = self.decoder.model
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.decoder.parameters())

    @property
    def shape(self) -> ModelShape:
        """The dimensions that callers of its graph need."""
        caches = tuple(tensor for layer in self.decoder.caches for tensor in layer)
        context = self.max_position_embeddings
        windows = tuple(window if window < context else 0 for window in self.decoder.windows)
        return ModelShape(self.vocab_size, len(self.decoder.caches), context, caches, windows if any(windows) else ())

    @cached_property
    def fake_mode(self) -> FakeTensorMode:
        """The mode in which the decoder was created and can be called."""
        return FakeTensorMode(allow_non_fake_inputs=True)

    @cached_property
    def decoder(self) -> GeneralDecoder:
        """The decoder with fake tensors for parameters and buffers.

        Raises:
            CheckpointError: it does something that has no form here.
        """
        with self.refusing(), silence_transformers(transformers), self.fake_mode, _without_initialization():
            return general_decoder(_create(self.config))

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Raise CheckpointError for whatever a model's code raises within: the architecture is not supported."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, UnsupportedModelError) else short_reason(error)
            kind = short_repr(self.config.model_type)
            raise CheckpointError(
                f"{self.where}: model_type {kind} is not supported: {reason}; see llm-export --families"
            ) from error

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers of the model, such as rotary frequencies, by their public names."""
        with silence_transformers(transformers):
            model = create_without_values(self.config)
        public = self.decoder.public_name
        return {public(f"model.{name}"): buffer for name, buffer in model.named_buffers()}


def architecture_of(content: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture that a config.json describes.

    Raises:
        UnknownFamilyError: transformers has no causal language model of this type.
        CheckpointError: it rejects the config.
    """
    kind = content.get("model_type")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known or kind not in transformers.CONFIG_MAPPING:
        raise unknown_family(str(kind), where, families())
    try:
        with silence_transformers(transformers):
            config_class = transformers.CONFIG_MAPPING[kind]
            decode: Any = config_class._decode_special_floats
            config = config_class.from_dict(decode(dict(content)))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{where}: transformers rejects it ({reason})") from error
    context = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    return Architecture(where, content, config, int(context))


def create_without_values(config: Any) -> Any:
    """Return transformers' model with parameters on the meta device and real buffers."""
    with _parameters_without_values():
        return _create(config)


def _create(config: Any) -> Any:
    create: Any = transformers.AutoModelForCausalLM.from_config
    own = copy.deepcopy(config)  # models write their implementation of attention to it
    model = create(own, attn_implementation="eager", dtype=torch.float32)
    return model.eval().requires_grad_(requires_grad=False)


@contextlib.contextmanager
def _without_initialization() -> Iterator[None]:
    """Leave parameters as they are created: some initializations need values, which fake tensors lack."""
    model_class = transformers.PreTrainedModel
    initialize = model_class.initialize_weights
    model_class.initialize_weights = lambda _: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        model_class.initialize_weights = initialize  # type: ignore[method-assign]


@contextlib.contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Move parameters to the meta device as they are registered, so that only buffers take memory."""
    register = nn.Module.register_parameter

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = without_values  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
