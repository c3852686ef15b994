"""int8 KV cache: it holds the values of the float cache rounded once, with a small loss of accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import tiny
from onnx import TensorProto, numpy_helper
from project import DATA
from sessions import open_file

from llm_edge.exporter.bundle.side_files import preferred
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.exporter.quantization.recipes import RECIPES, parse_precisions
from llm_edge.runtime import Engine, GenerationResult, Model, SamplingParams
from llm_edge.runtime.backend import kv_cache
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import ParameterError

Array = npt.NDArray[Any]
CALIBRATION = 512  # tokens
SHORT = 48  # tokens
CASES = (
    "llama with heads of 24",  # rotary embedding outside the operator
    "qwen3",  # query and key norms, a tied head
    "smollm3",  # layers without rotary embedding, a sliding window
)
LOST = 0.12  # relative to the size of the logits; measured: up to 0.09, and at least 0.46 if all scales are one
SAME = 5e-3  # a value rounded the other way may cause this much; usually the logits are bitwise equal


@pytest.fixture(scope="module", params=CASES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    folder = tmp_path_factory.mktemp("int8_cache")
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_texts(patch, CALIBRATION)
        yield exported(families.save(families.model(request.param), folder / "source"), folder / "bundle")


def exported(
    source: Path, output: Path, precisions: str = "int8,int8-kv8", graph: GraphChoice = GraphChoice.AUTO
) -> Bundle:
    export(str(source), ExportOptions(output, precision=precisions, graph=graph, validate=False))
    return Bundle.open(output)


def path_of(bundle: Bundle, precision: str) -> Path:
    return bundle.file(bundle.precision(precision).model)


def open_session(bundle: Bundle, path: Path) -> Session:
    return open_file(path, bundle.shape, share_buffer=True, provider="cpu", threads=1)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def logits_of(session: Session, ids: list[int], cuts: list[int] | None = None) -> Array:
    session.clear_cache()
    ends = np.cumsum(cuts or [len(ids)])
    return np.concatenate([session.step(part, 0).copy() for part in np.split(np.array(ids), ends[:-1])])


def distance(found: Array, wanted: Array) -> float:
    """The largest difference of logits relative to their size."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def run(path: Path, ids: Array, mask: Array | None = None) -> dict[str, Array]:
    """All outputs of a graph for prompts [B, S] with an empty cache."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
    for node in session.get_inputs()[2:]:
        dtype = np.int8 if node.type == "tensor(int8)" else np.float32
        feeds[node.name] = np.zeros((len(ids), node.shape[1], 0, node.shape[3]), dtype=dtype)
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def scales_of(path: Path) -> dict[str, Array]:
    graph = onnx.load(path).graph
    return {it.name: numpy_helper.to_array(it) for it in graph.initializer if it.name.endswith("_scales")}


def test_the_cache_is_int8_and_nothing_else_changed(bundle: Bundle) -> None:
    types = {
        precision: {
            value.name: value.type.tensor_type.elem_type
            for value in (*graph.input, *graph.output)
        }
        for precision in ("int8", "int8-kv8")
        for graph in [onnx.load(path_of(bundle, precision), load_external_data=False).graph]
    }  # fmt: skip
    usual, small = types["int8"], types["int8-kv8"]
    caches = {name for name in usual if name.startswith(("past_key_values.", "present."))}
    assert len(caches) == 4 * bundle.shape.num_hidden_layers
    assert {usual[name] for name in caches} == {TensorProto.FLOAT}
    assert {small[name] for name in caches} == {TensorProto.INT8}
    assert {name: it for name, it in usual.items() if name not in caches} == {
        name: it for name, it in small.items() if name not in caches
    }


def test_the_cache_holds_the_float_cache_rounded_once(bundle: Bundle) -> None:
    """Checked in the first layer, whose input is the same in both graphs."""
    ids = np.array([tokens(60)])
    wanted, found = run(path_of(bundle, "int8"), ids), run(path_of(bundle, "int8-kv8"), ids)
    scales = scales_of(path_of(bundle, "int8-kv8"))
    heads, width = bundle.shape.caches[0].shape
    for part in ("key", "value"):
        scale = scales[f"layers.0.attention.{part}_scales"]
        assert scale.shape == (1, heads, 1, width)
        assert (
            len(np.unique(scale)) > heads * width / 4
        )  # one scale per channel; the two halves of rotated keys share theirs
        levels = found[f"present.0.{part}"]
        assert levels.dtype == np.int8
        exact = wanted[f"present.0.{part}"].clip(-128 * scale, 127 * scale)
        assert (np.abs(levels * scale - exact) <= 0.501 * scale).all()
        assert np.median(np.abs(levels.astype(int)).max((0, 2))) > 50  # the range is used


def test_logits_are_close_to_those_with_a_float_cache(bundle: Bundle, tmp_path: Path) -> None:
    ids = tokens(80)
    usual, path = open_session(bundle, path_of(bundle, "int8")), path_of(bundle, "int8-kv8")
    wanted = logits_of(usual, ids)
    lost = distance(logits_of(open_session(bundle, path), ids), wanted)
    assert 1e-4 < lost < LOST
    model = onnx.load(path)  # equal scales would be detected
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scales"):
            tensor.CopyFrom(numpy_helper.from_array(np.ones(tensor.dims, dtype=np.float32), tensor.name))
    onnx.save(model, tmp_path / "ones.onnx")
    assert distance(logits_of(open_session(bundle, tmp_path / "ones.onnx"), ids), wanted) > 3 * LOST


@pytest.mark.parametrize("cuts", [[1] * 70, [33, 37], [64, 1, 1, 1, 3]])
def test_splitting_into_steps_does_not_change_the_logits(
    bundle: Bundle, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_INITIAL_CAPACITY", 8)  # the buffers grow meanwhile
    ids = tokens(70, seed=1)
    session = open_session(bundle, path_of(bundle, "int8-kv8"))
    assert distance(logits_of(session, ids, cuts), logits_of(session, ids)) < SAME


def test_sequences_of_a_batch_are_independent(bundle: Bundle) -> None:
    path, ids = path_of(bundle, "int8-kv8"), np.array([tokens(30, seed) for seed in range(3)])
    mask = np.ones_like(ids)
    mask[1, 20:] = 0  # padded on the right
    together = run(path, ids, mask)["logits"]
    for row, length in enumerate((30, 20, 30)):
        alone = run(path, ids[row : row + 1, :length])["logits"][0]
        assert distance(together[row, :length], alone) < SAME


def test_keys_at_positions_beyond_calibration_are_in_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At distant positions the rotary embedding mixes the halves of a key; nothing else changes in the first layer."""
    tiny.shorten_texts(monkeypatch, SHORT)
    bundle = exported(families.save(families.model("llama"), tmp_path / "source"), tmp_path / "bundle")
    text = (DATA / "calibration" / "prose.txt").read_text(encoding="utf-8")
    calibrated = tiny.tokenizer().encode(text, add_special_tokens=False).ids[:SHORT]
    ids = np.array([calibrated * 5])
    assert ids.shape[1] <= bundle.shape.max_position_embeddings
    keys = run(path_of(bundle, "int8"), ids)["present.0.key"]
    scale = scales_of(path_of(bundle, "int8-kv8"))["layers.0.attention.key_scales"]
    assert (np.abs(keys) <= 127 * scale).all()
    seen = np.abs(keys[:, :, :SHORT]).max(2)
    assert (np.abs(keys).max(2) > 1.2 * seen).any()  # otherwise the test would be meaningless


