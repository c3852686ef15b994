"""Graphs whose steps do not end until they are terminated."""

from __future__ import annotations

import threading
import time
from typing import Any

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper


class Endless:
    """An onnxruntime session whose next `times` steps do not end until they are terminated."""

    def __init__(self, inference: Any, times: int = -1) -> None:
        self._inference = inference
        self.times = times
        self.entered = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inference, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.times:
            self.times -= 1
            self.entered.set()
            until = time.monotonic() + 60
            while not options.terminate:
                assert time.monotonic() < until
                time.sleep(0.005)
        self._inference.run_with_iobinding(binding, options)  # raises if it is to terminate


def endless_loop() -> ort.InferenceSession:
    """A real session over a graph with a loop that takes years: input `x` float [1], output `y`."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["still"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [1]),
        ],
    )
    count = helper.make_tensor("count", TensorProto.INT64, [], [2**62])
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [count],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
