"""fp16: all tensors between token ids and logits are float16, and the logits are close to those of fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from onnx import TensorProto
from sessions import open_file

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.exporter.quantization.recipes import RECIPES, parse_precisions
from llm_edge.runtime import Engine, Model, SamplingParams
from llm_edge.runtime.backend import providers
from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import CheckpointError, ProviderError

CASES = (
    ("llama", GraphChoice.FUSED),
    ("llama", GraphChoice.PORTABLE),
    ("llama with biases, tied", GraphChoice.FUSED),
    ("qwen3", GraphChoice.FUSED),  # query and key norms
    ("phi3, longrope on a part of each head", GraphChoice.FUSED),
    ("gemma3_text", GraphChoice.FUSED),  # scaled embeddings, sliding windows
    ("gpt2", GraphChoice.PORTABLE),  # LayerNorm, learned positions
    ("gemma2", GraphChoice.FUSED),  # softcapping
    ("gemma2", GraphChoice.PORTABLE),
    ("ministral3", GraphChoice.FUSED),  # queries that grow
    ("olmo", GraphChoice.FUSED),  # LayerNorm without weights
    ("nemotron", GraphChoice.FUSED),  # squared ReLU
)
BOUND = 8e-3  # relative to the size of the logits; measured: up to 2.7e-3


def exported(source: Path, output: Path, graph: GraphChoice, *, validate: bool = False) -> Bundle:
    export(str(source), ExportOptions(output, precision="fp32,fp16", graph=graph, validate=validate))
    return Bundle.open(output)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1].value}")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("half")
    name, style = request.param
    return exported(families.save(families.model(name), folder / "source"), folder / "bundle", style)


def path_of(bundle: Bundle, precision: str) -> Path:
    return bundle.file(bundle.precision(precision).model)


def logits_of(bundle: Bundle, precision: str, cuts: list[int]) -> npt.NDArray[Any]:
    info = bundle.precision(precision)
    session = open_file(bundle.file(info.model), bundle.shape, info.share_buffer, provider="cpu", threads=1)
    ids = np.random.default_rng(0).integers(3, 300, sum(cuts))
    return np.concatenate([session.step(part, 0).copy() for part in np.split(ids, np.cumsum(cuts)[:-1])])


def distance(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_only_logits_and_rotary_angles_are_float32(bundle: Bundle) -> None:
    model = onnx.load(path_of(bundle, "fp16"))
    kept = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert all(name.startswith("rotary_") for name in kept)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert [name for name, kind in types.items() if kind == TensorProto.FLOAT] == ["logits"]
    caches = [name for name, kind in types.items() if kind == TensorProto.FLOAT16]
    assert len(caches) == 4 * bundle.shape.num_hidden_layers
    made = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert all("rotary_" in name for name, kind in made.items() if kind == TensorProto.FLOAT)


def test_fp16_files_are_half_the_size_of_fp32(bundle: Bundle) -> None:
    sizes = [sum(path.stat().st_size for path in (bundle.path / "onnx").glob(f"{RECIPES[name].stem}.onnx_data"))
             for name in ("fp16", "fp32")]  # fmt: skip
    assert 0.48 < sizes[0] / sizes[1] < 0.55


def test_logits_are_close_to_those_of_fp32(bundle: Bundle) -> None:
    found, wanted = (logits_of(bundle, precision, [30]) for precision in ("fp16", "fp32"))
    assert found.dtype == np.float32
    assert 1e-5 < distance(found, wanted) < BOUND


@pytest.mark.parametrize("cuts", [[1] * 30, [13, 17]])
def test_splitting_into_steps_does_not_change_the_logits(bundle: Bundle, cuts: list[int]) -> None:
    assert distance(logits_of(bundle, "fp16", cuts), logits_of(bundle, "fp16", [30])) < BOUND


def test_fp16_is_validated_but_not_against_the_fp32_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.shorten_texts(monkeypatch, 64)
    source = families.save(families.model("llama"), tmp_path / "source")
    bundle = exported(source, tmp_path / "bundle", GraphChoice.FUSED, validate=True)
    entry = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))["precisions"]["fp16"]
    assert entry["recipe"] == "fp16"
    assert entry["parity"]
    assert 0 < entry["quality"]["kl_mean"] < 0.01
    assert bundle.precision().name == "fp32"  # fp16 is slow on a CPU, so it is not the default there


@pytest.fixture
def simulated_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Simulate CUDA on the CPU; a step fails once the returned list contains a reason."""
    reasons: list[str] = []

    class SimulatedCuda(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: Path, options: Any, providers: list[Any], **rest: Any) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"], **rest)
            self.on_cuda = len(providers) > 1

        def get_provider_graph_assignment_info(self) -> list[Any]:
            return []  # no operator is assigned to the CPU

        def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
            if self.on_cuda and reasons:
                raise RuntimeError(reasons[0])
            super().run_with_iobinding(binding, run_options)

    monkeypatch.setattr(providers, "_cuda_problem", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", SimulatedCuda)
    return reasons


def test_fp16_is_the_default_on_cuda(bundle: Bundle, tiny_bundle: Path, simulated_cuda: list[str]) -> None:
    def loaded(precision: str | None, provider: str) -> tuple[str, str]:
        model = Model.load(bundle.path, precision, provider=provider, threads=1)
        return model.precision.name, model.provider

    assert loaded(None, "auto") == loaded(None, "cuda") == ("fp16", "cuda")
    assert loaded("fp32", "auto") == ("fp32", "cuda")
    assert loaded(None, "cpu") == ("fp32", "cpu")
    assert Model.load(tiny_bundle, None, provider="auto", threads=1).precision.name == "int8"  # has no fp16
    simulated_cuda.append("CUDA failure 2: out of memory")
    assert loaded(None, "auto") == ("fp32", "cpu")
    assert loaded("fp16", "auto") == ("fp16", "cpu")  # an explicit precision is not overridden
    with pytest.raises(ProviderError, match=r"^provider cuda: .*not enough memory.*provider='cpu' or 'auto'$"):
        loaded(None, "cuda")


def test_an_engine_chooses_fp16_if_asked_to_try_cuda(tmp_path: Path, simulated_cuda: list[str]) -> None:
    made = exported(families.save(families.model("llama"), tmp_path / "source"), tmp_path / "bundle", GraphChoice.FUSED)

    def loaded(**options: Any) -> tuple[str, str, int]:
        with Engine.load(made.path, None, threads=1, **options) as engine:
            params = SamplingParams(max_tokens=4, min_tokens=4)
            length = len(engine.generate([5, 6, 7], params).result().tokens)
            return engine.precision.name, engine.provider, length

    assert loaded() == ("fp32", "cpu", 4)
    assert loaded(provider="auto") == loaded(provider="cuda") == ("fp16", "cuda", 4)
    simulated_cuda.append("CUDA failure 2: out of memory")
    assert loaded(provider="auto", active=2) == ("fp32", "cpu", 4)


def test_fp16_is_the_last_choice_by_default() -> None:
    assert [recipe.name for recipe in parse_precisions("fp16,int4,int8-kv8")][-1] == "fp16"
    assert not RECIPES["fp16"].lossless


def test_a_weight_outside_the_float16_range_is_an_error(tmp_path: Path) -> None:
    made = families.model("llama")
    with torch.no_grad():
        made.model.layers[1].mlp.down_proj.weight[3, 4] = 1e5
    source = families.save(made, tmp_path / "source")
    with pytest.raises(CheckpointError) as caught:
        exported(source, tmp_path / "bundle", GraphChoice.FUSED)
    for words in ("layers.1.mlp.down.weight", "65504", "1e+05", "remove fp16 from --precision"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
