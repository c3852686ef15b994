"""`Session`: splitting tokens into steps does not change the logits; providers, threads and graph checks."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from sessions import open_file

from llm_edge.runtime.backend import providers
from llm_edge.runtime.backend.kv_cache import SharedCache
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.errors import BundleError, ContextLengthError, ParameterError, ProviderError
from llm_edge.runtime.model_shape import ModelShape, key_value_caches

CLOSE = 1e-4
SHAPE = ModelShape(
    vocab_size=11,
    num_hidden_layers=1,
    max_position_embeddings=64,
    caches=key_value_caches(layers=1, heads=2, head_dim=4),
)  # of the graphs created in this file


def open_session(path: Path, precision: str = "fp32", **changes: Any) -> Session:
    bundle = Bundle.open(path)
    info = bundle.precision(precision)
    shape = dataclasses.replace(bundle.shape, **changes)
    return open_file(bundle.file(info.model), shape, info.share_buffer, "cpu", threads=1)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def logits_of(session: Session, ids: list[int], cuts: list[int]) -> np.ndarray[Any, Any]:
    """Logits of all tokens, computed in steps of these lengths."""
    assert sum(cuts) == len(ids)
    session.clear_cache()
    rows, start = [], 0
    for cut in cuts:
        rows.append(session.step(ids[start : start + cut], num_logits=0).copy())
        start += cut
    return np.concatenate(rows)


@pytest.fixture(params=["fused", "portable"])
def bundle(request: pytest.FixtureRequest) -> Path:
    name = {"fused": "tiny_bundle", "portable": "tiny_portable_bundle"}[request.param]
    path: Path = request.getfixturevalue(name)
    return path


@pytest.fixture
def session(bundle: Path) -> Session:
    return open_session(bundle)


@pytest.mark.parametrize("cuts", [[40], [16, 16, 8], [39, 1], [1, 39], [1] * 40, [7, 1, 1, 30, 1]])
def test_splitting_into_steps_does_not_change_the_logits(session: Session, cuts: list[int]) -> None:
    ids = tokens(40)
    whole = logits_of(session, ids, [40])
    assert whole.shape == (40, session.shape.vocab_size)
    assert np.ptp(whole) > 0.1  # otherwise the comparison would be meaningless
    np.testing.assert_allclose(logits_of(session, ids, cuts), whole, atol=CLOSE, rtol=0)


def test_every_token_affects_the_logits(session: Session) -> None:
    ids = tokens(12)
    last = logits_of(session, ids, [12])[-1]
    for place in range(12):
        other = [*ids]
        other[place] = ids[place] + 1
        assert np.abs(logits_of(session, other, [6, 6])[-1] - last).max() > CLOSE, place


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_other_precisions_can_be_split_into_steps(bundle: Path, precision: str) -> None:
    session = open_session(bundle, precision)
    ids = tokens(24)
    whole = logits_of(session, ids, [24])
    np.testing.assert_allclose(logits_of(session, ids, [8, 8, 8]), whole, atol=CLOSE, rtol=0)


def test_a_step_returns_the_requested_number_of_logits(session: Session) -> None:
    ids = tokens(9)
    whole = logits_of(session, ids, [9])
    for count in (1, 2, 9, 1, 5):
        session.clear_cache()
        found = session.step(ids, num_logits=count)
        assert found.shape == (count, session.shape.vocab_size)
        np.testing.assert_allclose(found, whole[-count:], atol=CLOSE, rtol=0)
    session.clear_cache()
    assert session.step(ids).shape == (1, session.shape.vocab_size)


def test_step_lengths_and_logit_counts_may_vary_in_one_conversation(session: Session) -> None:
    ids = tokens(20)
    whole = logits_of(session, ids, [20])
    session.clear_cache()
    start = 0
    for length, count in ((3, 1), (3, 2), (1, 1), (1, 0), (5, 0), (5, 5), (2, 1)):
        found = session.step(ids[start : start + length], num_logits=count)
        start += length
        rows = count or length
        np.testing.assert_allclose(found, whole[start - rows : start], atol=CLOSE, rtol=0)
        assert session.length == start


def test_clear_cache_discards_the_conversation(session: Session) -> None:
    first = session.step(tokens(10)).copy()
    session.step(tokens(10, seed=1))
    session.clear_cache()
    assert session.length == 0
    np.testing.assert_array_equal(session.step(tokens(10)), first)


def test_token_ids_may_be_an_array(session: Session) -> None:
    ids = tokens(5)
    first = session.step(ids).copy()
    session.clear_cache()
    np.testing.assert_array_equal(session.step(np.array(ids)), first)


def test_time_inside_onnxruntime_is_measured(session: Session) -> None:
    assert session.run_seconds == 0
    session.step(tokens(5))
    once = session.run_seconds
    session.step(tokens(5))
    assert 0 < once < session.run_seconds


def capacity(session: Session) -> int:
    assert isinstance(session._cache, SharedCache)
    return session._cache.capacity


def test_the_cache_grows_by_doubling(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle)
    assert (capacity(session), session.limit) == (0, 1024)
    ids = tokens(1024)
    seen = {}
    for start in range(0, 1024, 64):
        session.step(ids[start : start + 64])
        seen[session.length] = capacity(session)
    assert [seen[n] for n in (64, 256, 320, 512, 576, 1024)] == [256, 256, 512, 512, 1024, 1024]
    session.clear_cache()
    session.step(ids[:1])
    assert capacity(session) == 1024  # buffers are kept


def test_a_long_first_step_gets_the_capacity_it_needs(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle)
    session.step(tokens(300))
    assert capacity(session) == 300
    session.step(tokens(1))
    assert capacity(session) == 600


def test_the_cache_never_outgrows_the_context(tiny_bundle: Path) -> None:
    session = open_session(tiny_bundle, max_position_embeddings=300)
    session.step(tokens(256))
    assert capacity(session) == 256
    session.step(tokens(1))
    assert capacity(session) == 300


@pytest.mark.parametrize(
    "cuts",
    [
        [255, 1, 1, 1],  # one at a time across the boundary at 256
        [256, 2],
        [255, 3],
        [256, 256, 1, 1],  # across the second boundary
        [511, 2, 1],
        [200, 300, 14],
    ],
)
def test_values_survive_growth(tiny_bundle: Path, cuts: list[int]) -> None:
    ids = tokens(sum(cuts))
    whole, stepped = open_session(tiny_bundle), open_session(tiny_bundle)
    length = len(ids)
    wanted = logits_of(
        whole, ids, [MAX_STEP_TOKENS, length - MAX_STEP_TOKENS] if length > MAX_STEP_TOKENS else [length]
    )
    np.testing.assert_allclose(logits_of(stepped, ids, cuts), wanted, atol=CLOSE, rtol=0)


def test_the_context_can_be_filled_but_not_exceeded(session: Session) -> None:
    ids = tokens(1024)
    whole = logits_of(session, ids, [512, 512])
    found = logits_of(session, ids, [512, 511, 1])
    assert session.length == session.limit == 1024
    np.testing.assert_allclose(found, whole, atol=CLOSE, rtol=0)
    for surplus in (1, 3):
        with pytest.raises(ContextLengthError) as caught:
            session.step(tokens(surplus))
        assert (caught.value.prompt_tokens, caught.value.limit) == (1024 + surplus, 1024)
        assert str(1024 + surplus) in str(caught.value)
        assert "1024" in str(caught.value)
    assert session.length == 1024  # and the session is still usable
    session.clear_cache()
    np.testing.assert_allclose(session.step(ids[:512], 0), whole[:512], atol=CLOSE, rtol=0)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="there is CUDA here")
def test_cuda_without_a_gpu_is_a_provider_error(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.file(bundle.precision("fp32").model)
    with pytest.raises(ProviderError, match=r"^provider cuda: .*onnxruntime-gpu\[cuda,cudnn\].*provider='cpu'$"):
        open_file(graph, bundle.shape, True, "cuda")
    assert open_file(graph, bundle.shape, True, "auto").provider == "cpu"


def test_changed_inputs_are_bound_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, cuts = tokens(40), [17, 1, 1, 1, 1, 19]
    expected = logits_of(open_session(bundle), ids, cuts)
    last = expected[-1]
    bind, copies = ort.IOBinding.bind_input, []

    def bind_copy(self: Any, name: str, device: str, index: int, kind: Any, shape: list[int], pointer: int) -> None:
        """Copy the array when it is bound, as for an input on a GPU: later changes have no effect."""
        size = math.prod(shape) * np.dtype(kind).itemsize
        copies.append(ctypes.create_string_buffer(ctypes.string_at(pointer, size), size))
        bind(self, name, device, index, kind, shape, ctypes.addressof(copies[-1]))

    monkeypatch.setattr(ort.IOBinding, "bind_input", bind_copy)
    session = open_session(bundle)
    np.testing.assert_array_equal(logits_of(session, ids, cuts), expected)
    session.clear_cache()
    session.step(ids[:-1])
    found = session.step(ids[-1:])
    assert found.shape == (1, expected.shape[1])
    np.testing.assert_allclose(found[0], last, atol=CLOSE, rtol=0)


@pytest.fixture
def cuda_build_without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An onnxruntime that was built with CUDA, on a machine that has none."""
    providers._cuda_problem.cache_clear()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    yield
    providers._cuda_problem.cache_clear()


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="there is CUDA here")
def test_auto_falls_back_to_the_cpu_if_cuda_cannot_start(
    tiny_bundle: Path, cuda_build_without_gpu: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = "Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file"
    monkeypatch.setattr(ort, "preload_dlls", lambda: print(missing))
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.file(bundle.precision("fp32").model)
    with pytest.raises(ProviderError, match=r"^provider cuda: .*\(libcublasLt\.so\.13 is missing\).*provider='cpu'$"):
        open_file(graph, bundle.shape, True, "cuda")
    fallen_back = open_file(graph, bundle.shape, True, "auto")
    assert fallen_back.provider == "cpu"
    assert fallen_back.step(tokens(3)).shape == (1, bundle.shape.vocab_size)
    assert capfd.readouterr() == ("", "")


def test_auto_falls_back_to_the_cpu_if_cuda_cannot_run_the_graph(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: Path, options: Any, providers: list[Any], **rest: Any) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"], **rest)
            self.refuses = len(providers) > 1

        def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
            if self.refuses:
                raise RuntimeError("Unsupported quantization type.")
            super().run_with_iobinding(binding, run_options)

    monkeypatch.setattr(providers, "_cuda_problem", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", Refusing)
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.file(bundle.precision("fp32").model)
    with pytest.raises(
        ProviderError, match=r"^provider cuda: .*Unsupported quantization type.*provider='cpu' or 'auto'$"
    ):
        open_file(graph, bundle.shape, True, "cuda")
    fallen_back = open_file(graph, bundle.shape, True, "auto")
    assert fallen_back.provider == "cpu"
    assert (fallen_back.length, fallen_back.run_seconds) == (0, 0.0)
    expected = open_session(tiny_bundle).step(tokens(9), 0).copy()
    np.testing.assert_allclose(fallen_back.step(tokens(9), 0), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    ("left", "chosen"),
    [
        (["GroupQueryAttention", "Cast", "MatMulIntegerToFloat", "MatMulIntegerToFloat"], "cuda"),  # one per layer
        (["MatMulIntegerToFloat", "MatMulIntegerToFloat", "Gemm"], "cpu"),
    ],
)
def test_auto_uses_the_cpu_if_cuda_lacks_the_matmul_kernels(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, left: list[str], chosen: str
) -> None:
    class Scattered(ort.InferenceSession):  # type: ignore[misc]
        """Reports that CUDA has no kernel for some operators; the CPU computes them all."""

        def __init__(self, path: Path, options: Any, **rest: Any) -> None:
            super().__init__(path, options, **{**rest, "providers": ["CPUExecutionProvider"]})

        def get_provider_graph_assignment_info(self) -> list[Any]:
            def part(name: str, kinds: list[str]) -> Any:
                nodes = [SimpleNamespace(op_type=kind) for kind in kinds]
                return SimpleNamespace(ep_name=name, get_nodes=lambda: nodes)

            return [part("CUDAExecutionProvider", ["MatMul"] * 20), part("CPUExecutionProvider", left)]

    monkeypatch.setattr(providers, "_cuda_problem", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", Scattered)
    bundle = Bundle.open(tiny_bundle)
    assert bundle.shape.num_hidden_layers == 2
    graph = bundle.file(bundle.precision("fp32").model)
    assert open_file(graph, bundle.shape, True, "auto").provider == chosen
    assert open_file(graph, bundle.shape, True, "cuda").provider == "cuda"  # an explicit provider is not overridden


def test_auto_uses_the_cpu_if_onnxruntime_assigns_matmuls_to_it(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An onnxruntime without CUDA assigns all of them to the CPU."""
    init = ort.InferenceSession.__init__

    def without_cuda(self: Any, path: Path, options: Any, **rest: Any) -> None:
        init(self, path, options, **{**rest, "providers": ["CPUExecutionProvider"]})

    monkeypatch.setattr(providers, "_cuda_problem", lambda: None)
    monkeypatch.setattr(ort.InferenceSession, "__init__", without_cuda)
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.file(bundle.precision("int8").model)
    assert open_file(graph, bundle.shape, True, "auto").provider == "cpu"


@pytest.mark.parametrize("provider", ["tpu", "", "CPU", "CPUExecutionProvider"])
def test_unknown_providers_are_rejected(tmp_path: Path, provider: str) -> None:
    with pytest.raises(ParameterError, match=r"^provider is .*use one of auto, cpu, cuda$"):
        open_file(tmp_path / "none.onnx", SHAPE, True, provider)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_invalid_thread_counts_are_rejected(tmp_path: Path, threads: int) -> None:
    with pytest.raises(ParameterError, match=rf"^threads is {threads}; use 1 to 1024$"):
        open_file(tmp_path / "none.onnx", SHAPE, True, "cpu", threads)


@pytest.mark.parametrize("threads", [1, 2, None])
def test_threads_do_not_change_the_logits(tiny_bundle: Path, threads: int | None) -> None:
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.file(bundle.precision("fp32").model)
    session = open_file(graph, bundle.shape, True, "cpu", threads, spinning=False)
    wanted = open_session(tiny_bundle).step(tokens(30))
    np.testing.assert_allclose(session.step(tokens(30)), wanted, atol=CLOSE, rtol=0)


TELEMETRY = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
import llm_edge.runtime
assert "onnxruntime" not in sys.modules
import llm_edge.runtime.backend.graph
assert "onnxruntime" in sys.modules
"""


def test_telemetry_is_off_before_onnxruntime_starts() -> None:
    done = subprocess.run([sys.executable, "-c", TELEMETRY], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1"]


def graph(path: Path, *, rename: dict[str, str] | None = None, **changed: tuple[int, list[Any]]) -> Path:
    """A graph with a decoder's inputs and outputs that computes nothing meaningful.

    `rename` renames some of them; `changed` gives them (by names with underscores) another type and shape.
    """
    integers, floats = TensorProto.INT64, TensorProto.FLOAT
    cache = [1, 2, "tokens", 4]
    inputs: dict[str, tuple[int, list[Any]]] = {
        "input_ids": (integers, [1, "new"]),
        "attention_mask": (integers, [1, "all"]),
        "past_key_values.0.key": (floats, cache),
        "past_key_values.0.value": (floats, cache),
    }
    outputs: dict[str, tuple[int, list[Any]]] = {
        "logits": (floats, [1, "kept", SHAPE.vocab_size]),
        "present.0.key": (floats, cache),
        "present.0.value": (floats, cache),
    }
    kept = helper.make_tensor("num_logits_to_keep", integers, [], [0])
    width = changed["logits"][1][-1] if "logits" in changed else SHAPE.vocab_size
    values_of_logits = helper.make_tensor("values", floats, [1, 1, width], [0.0] * width)
    nodes = [
        helper.make_node("Identity", ["values"], ["logits"]),
        helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"]),
        helper.make_node("Identity", ["past_key_values.0.value"], ["present.0.value"]),
    ]
    for values in (inputs, outputs):
        for name in values:
            values[name] = changed.get(name.replace(".", "_"), values[name])
    new = {name: name for name in (*inputs, *outputs, "num_logits_to_keep")} | (rename or {})
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    kept.name = new["num_logits_to_keep"]
    graph_proto = helper.make_graph(
        nodes,
        "decoder",
        [
            *(helper.make_tensor_value_info(new[name], *value) for name, value in inputs.items()),
            helper.make_tensor_value_info(kept.name, integers, []),
        ],
        [helper.make_tensor_value_info(new[name], *value) for name, value in outputs.items()],
        [kept, values_of_logits],
    )
    model = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def test_the_unmodified_test_graph_is_accepted(tmp_path: Path) -> None:
    session = open_file(graph(tmp_path / "fits.onnx"), SHAPE, False, "cpu")
    assert session.step([1], num_logits=1).shape == (1, SHAPE.vocab_size)


@pytest.mark.parametrize(
    ("rename", "changed", "reason"),
    [
        ({"input_ids": "tokens"}, {}, "inputs and outputs"),
        ({"attention_mask": "mask"}, {}, "inputs and outputs"),
        ({"past_key_values.0.value": "past_key_values.1.key"}, {}, "inputs and outputs"),
        ({"present.0.key": "present.0.k"}, {}, "inputs and outputs"),
        ({"num_logits_to_keep": "keep"}, {}, "inputs and outputs"),
        ({}, {"logits": (TensorProto.FLOAT, [1, "kept", 12])}, "vocabulary is 12, not 11"),
        ({}, {"past_key_values_0_key": (TensorProto.FLOAT, [1, 3, "tokens", 4])}, "which contradicts the manifest"),
        ({}, {"past_key_values_0_key": (TensorProto.FLOAT, [1, 2, "tokens", 8])}, "which contradicts the manifest"),
        (
            {},
            {
                name: (TensorProto.DOUBLE, [1, 2, "tokens", 4])
                for name in ("past_key_values_0_key", "past_key_values_0_value", "present_0_key", "present_0_value")
            },
            r"a cache of type tensor\(double\) is not supported",
        ),
    ],
)
def test_graphs_with_wrong_inputs_or_outputs_are_rejected(
    tmp_path: Path, rename: Any, changed: Any, reason: str
) -> None:
    path = graph(tmp_path / "strange.onnx", rename=rename, **changed)
    with pytest.raises(BundleError, match=reason) as caught:
        open_file(path, SHAPE, False, "cpu")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(1000), b"\x08\x0a" * 50])
def test_files_that_are_not_onnx_graphs_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx: ") as caught:
        open_file(path, SHAPE, False, "cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_graph_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: no such file"):
        open_file(tmp_path / "model.onnx", SHAPE, False, "cpu")


def test_a_graph_without_its_weights_is_an_error(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    path = tmp_path / "model.onnx"
    path.write_bytes(bundle.file(bundle.precision("fp32").model).read_bytes())
    assert not (tmp_path / "model.onnx_data").exists()
    with pytest.raises(BundleError, match="weights are outside of their file"):
        open_file(path, bundle.shape, True, "cpu")
    assert os.listdir(tmp_path) == ["model.onnx"]  # noqa: PTH208


def test_a_step_rejects_invalid_arguments(tiny_bundle: Path) -> None:
    step = open_session(tiny_bundle).step
    for tokens, num_logits in (([], 1), ([1] * (MAX_STEP_TOKENS + 1), 1), ([1, 2], 3), ([1, 2], -1)):
        with pytest.raises(ParameterError):
            step(tokens, num_logits)
