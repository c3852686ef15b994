"""A cache of int8: its numbers are those of the float cache, rounded once, and little is lost."""

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
    "llama with heads of 24",  # rotated outside of the operator
    "qwen3",  # norms of queries and keys, a tied head
    "smollm3",  # layers without a rotation, a window
)
LOST = 0.12  # of the logits' size; up to 0.09 was measured, 0.46 and more with scales that are all one
SAME = 5e-3  # what a rounding that falls the other way may make of them; mostly they are the same bit for bit


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


def opened(bundle: Bundle, path: Path) -> Session:
    return open_file(path, bundle.shape, share_buffer=True, provider="cpu", threads=1)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, count).tolist()


def logits_of(session: Session, ids: list[int], cuts: list[int] | None = None) -> Array:
    session.clear_cache()
    ends = np.cumsum(cuts or [len(ids)])
    return np.concatenate([session.step(part, 0).copy() for part in np.split(np.array(ids), ends[:-1])])


def distance(found: Array, wanted: Array) -> float:
    """How far logits are from others, relative to their size."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def run(path: Path, ids: Array, mask: Array | None = None) -> dict[str, Array]:
    """All outputs of a graph for prompts [B, S], behind an empty cache."""
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


def test_the_cache_holds_what_the_float_cache_holds_rounded_once(bundle: Bundle) -> None:
    """Told by the first layer: what it is given is the same in both graphs."""
    ids = np.array([tokens(60)])
    wanted, found = run(path_of(bundle, "int8"), ids), run(path_of(bundle, "int8-kv8"), ids)
    scales = scales_of(path_of(bundle, "int8-kv8"))
    heads, width = bundle.shape.num_key_value_heads, bundle.shape.head_dim
    for part in ("key", "value"):
        scale = scales[f"layers.0.attention.{part}_scales"]
        assert scale.shape == (1, heads, 1, width)
        assert len(np.unique(scale)) > heads * width / 4  # a scale a channel; halves of rotated keys share theirs
        levels = found[f"present.0.{part}"]
        assert levels.dtype == np.int8
        exact = wanted[f"present.0.{part}"].clip(-128 * scale, 127 * scale)
        assert (np.abs(levels * scale - exact) <= 0.501 * scale).all()
        assert np.median(np.abs(levels.astype(int)).max((0, 2))) > 50  # the range is used


def test_logits_are_near_those_over_a_float_cache(bundle: Bundle, tmp_path: Path) -> None:
    ids = tokens(80)
    usual, path = opened(bundle, path_of(bundle, "int8")), path_of(bundle, "int8-kv8")
    wanted = logits_of(usual, ids)
    lost = distance(logits_of(opened(bundle, path), ids), wanted)
    assert 1e-4 < lost < LOST
    model = onnx.load(path)  # with scales that are all the same it would be told
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scales"):
            tensor.CopyFrom(numpy_helper.from_array(np.ones(tensor.dims, dtype=np.float32), tensor.name))
    onnx.save(model, tmp_path / "ones.onnx")
    assert distance(logits_of(opened(bundle, tmp_path / "ones.onnx"), ids), wanted) > 3 * LOST


@pytest.mark.parametrize("cuts", [[1] * 70, [33, 37], [64, 1, 1, 1, 3]])
def test_the_cut_into_steps_does_not_matter(bundle: Bundle, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_INITIAL_CAPACITY", 8)  # the buffers grow on the way
    ids = tokens(70, seed=1)
    session = opened(bundle, path_of(bundle, "int8-kv8"))
    assert distance(logits_of(session, ids, cuts), logits_of(session, ids)) < SAME


def test_rows_of_a_batch_do_not_see_each_other(bundle: Bundle) -> None:
    path, ids = path_of(bundle, "int8-kv8"), np.array([tokens(30, seed) for seed in range(3)])
    mask = np.ones_like(ids)
    mask[1, 20:] = 0  # padded on the right
    together = run(path, ids, mask)["logits"]
    for row, length in enumerate((30, 20, 30)):
        alone = run(path, ids[row : row + 1, :length])["logits"][0]
        assert distance(together[row, :length], alone) < SAME


def test_keys_behind_the_calibrated_positions_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far behind, a rotation has turned one half of a key into the other. The first layer's keys are the same else."""
    tiny.shorten_texts(monkeypatch, SHORT)
    bundle = exported(families.save(families.model("llama"), tmp_path / "source"), tmp_path / "bundle")
    text = (DATA / "calibration.txt").read_text(encoding="utf-8")
    calibrated = tiny.tokenizer().encode(text, add_special_tokens=False).ids[:SHORT]
    ids = np.array([calibrated * 5])
    assert ids.shape[1] <= bundle.shape.max_position_embeddings
    keys = run(path_of(bundle, "int8"), ids)["present.0.key"]
    scale = scales_of(path_of(bundle, "int8-kv8"))["layers.0.attention.key_scales"]
    assert (np.abs(keys) <= 127 * scale).all()
    seen = np.abs(keys[:, :, :SHORT]).max(2)
    assert (np.abs(keys).max(2) > 1.2 * seen).any()  # or this would have shown nothing


# ---- where there is none


@pytest.mark.parametrize(
    ("case", "style"), [("llama", GraphChoice.PORTABLE), ("llama with heads of 6", GraphChoice.AUTO)]
)
def test_standard_operators_have_no_such_cache(
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
def test_other_runtimes_are_given_int8_where_it_is_there_and_else_the_first(precisions: str, taken: str) -> None:
    assert preferred(parse_precisions(precisions)).name == taken


def test_bundle_and_recipe_say_what_it_is(bundle: Bundle) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
    assert "int8 cache" in manifest["precisions"]["int8-kv8"]["recipe"]
    assert "cache" not in manifest["precisions"]["int8"]["recipe"]
    genai = json.loads((bundle.path / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["decoder"]["filename"] == f"onnx/{RECIPES['int8'].stem}.onnx"
    assert bundle.precision().name == "int8"
    assert not RECIPES["int8-kv8"].lossless


def test_an_engine_over_it_answers_as_a_model_does(bundle: Bundle) -> None:
    """Alone and eight at once, probabilities and all, with a prefix that was kept and guesses that were right."""
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
            wanted.append(made(model.generate(prompt, params).result()))
        with Engine.load(bundle.path, "int8-kv8", threads=1, speculative=True) as engine:
            alone = [made(engine.generate(prompt, params).result()) for prompt in prompts]
            answers = [engine.generate(prompt, params) for prompt in prompts]
            together = [made(answer.result()) for answer in answers]
            assert engine.counters().cached_tokens > 0
        assert alone == wanted
        assert together == wanted


def made(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason, result.logprobs
