"""`llm-export --hidden-states` and `Model.embed`: hidden states match transformers."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import tiny
import torch
from sessions import open_file

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.export import export
from llm_edge.exporter.graph import trace as graph_module
from llm_edge.exporter.graph.passes.hidden_states import add_hidden_states
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.exporter.quantization.rotate import rotates_residual
from llm_edge.runtime import Engine, FinishReason, Model, SamplingParams
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS, PREFILL_CHUNK
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.embed import POOLINGS, pooled
from llm_edge.runtime.errors import BundleError, ContextLengthError, LogitsError, ParameterError
from llm_edge.runtime.scheduling.batch import Batch

Array = npt.NDArray[Any]

OUTPUTS = ("logits", "hidden_states")
PRECISIONS = ("fp32", "int8", "int4", "fp16")
CASES = [  # a tied head, an untied one, scaled logits; output norms and LayerNorms are not rotated
    ("llama, tied", "fused"),
    ("llama, tied", "portable"),
    ("llama, untied", "fused"),
    ("granite", "fused"),
    ("gemma3_text", "portable"),
    ("gpt2", "portable"),
]
IDS = torch.randint(0, 331, (1024,), generator=torch.Generator().manual_seed(3)).tolist()
TEXT = "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris, of course! "
GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=20)


class Case:
    """A model in transformers, and its bundles with hidden states, one per graph style."""

    def __init__(self, name: str, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._folder = folder
        self.checkpoint = folder / "checkpoint"
        if name.startswith("llama"):
            tiny.save_checkpoint(self.checkpoint, tie_word_embeddings=name == "llama, tied")
        else:
            families.save(families.model(name), self.checkpoint)
        self.config = read_folder(self.checkpoint).config
        self._theirs = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype="float32").eval()
        self.ids = IDS[: self.config.max_position_embeddings]

    def bundle(self, style: str, *, hidden_states: bool = True) -> Path:
        """Exported without validation, and calibrated on a short text; not to be written to."""
        target = self._folder / (style if hidden_states else f"{style} without")
        if not target.exists():
            options = ExportOptions(
                target,
                precision=",".join(PRECISIONS),
                graph=GraphChoice(style),
                hidden_states=hidden_states,
                validate=False,
            )
            with pytest.MonkeyPatch.context() as patch:
                tiny.shorten_texts(patch, 1000)
                export(str(self.checkpoint), options)
        return target

    @torch.inference_mode()
    def states(self, ids: list[int]) -> Array:
        """`last_hidden_state` [n, H] of transformers."""
        found: Array = self._theirs.base_model(torch.tensor([ids])).last_hidden_state[0].numpy()
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            cases[name] = Case(name, tmp_path_factory.mktemp("embed"))
        return cases[name]

    return get


@pytest.fixture(scope="module")
def llama(case: Callable[[str], Case]) -> Case:
    return case("llama, tied")


@pytest.fixture(scope="module")
def plain_bundle(llama: Case) -> Path:
    """Without hidden states."""
    return llama.bundle("fused", hidden_states=False)


@pytest.fixture(scope="module")
def model(llama: Case) -> Model:
    return Model.load(llama.bundle("fused"), "fp32", provider="cpu", threads=1)


def cosine(one: Array, other: Array) -> Any:
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


def test_the_cases_cover_all_kinds_of_models(case: Callable[[str], Case]) -> None:
    configs = [case(name).config for name, _ in CASES]
    rotated = {(rotates_residual(config), config.tie_word_embeddings) for config in configs}
    assert rotated >= {(True, True), (True, False), (False, True)}
    assert {config.hidden_scale for config in configs} == {1.0, 0.5}


@pytest.mark.parametrize(("name", "style"), CASES)
def test_hidden_states_match_transformers(name: str, style: str, case: Callable[[str], Case]) -> None:
    found = case(name)
    wanted = found.states(found.ids)
    assert wanted.std() > 0.5  # otherwise the bounds would be meaningless
    for precision in PRECISIONS:
        model = Model.load(found.bundle(style), precision, provider="cpu", threads=1)
        states = {pooling: model.embed(found.ids, pooling) for pooling in POOLINGS}
        assert all(each.dtype == np.float32 for each in states.values())
        assert states["none"].shape == wanted.shape
        for got, reference in (
            (states["none"], wanted),
            (states["mean"], wanted.mean(0, dtype=np.float64)),
            (states["last"], wanted[-1]),
        ):
            if precision == "fp32":
                assert np.abs(got - reference).max() < 1e-4
            else:
                assert cosine(got, reference).mean() > {"int8": 0.99, "int4": 0.94, "fp16": 0.99999}[precision]
        lengths = np.linalg.norm(states["none"], axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert abs(lengths.mean() - 1) < 0.02


@pytest.mark.parametrize("length", [1, 2, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 3, 1024])
def test_texts_of_any_length_are_embedded(length: int, model: Model, llama: Case) -> None:
    wanted = llama.states(IDS[:length])
    assert np.abs(model.embed(IDS[:length]) - wanted.mean(0, dtype=np.float64)).max() < 1e-4
    assert np.abs(model.embed(IDS[:length], "last") - wanted[-1]).max() < 1e-4
    assert np.abs(model.embed(IDS[:length], "none") - wanted).max() < 1e-4


def test_a_text_and_its_tokens_have_the_same_embedding(model: Model) -> None:
    assert (model.embed(TEXT) == model.embed(model.tokenizer.encode(TEXT))).all()
    assert model.embed(TEXT).shape == (64,)
    assert not np.allclose(model.embed(TEXT), model.embed("Hello"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_can_be_normalized(pooling: str, model: Model) -> None:
    plain, normalized = model.embed(IDS[:300], pooling), model.embed(IDS[:300], pooling, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(normalized * np.linalg.norm(plain, axis=-1, keepdims=True), plain, atol=1e-5)


@pytest.mark.parametrize("style", ["fused", "portable"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_embedding_and_generating_do_not_affect_each_other(style: str, precision: str, llama: Case) -> None:
    model = Model.load(llama.bundle(style), precision, provider="cpu", threads=1)
    wanted, vector, score = model.generate(TEXT, GREEDY).result(), model.embed(TEXT), model.score(TEXT)
    running = model.generate(TEXT, GREEDY)
    next(iter(running))
    assert (model.embed(TEXT) == vector).all()
    assert running.result().finish_reason is FinishReason.CANCELLED
    assert model.score(TEXT) == score
    again = model.generate(TEXT, GREEDY).result()
    assert (again.tokens, again.timings.cached_tokens) == (wanted.tokens, 0)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_answers_equal_those_of_a_bundle_without_hidden_states(precision: str, llama: Case, plain_bundle: Path) -> None:
    """Logits of the same model are bitwise equal, alone and in a batch."""
    plain, offering = (
        Model.load(path, precision, provider="cpu", threads=1) for path in (plain_bundle, llama.bundle("fused"))
    )
    assert plain.score(IDS[:700]) == offering.score(IDS[:700])
    wanted = plain.generate(TEXT, GREEDY).result().tokens
    assert offering.generate(TEXT, GREEDY).result().tokens == wanted
    with Engine.load(llama.bundle("fused"), precision, threads=1) as engine:
        answers = [engine.generate(TEXT, GREEDY) for _ in range(3)]
        assert [answer.result().tokens for answer in answers] == [wanted] * 3


def test_unused_hidden_states_are_computed_for_one_position_only(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime computes outputs even if they are not fetched, so each step limits their positions."""
    inputs: dict[str, int] = {}
    fetched: list[str] = []

    def bind_input(self: Any, name: str, *where: Any) -> None:
        inputs[name] = where[-1]
        original_input(self, name, *where)

    def bind_output(self: Any, name: str, *where: Any) -> None:
        fetched.append(name)
        original_output(self, name, *where)

    def asked() -> tuple[list[str], int, int]:
        names = [name for name in dict.fromkeys(fetched) if not name.startswith("present.")]
        fetched.clear()
        return (names, *(ctypes.c_int64.from_address(inputs[f"num_{name}_to_keep"]).value for name in OUTPUTS))

    original_input, original_output = ort.IOBinding.bind_input, ort.IOBinding.bind_output
    monkeypatch.setattr(ort.IOBinding, "bind_input", bind_input)
    monkeypatch.setattr(ort.IOBinding, "bind_output", bind_output)
    session = open_session(llama.bundle("fused"))
    for _ in range(2):
        session.step(IDS[:40])
        assert asked() == (["logits"], 1, 1)
        session.hidden_states(IDS[40:80])
        assert asked() == (["hidden_states"], 1, 0)
        session.hidden_states(IDS[80:90], num_states=2)
        assert asked() == (["hidden_states"], 1, 2)
        session.step(IDS[90:97], num_logits=0)
        assert asked() == (["logits"], 0, 1)
    batch = Batch(open_session(llama.bundle("fused")).graph, 2)
    batch.extend(0, IDS[:40], 0)
    assert asked() == (["logits"], 0, 1)
    batch.decode(0, [5, 6], [True, True])
    assert asked() == (["logits"], 1, 1)


