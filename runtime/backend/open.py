"""Opens a model file: chooses the execution provider and returns a graph or a session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, Union

from llm_edge.runtime.backend.graph import ExecutionOptions, Graph, GraphFile
from llm_edge.runtime.backend.graph_check import ExternalTensor, check_graph
from llm_edge.runtime.backend.providers import check_threads, resolve_provider
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.backend.watchdog import check_step_seconds
from llm_edge.runtime.bundle import TORCHSCRIPT
from llm_edge.runtime.errors import BundleError, MachineError, ProviderError

if TYPE_CHECKING:
    from llm_edge.runtime.backend.torchscript_session import TorchScriptSession

AnySession: TypeAlias = Union[Session, "TorchScriptSession"]
_MAX_CPU_MATMULS = 1
"""Matmuls per layer that CUDA may leave to the CPU; with more of them `auto` runs the whole graph on the CPU."""


def open_graph(file: GraphFile, execution: ExecutionOptions, tensors: Sequence[ExternalTensor] | None = None) -> Graph:
    """Load an ONNX graph.

    Args:
        file: what to load.
        execution: how to execute it.
        tensors: what `check_graph` returned for this file; None = check it.

    Raises:
        BundleError: it is not a graph that the exporter writes, does not load or contradicts the manifest.
        ParameterError: unknown provider, an impossible number of threads or time limit.
        ProviderError: CUDA was requested and does not work, or cannot run this graph.
    """
    check_threads(execution.threads)
    check_step_seconds(execution.step_seconds)
    provider = resolve_provider(execution.provider)
    if tensors is None:
        tensors = check_graph(file.path)
    if provider == "cuda":
        try:
            graph = Graph(file, "cuda", execution, tensors)
            matmuls = graph.matmuls_on_cpu()
            if execution.provider == "cuda" or matmuls <= _MAX_CPU_MATMULS * file.shape.num_hidden_layers:
                Session(graph).step([0])  # a kernel may exist and still reject this graph's configuration
                return graph
        except (BundleError, MachineError) as error:
            if execution.provider == "cuda":
                raise ProviderError(
                    f"provider cuda: {file.path} does not run there ({error}); use provider='cpu' or 'auto'"
                ) from error
    return Graph(file, "cpu", execution, tensors)


def open_session(
    file: GraphFile, execution: ExecutionOptions, tensors: Sequence[ExternalTensor] | None = None
) -> AnySession:
    """Load a model file of any format for one conversation; raises what `open_graph` and `TorchScriptSession` raise."""
    if file.format == TORCHSCRIPT:
        from llm_edge.runtime.backend.torchscript_session import TorchScriptSession

        return TorchScriptSession(file, execution)
    return Session(open_graph(file, execution, tensors))