# ---- unsupported graphs and options


@pytest.mark.parametrize(
    ("case", "style"), [("llama", GraphChoice.PORTABLE), ("llama with heads of 6", GraphChoice.AUTO)]
)
def test_standard_operators_do_not_support_an_int8_cache(
    case: str, style: GraphChoice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.shorten_texts(monkeypatch, CALIBRATION)
    source = families.save(families.model(case), tmp_path / "source")
    with pytest.raises(ParameterError) as caught:
        exported(source, tmp_path / "bundle", "int8-kv8", style)
    for words in ("int8-kv8", "portable graphs", "omit it", "--graph fused"):
        assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("precisions", "taken"),
    [
        ("int8-kv8,int8", "int8"),
        ("int4,int8-kv8", "int4"),
        ("int8-kv8", "int8-kv8"),
    ],
)
def test_other_runtimes_use_int8_if_present_and_else_the_first_precision(precisions: str, taken: str) -> None:
    assert preferred(parse_precisions(precisions)).name == taken


def test_the_bundle_and_the_recipe_describe_the_cache(bundle: Bundle) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
    assert "int8 cache" in manifest["precisions"]["int8-kv8"]["recipe"]
    assert "cache" not in manifest["precisions"]["int8"]["recipe"]
    genai = json.loads((bundle.path / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["decoder"]["filename"] == f"onnx/{RECIPES['int8'].stem}.onnx"
    assert bundle.precision().name == "int8"
    assert not RECIPES["int8-kv8"].lossless


def test_an_engine_with_an_int8_cache_matches_a_model(bundle: Bundle) -> None:
    """Alone and eight at once, including log-probabilities, with a cached prefix and accepted draft tokens."""
    prompts = [tokens(40 + 3 * seed, seed) for seed in range(6)]
    prompts += [prompts[0] + prompts[1], prompts[2][:9] * 8]
    for params in (
        SamplingParams(temperature=0, max_tokens=24, logprobs=0),
        SamplingParams(temperature=1, seed=3, max_tokens=24, logprobs=0),
    ):
        model = Model.load(bundle.path, "int8-kv8", provider="cpu", threads=1)
        wanted = []
        for prompt in prompts:
            model.clear_cache()
            wanted.append(outcome(model.generate(prompt, params).result()))
        with Engine.load(bundle.path, "int8-kv8", threads=1, speculative=True) as engine:
            alone = [outcome(engine.generate(prompt, params).result()) for prompt in prompts]
            answers = [engine.generate(prompt, params) for prompt in prompts]
            together = [outcome(answer.result()) for answer in answers]
            assert engine.counters().cached_tokens > 0
        assert alone == wanted
        assert together == wanted


def outcome(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason, result.logprobs