def test_steps_and_hidden_states_can_alternate(llama: Case) -> None:
    """All use one cache, which grows meanwhile."""
    wanted = llama.states(IDS)
    plain = open_session(llama.bundle("fused"))
    logits = np.concatenate([plain.step(IDS[start : start + 128], 0).copy() for start in range(0, 1024, 128)])
    for style in ("fused", "portable"):
        session = open_session(llama.bundle(style))
        for start in range(0, 1024, 256):
            found = session.hidden_states(IDS[start : start + 128])
            assert np.abs(found - wanted[start : start + 128]).max() < 1e-4
            found = session.step(IDS[start + 128 : start + 256], 0)
            assert np.abs(found - logits[start + 128 : start + 256]).max() < 1e-4


def test_the_graph_in_plain_onnxruntime(llama: Case) -> None:
    """Without the optional inputs all outputs are complete; hidden states do not depend on the number of logits."""
    graph = ort.InferenceSession(llama.bundle("portable") / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in graph.get_outputs()][-1] == "hidden_states"
    cache = {each.name: each for each in graph.get_inputs() if each.name.startswith("past")}
    feed = {name: np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32) for name, each in cache.items()}
    rows = np.array([IDS[:9], IDS[20:29]])
    feed |= {"input_ids": rows, "attention_mask": np.ones_like(rows)}
    wanted = np.stack([llama.states(row.tolist()) for row in rows])
    logits, states = graph.run(["logits", "hidden_states"], feed)
    assert (logits.shape, states.shape) == ((2, 9, 331), (2, 9, 64))
    assert np.abs(states - wanted).max() < 1e-4
    keep = {"num_logits_to_keep": np.array(1), "num_hidden_states_to_keep": np.array(3)}
    logits, states = graph.run(["logits", "hidden_states"], feed | keep)
    assert (logits.shape, states.shape) == ((2, 1, 331), (2, 3, 64))
    assert np.abs(states - wanted[:, -3:]).max() < 1e-4


