"""Steps that do not end are terminated: at their limit, when they are no longer wanted, and by signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from endless import endless_loop
from onnx import TensorProto, helper

from llm_edge.runtime.backend.step_runner import StepRunner
from llm_edge.runtime.backend.watchdog import check_running_steps, check_step_seconds
from llm_edge.runtime.errors import BundleError, MachineError, ParameterError, StepTerminatedError, native_reason

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.fixture(scope="module")
def inference() -> ort.InferenceSession:
    return endless_loop()


def runner(inference: Any, seconds: float | None = None, patience: float = 0.0) -> StepRunner:
    graph: Any = SimpleNamespace(inference=inference, run_options=ort.RunOptions, step_seconds=seconds)
    graph.provider, graph.file = "cpu", SimpleNamespace(path="a.onnx")
    return StepRunner(graph, patience)


def bound(inference: Any) -> Any:
    binding = inference.io_binding()
    binding.bind_cpu_input("x", np.ones(1, np.float32))
    binding.bind_output("y")
    return binding


def test_a_step_ends_at_its_limit(inference: ort.InferenceSession) -> None:
    message = r"^a step was terminated after 0.1 seconds: raise step_seconds$"
    for _ in range(2):
        with pytest.raises(StepTerminatedError, match=message):
            runner(inference, 0.1).run(bound(inference), "a step")


def session(nodes: list[Any]) -> ort.InferenceSession:
    """A session over a graph with input `x` float [1] and output `y` of any size."""
    info = helper.make_tensor_value_info
    inputs, outputs = [info("x", TensorProto.FLOAT, [1])], [info("y", TensorProto.FLOAT, [None])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "message",
    [
        "[ONNXRuntimeError] : 1 : FAIL : /cumsum.cc:109 ort::CumSum<T>::CumSum(const Info&) [with T = int] the reason",
        "/src/clip.cc:5 Status ort::Clip::Impl<T>::operator()(const Tensor*, Pool*) const [with T = float] the reason",
        "/src/arena.cc:360 void* onnxruntime::BFCArena::Allocate(size_t, bool, void (*)(int)) the reason",
        "slice.h:164 the reason",
        "the\nreason",
    ],
)
def test_reasons_name_no_places_in_the_source_of_a_library(message: str) -> None:
    assert native_reason(RuntimeError(message)) == "the reason"


def test_an_operator_that_fails_is_an_error_of_the_bundle() -> None:
    shape = helper.make_node("Constant", [], ["shape"], value_ints=[7])
    failing = session([shape, helper.make_node("Reshape", ["x", "shape"], ["y"])])
    with pytest.raises(BundleError, match=r"^a.onnx: a step failed \([^\n]*\): export the bundle again$") as caught:
        runner(failing).run(bound(failing), "a step")
    assert ".cc:" not in str(caught.value)
    assert "::" not in str(caught.value)


@pytest.mark.parametrize("patience", [0.0, 0.3])
def test_an_unwanted_step_ends(inference: ort.InferenceSession, patience: float) -> None:
    steps, cancelled = runner(inference, patience=patience), threading.Event()
    steps.unwanted = cancelled.is_set

    def cancel() -> None:
        cancelled.set()
        check_running_steps()

    threading.Timer(0.05, cancel).start()
    with pytest.raises(StepTerminatedError, match=r"^a step was cancelled$"):
        steps.run(bound(inference), "a step")


def test_steps_on_several_threads_are_terminated_separately(inference: ort.InferenceSession) -> None:
    ended: list[int] = []
    flags = [threading.Event() for _ in range(3)]

    def run(number: int) -> None:
        steps = runner(inference)
        steps.unwanted = flags[number].is_set
        with pytest.raises(StepTerminatedError):
            steps.run(bound(inference), "a step")
        ended.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in (1, 0, 2):
        flags[number].set()
        check_running_steps()
        threads[number].join(30)
    assert ended == [1, 0, 2]


def test_ctrl_c_ends_a_step_on_the_main_thread(inference: ort.InferenceSession) -> None:
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        runner(inference).run(bound(inference), "a step")
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_whose_handler_returns_does_not_end_a_step(inference: ort.InferenceSession) -> None:
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        steps, began = runner(inference, 0.5), time.monotonic()
        with pytest.raises(StepTerminatedError, match=r"after 0.5 seconds"):
            steps.run(bound(inference), "a step")
        assert arrived == [signal.SIGINT]
        assert time.monotonic() - began >= 0.5
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_failing_step_is_reported_and_the_next_one_runs(inference: ort.InferenceSession) -> None:
    steps = runner(inference, 0.1)
    with pytest.raises(MachineError, match=r"^a step failed \([^\n]+\)$") as failed:
        steps.run(inference.io_binding(), "a step")
    assert not isinstance(failed.value, StepTerminatedError)
    with pytest.raises(StepTerminatedError):
        steps.run(bound(inference), "a step")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_command_ends_on_a_signal_during_a_step(name: str) -> None:
    code = f"""
import sys
sys.path[:0] = [{str(SUPPORT)!r}, {str(Path(__file__).parent)!r}]
from test_watchdog import bound, runner
from endless import endless_loop
from onnx import TensorProto, helper
from llm_edge.runtime.command import run
inference = endless_loop()
def command():
    print("ready", flush=True)
    runner(inference).run(bound(inference), "a step")
sys.exit(run(command))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "1"])
def test_impossible_limits_are_rejected(seconds: Any) -> None:
    with pytest.raises(ParameterError, match=r"^step_seconds is [^\n]+; use a number above 0, or None$"):
        check_step_seconds(seconds)
