"""`Graph`: a loaded ONNX graph on one execution provider, shared by every cache over it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from llm_edge.runtime.backend import memory_hints
from llm_edge.runtime.backend.graph_check import ExternalTensor
from llm_edge.runtime.backend.weights import MappedWeights
from llm_edge.runtime.bundle import ONNX, Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, MachineError, native_reason
from llm_edge.runtime.model_shape import ModelShape

ATTENTION_MASK = "attention_mask"
HIDDEN_STATES = "hidden_states"
NUM_HIDDEN_STATES = "num_hidden_states_to_keep"
_EXECUTION_PROVIDERS: Mapping[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    # TF32 would round the factors of fp32 matmuls to 10 bits (bench/RESULTS.md).
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}
_CACHE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),  # the graph holds the scales
}
_MANY_TOKENS = 64  # in a step, after which mapped weights are released

# They find nothing in fused graphs, but take 20 ms to search SmolLM2's; ConstantFolding would copy a shared embedding.
_USELESS_OPTIMIZERS = [
    *("BiasGeluFusion", "ConstantFolding", "ConstantSharing", "ConvMulFusion", "EmbedLayerNormFusion"),
    *("MatMulAddFusion", "MatMulNBitsMlpFusion", "MatMulNBitsQLoRAFusion", "MatMulNBitsQkvFusion"),
    *("MatMulScaleFusion", "MatmulTransposeFusion", "NchwcTransformer", "NhwcTransformer"),
    *("QDQPropagationTransformer", "QDQSelectorActionTransformer", "TransposeOptimizer"),
]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """An `.onnx` or TorchScript file and what its manifest says about it; see `PrecisionInfo`."""

    path: Path
    shape: ModelShape
    format: str = ONNX
    share_buffer: bool = True
    hidden_size: int | None = None

    @staticmethod
    def of(bundle: Bundle, precision: PrecisionInfo) -> GraphFile:
        """The file of a bundle's precision."""
        path = bundle.file(precision.model)
        return GraphFile(path, bundle.shape, precision.format, precision.share_buffer, precision.hidden_size)


@dataclass(frozen=True, slots=True)
class ExecutionOptions:
    """How a graph is executed.

    Attributes:
        provider, threads: see `LoadOptions`.
        spinning: idle threads busy-wait and weights move to huge pages: for a graph that has the machine to itself.
        interleaved: another graph runs between this one's steps, so idle threads busy-wait only during a step.
        step_seconds: see `LoadOptions`.
    """

    provider: str = "auto"
    threads: int | None = None
    spinning: bool = True
    interleaved: bool = False
    step_seconds: float | None = None