# ---- the manifest, and errors


def test_an_export_validates_hidden_states_and_reports_it(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]], monkeypatch: Any
) -> None:
    tiny.shorten_texts(monkeypatch, 200)
    options = ("--hidden-states", "--precision", "fp32,int8")
    assert llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", *options)[0] == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    errors = {name: entry["parity"]["hidden_states"] for name, entry in manifest["precisions"].items()}
    assert 0 < errors["fp32"]["mean"] <= errors["fp32"]["max"] < 1e-5
    assert 1e-3 < errors["int8"]["mean"] <= errors["int8"]["max"] < 0.2
    assert "hidden_states" not in manifest["proof"]["rotated"]
    bundle = Bundle.open(tmp_path / "bundle")
    assert {name: info.hidden_size for name, info in bundle.precisions.items()} == {"fp32": 64, "int8": 64}


def test_wrong_hidden_states_make_no_bundle(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]], monkeypatch: Any
) -> None:
    tiny.shorten_texts(monkeypatch, 200)
    monkeypatch.setattr(graph_module, "add_hidden_states", lambda model, _scale: add_hidden_states(model, 1.01))
    arguments = ("--hidden-states", "--precision", "fp32", "--progress", "none")
    code, _, errors = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", *arguments)
    assert code == 1
    assert re.fullmatch(r"[^\n]*fp32: hidden states differ from PyTorch by up to 0\.01[^\n]*\n", errors)
    assert not (tmp_path / "bundle").exists()


