"""`StepRunner`: runs steps over a graph, so that they can be terminated, and reports why they fail."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from llm_edge.runtime.backend.graph import Graph
from llm_edge.runtime.backend.watchdog import Reason, WatchedStep
from llm_edge.runtime.errors import BundleError, LlmEdgeError, MachineError, StepTerminatedError, native_reason

_NODE_FAILED = "Non-zero status code returned while running"  # onnxruntime's wording
_OUT_OF_MEMORY = re.compile(r"Failed to allocate memory|bad_alloc|out of memory|Available memory of", re.IGNORECASE)


class StepRunner:
    """Runs the steps of one session or batch, one at a time.

    Args:
        graph: what it runs.
        patience: seconds for which a step may continue that is no longer wanted.

    Attributes:
        unwanted: whether the running step is no longer wanted; called from another thread.
        run_seconds: time spent inside onnxruntime so far.
    """

    def __init__(self, graph: Graph, patience: float = 0.0) -> None:
        self._graph = graph
        self._patience = patience
        self._options = graph.run_options()
        self.unwanted: Callable[[], bool] = _never
        self.run_seconds = 0.0

    def run(self, binding: Any, what: str) -> None:
        """Run a step, which `what` describes in messages.

        Raises:
            StepTerminatedError: it exceeded the graph's `step_seconds`, or is no longer wanted.
            BundleError: an operator of the graph failed.
            MachineError: not enough memory, or the execution provider failed.
        """
        while (terminated := self._run(binding, what)) is not None:
            if terminated is Reason.TIMEOUT:
                seconds = f"{self._graph.step_seconds:g}"
                raise StepTerminatedError(f"{what} was terminated after {seconds} seconds: raise step_seconds")
            if terminated is Reason.UNWANTED:
                raise StepTerminatedError(f"{what} was cancelled")
            # The signal's handler has run by now. It did not raise, so the step is still wanted: run it again.
        self._graph.step_completed()

    def _run(self, binding: Any, what: str) -> Reason | None:
        began = time.perf_counter()
        step = WatchedStep(self._options, self._graph.step_seconds, self.unwanted, self._patience)
        try:
            with step:
                self._graph.inference.run_with_iobinding(binding, self._options)
        except MemoryError as error:
            raise MachineError(f"not enough memory for {what}") from error
        except Exception as error:
            if step.reason is None:
                raise self._failure(error, what) from error
            return step.reason
        except KeyboardInterrupt:
            step.end()
            raise
        finally:
            self.run_seconds += time.perf_counter() - began
        return None

    def _failure(self, error: Exception, what: str) -> LlmEdgeError:
        """Whether the graph or the machine is at fault."""
        if _OUT_OF_MEMORY.search(str(error)):
            return MachineError(f"not enough memory for {what}")
        reason = native_reason(error)
        if self._graph.provider == "cpu" and _NODE_FAILED in reason:
            return BundleError(f"{self._graph.file.path}: {what} failed ({reason}): export the bundle again")
        return MachineError(f"{what} failed ({reason})")


def _never() -> bool:
    return False