class Graph:
    """An ONNX graph loaded on `cpu` or `cuda`.

    Args:
        file: what to load.
        provider: `cpu` or `cuda`.
        execution: how to execute it.
        tensors: its weights, as `check_graph` returns them.

    Attributes:
        file: what was loaded.
        provider: `cpu` or `cuda`.
        inference: onnxruntime's session.
        cache_names: names of the cache tensors without `past_key_values.` and `present.`, such as `0.key`.
        cache_dtype: type of keys and values.
        state_dtype: type of the states.
        cache_device: `cpu` or `cuda`, where the graph reads keys and values.
        reads_mask: it has the input `attention_mask`.
        has_hidden_states: every step computes hidden states, of as many positions as requested.
        step_seconds: steps that take longer are terminated; None = no limit.

    Raises:
        BundleError: the file does not load or contradicts the manifest.
        MachineError: not enough memory.
    """

    def __init__(
        self, file: GraphFile, provider: str, execution: ExecutionOptions, tensors: Sequence[ExternalTensor]
    ) -> None:
        self.file = file
        self.shape = file.shape
        self.provider = provider
        self.step_seconds = execution.step_seconds
        options = _session_options(provider, execution)
        data = file.path.with_name(f"{file.path.name}_data")
        self._weights = MappedWeights(data, tensors if provider == "cpu" else [])  # a GPU has copies
        for name, value in self._weights.values.items():
            options.add_initializer(name, value)
        try:
            with self._weights.releasing():
                # onnxruntime's own provider fallback prints to stdout.
                self.inference = ort.InferenceSession(
                    file.path,
                    options,
                    providers=_EXECUTION_PROVIDERS[provider],
                    enable_fallback=0,
                    disabled_optimizers=_USELESS_OPTIMIZERS if file.share_buffer else [],
                )
        except MemoryError as error:
            raise MachineError(f"{file.path}: not enough memory to load it") from error
        except Exception as error:
            raise BundleError(
                f"{file.path}: onnxruntime cannot load it ({native_reason(error)}): export the bundle again"
            ) from error
        self.cache_names = [tensor.name for tensor in self.shape.caches]
        self.has_hidden_states = any(node.name == HIDDEN_STATES for node in self.inference.get_outputs())
        self.reads_mask = any(node.name == ATTENTION_MASK for node in self.inference.get_inputs())
        self.cache_dtype, self.state_dtype = self._check_signature()
        first = next((tensor for tensor in self.shape.caches if tensor.grows), self.shape.caches[0])
        self.cache_device = self._device_of(f"past_key_values.{first.name}")
        self._collapses_pages = provider == "cpu" and execution.spinning

    @property
    def limit(self) -> int:
        """Maximum number of tokens in the context."""
        return self.shape.max_position_embeddings

    def step_completed(self) -> None:
        """Move the weights to huge pages after the first step: takes 0.2 s for 150 MB, on another thread."""
        if self._collapses_pages:
            self._collapses_pages = False
            threading.Thread(target=memory_hints.collapse_pages, name="llm-edge-huge-pages", daemon=True).start()

    def release_weights(self, tokens: int) -> None:
        """Release mapped weights after a step over many tokens, which read many rows of the embedding."""
        if tokens >= _MANY_TOKENS:
            self._weights.release()

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any] | None = None) -> Any:
        """An OrtValue of zeros where the graph reads keys and values; None = of their type."""
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype or self.cache_dtype), self.cache_device, 0)

    @staticmethod
    def run_options() -> Any:
        """onnxruntime's options of a step, through which `watch` terminates it."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "0")  # the default; looking it up would cost 80 us per step
        return options

    def matmuls_on_cpu(self) -> int:
        """Number of matmuls that CUDA has no kernel for; each costs copies in both directions."""
        parts = self.inference.get_provider_graph_assignment_info()
        nodes = [node.op_type for part in parts if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()]
        return sum("MatMul" in op_type or op_type == "Gemm" for op_type in nodes)

    def _device_of(self, name: str) -> str:
        """Where the graph reads an input; the CPU, also on a GPU, if the operator has no kernel for the type.

        A cache on another device would be copied when it is bound, and in-place updates would be lost.
        """
        names = [node.name for node in self.inference.get_inputs()]
        memory = self.inference.get_input_memory_infos()[names.index(name)]
        return "cuda" if memory.name == "Cuda" else "cpu"

    def _check_signature(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Check inputs and outputs against the manifest; returns the types of keys and values, and of states."""
        path, shape = self.file.path, self.shape
        inputs = {node.name: node for node in self.inference.get_inputs()}
        expected = {"input_ids", ATTENTION_MASK, *(f"past_key_values.{name}" for name in self.cache_names)}
        outputs = {node.name: node for node in self.inference.get_outputs()}
        optional = {node.name for node in self.inference.get_overridable_initializers()}
        hidden = outputs.pop(HIDDEN_STATES, None)
        if (
            not optional >= {"num_logits_to_keep", *([NUM_HIDDEN_STATES] if hidden is not None else [])}
            or not expected - {ATTENTION_MASK} <= inputs.keys() <= expected
            or outputs.keys() != {"logits", *(f"present.{name}" for name in self.cache_names)}
        ):
            raise BundleError(f"{path}: the graph's inputs and outputs are not those of a decoder with a KV cache")
        vocab_size = outputs["logits"].shape[-1]
        if vocab_size != shape.vocab_size:
            raise BundleError(f"{path}: the graph's vocabulary is {vocab_size}, not {shape.vocab_size}")
        width = self.file.hidden_size
        if width and (hidden is None or (hidden.type, hidden.shape[-1]) != ("tensor(float)", width)):
            raise BundleError(
                f"{path}: the graph has no hidden states of width {width}, which contradicts the manifest: "
                "export the bundle again"
            )
        return self._cache_type(inputs, grows=True), self._cache_type(inputs, grows=False)

    def _cache_type(self, inputs: Mapping[str, Any], *, grows: bool) -> np.dtype[Any]:
        """Check the shapes of keys and values, or of states, against the manifest; returns their type."""
        types = set()
        for tensor in self.shape.caches:
            if tensor.grows is not grows:
                continue
            cache = inputs[f"past_key_values.{tensor.name}"]
            types.add(cache.type)
            sizes = [cache.shape[1], *cache.shape[3:]] if grows else cache.shape[1:]
            if len(cache.shape) != len(tensor.sized(1)) + 1 or sizes != list(tensor.shape):
                raise BundleError(
                    f"{self.file.path}: the graph's cache has shape {cache.shape}, which contradicts the manifest"
                )
        if len(types) > 1 or not types <= _CACHE_DTYPES.keys():
            raise BundleError(f"{self.file.path}: a cache of type {' and '.join(sorted(types))} is not supported")
        return _CACHE_DTYPES[types.pop()] if types else np.dtype(np.float32)


def inference_session(model: bytes, weights: Path | None = None) -> Any:
    """An onnxruntime session on the CPU for a serialized graph that is not a whole decoder.

    Args:
        model: the graph.
        weights: folder with the files of its external initializers.
    """
    options = _session_options("cpu", ExecutionOptions("cpu", spinning=False))
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return ort.InferenceSession(model, options, providers=_EXECUTION_PROVIDERS["cpu"], enable_fallback=0)


def _session_options(provider: str, execution: ExecutionOptions) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised as exceptions
    options.enable_mem_pattern = False  # steps differ in length: patterns would accumulate
    if execution.threads is not None:
        options.intra_op_num_threads = execution.threads
    # Threads take their share of an operator in smaller and smaller blocks; see bench/RESULTS.md.
    options.add_session_config_entry("session.dynamic_block_base", "16")
    if not execution.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if execution.interleaved:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider == "cuda":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options