def test_torchscript_does_not_support_hidden_states(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    options = ("--format", "torchscript", "--hidden-states", "--progress", "none")
    code, _, errors = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", *options)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--hidden-states applies to ONNX" in errors


def test_embed_requires_a_bundle_with_hidden_states(plain_bundle: Path) -> None:
    model = Model.load(plain_bundle, "int8", provider="cpu", threads=1)
    assert model.precision.hidden_size is None
    with pytest.raises(BundleError, match=r"^[^\n]*int8 has no hidden states[^\n]*llm-export --hidden-states$"):
        model.embed(TEXT)
    with pytest.raises(BundleError, match="llm-export --hidden-states"):
        open_session(plain_bundle).hidden_states(IDS[:5])


@pytest.mark.parametrize("pooling", ["max", "", "Mean", None, 3])
def test_unknown_poolings_are_rejected(pooling: Any, model: Model) -> None:
    with pytest.raises(ParameterError, match=r"^pooling is [^\n]*; use one of mean, last, none$"):
        model.embed(TEXT, pooling)


def test_empty_and_too_long_texts_are_rejected(model: Model) -> None:
    with pytest.raises(ParameterError, match="empty"):
        model.embed("")
    with pytest.raises(ParameterError, match="outside the vocabulary"):
        model.embed([5, 331])
    with pytest.raises(ContextLengthError) as refused:
        model.embed([5] * 1025)
    assert refused.value.prompt_tokens == 1025
    session = open_session(model.bundle.path)
    with pytest.raises(ParameterError, match=f"1 to {MAX_STEP_TOKENS} tokens"):
        session.hidden_states([])
    with pytest.raises(ParameterError, match="num_logits is 6"):
        session.hidden_states(IDS[:5], 6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_hidden_states_are_an_error(value: float, pooling: str) -> None:
    with pytest.raises(LogitsError, match=r"^[^\n]+$"), np.errstate(all="ignore"):
        pooled([1, 2], lambda part, _: np.full((len(part), 4), value, np.float32), pooling, normalize=True)


def test_a_zero_vector_cannot_be_normalized() -> None:
    assert not pooled([1, 2], lambda part, _: np.zeros((len(part), 4), np.float32), "mean", normalize=True).any()


@pytest.mark.parametrize("size", [0, -1, 65_537, 2**70, 64.0, "64", True, None, [64]])
def test_an_invalid_hidden_size_in_the_manifest_is_rejected(size: Any, llama: Case, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^[^\n]*hidden_size[^\n]*: export the bundle again$"):
        Bundle.open(changed_copy(llama.bundle("fused"), tmp_path, hidden_size=size))


def test_a_manifest_that_disagrees_with_the_graph_is_rejected(llama: Case, plain_bundle: Path, tmp_path: Path) -> None:
    for source, size in ((llama.bundle("fused"), 63), (plain_bundle, 64)):
        bundle = changed_copy(source, tmp_path / str(size), hidden_size=size)
        for load in (Model.load, Engine.load):
            with pytest.raises(
                BundleError, match=rf"^[^\n]*no hidden states of width {size}, [^\n]*: export the bundle again$"
            ):
                load(bundle, "fp32")


def test_hidden_states_of_torchscript_are_rejected(plain_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="which torchscript does not support"):
        Bundle.open(
            changed_copy(plain_bundle, tmp_path, hidden_size=64, format="torchscript", model="torchscript/model.pt")
        )


def open_session(path: Path) -> Session:
    """A session over a bundle's fp32 graph."""
    bundle = Bundle.open(path)
    info = bundle.precision("fp32")
    return open_file(
        bundle.file(info.model), bundle.shape, info.share_buffer, "cpu", 1, hidden_size=info.hidden_size, spinning=False
    )


def changed_copy(source: Path, folder: Path, **fields: Any) -> Path:
    """A copy of a bundle with changed fp32 entries in the manifest."""
    shutil.copytree(source, folder / "bundle")
    path = folder / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["precisions"]["fp32"] |= fields
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder / "bundle"
