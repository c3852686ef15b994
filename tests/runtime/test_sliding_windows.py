"""Layers with sliding windows keep only what they can attend to, which changes no answer."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from general_models import save, shorten_validation

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime import GenerationResult, Model, SamplingParams
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.limits import CHUNK_ALIGNMENT
from llm_edge.runtime.backend.open import open_graph
from llm_edge.runtime.backend.window_history import WindowHistory
from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.scheduling.batch import Batch

WINDOW = 16
GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=24, logprobs=0)
LONG = replace(GREEDY, max_tokens=400)
SYSTEM = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module", params=["gemma3_text", "gpt_oss"])  # of our own decoder, and through transformers
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        shorten_validation(patch, 64)
        source = save(request.param, folder / "source", max_position_embeddings=4096)
        export(str(source), ExportOptions(folder / "bundle", precision="fp32"))
    return folder / "bundle"


@pytest.fixture(scope="module")
def unlimited(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same model, all of whose keys and values are kept."""
    copy = tmp_path_factory.mktemp("unlimited") / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    assert set(manifest["model"].pop("windows")) == {0, WINDOW}
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return Model.load(copy, provider="cpu", threads=1)


def answer(model: Model, prompt: Sequence[int], params: SamplingParams = GREEDY) -> GenerationResult:
    """An answer that nothing cached contributes to."""
    model.clear_cache()
    return model.generate(list(prompt), params).result()


def same(one: GenerationResult, other: GenerationResult) -> bool:
    return (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def test_a_long_answer_is_the_same_bit_for_bit(bundle: Path, unlimited: Model) -> None:
    model, prompt = Model.load(bundle, provider="cpu", threads=1), unlimited.encode_prompt(SYSTEM)
    model.speculative = unlimited.speculative = False
    assert same(answer(model, prompt, LONG), answer(unlimited, prompt, LONG))


def test_a_conversation_continues_and_returns_to_its_prompts(bundle: Path, unlimited: Model) -> None:
    model, prompt = Model.load(bundle, provider="cpu", threads=1), unlimited.encode_prompt(SYSTEM)
    first = answer(model, prompt, LONG)
    for turn, cached in (
        ([*prompt, *first.tokens, 5, 6, 7, 8, 9, 10, 11, 12], len(prompt) + len(first.tokens) - CHUNK_ALIGNMENT),
        ([*prompt, 9, 8, 7, 6, 5, 4, 3, 8, 9], len(prompt) - 2 * CHUNK_ALIGNMENT),
    ):
        found = model.generate(turn, GREEDY).result()
        assert found.timings.cached_tokens >= cached
        assert found.tokens == answer(unlimited, turn).tokens


def test_prompts_that_share_a_beginning_reuse_it_from_the_third_one_on(bundle: Path, unlimited: Model) -> None:
    model = Model.load(bundle, provider="cpu", threads=1)
    shared = unlimited.encode_prompt(SYSTEM)
    cached = []
    for number in range(4):
        prompt = [*shared, *range(20 + number, 260 + number)]
        found = model.generate(prompt, GREEDY).result()
        cached.append(found.timings.cached_tokens)
        assert found.tokens == answer(unlimited, prompt).tokens
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) >= len(shared) - 2 * CHUNK_ALIGNMENT


def test_eight_callers_get_what_each_gets_alone(bundle: Path, unlimited: Model) -> None:
    prompts = [
        unlimited.encode_prompt(SYSTEM[: 40 * (number % 4) ** 2] + f"Question {number}: what is this?")
        for number in range(8)
    ]
    params = replace(GREEDY, max_tokens=150)
    wanted = [answer(unlimited, prompt, params).tokens for prompt in prompts]
    found: dict[int, list[int]] = {}
    with Engine.load(bundle, threads=1, active=4, kept=4) as engine:

        def ask(number: int) -> None:
            for _ in range(2):  # the second time from the cache
                found[number] = list(engine.generate(prompts[number], params).result().tokens)
                assert found[number] == list(wanted[number])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found.get(number) for number in range(8)] == [list(tokens) for tokens in wanted]


def test_a_saved_cache_continues_in_another_process(bundle: Path, unlimited: Model, tmp_path: Path) -> None:
    prompt = unlimited.encode_prompt(SYSTEM)
    with Engine.load(bundle, threads=1) as engine:
        engine.generate(prompt, GREEDY).result()
        engine.save_cache(tmp_path / "cache", prompt)
    turn = [*prompt, 9, 8, 7, 6, 5, 4, 3, 8, 9]
    with Engine.load(bundle, threads=1) as engine:
        engine.load_cache(tmp_path / "cache")
        found = engine.generate(turn, GREEDY).result()
    assert found.timings.cached_tokens >= len(prompt) - 2 * CHUNK_ALIGNMENT
    assert found.tokens == answer(unlimited, turn).tokens


def test_slots_hold_only_the_window(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    graph = open_graph(GraphFile.of(opened, opened.precision("fp32")), ExecutionOptions("cpu", threads=1))
    batch = Batch(graph, 2)
    tokens = [3 + number % 300 for number in range(2048)]
    for start in range(0, len(tokens), 256):
        batch.extend(0, tokens[start : start + 256])
    held = batch.read(0, len(tokens))
    rows = 4096 // (graph.shape.caches[0].shape[1] * 4)  # of a page, which is freed as a whole
    for windowed, values in zip(graph.shape.windowed, held, strict=True):
        freed = len(tokens) - WINDOW - 64 - 64 - 2 * rows
        assert np.all(values[:, rows:freed] == 0) == windowed
        assert np.all(np.any(values[:, -WINDOW - 64 :] != 0, axis=-1))
    full = len(tokens) * batch.token_bytes
    assert 0.4 * full < batch.held_bytes([0]) < 0.6 * full  # half of the layers have windows
    assert batch.available(0, 1000) == 0
    assert batch.available(0, len(tokens) - 8) == len(tokens) - 8


def test_windows_in_the_manifest_must_fit(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for windows in ([16], [16, -1, 16, 0], ["16", 0, 16, 0], [True, 0, 16, 0], 16, [5000, 0, 0, 0]):
        manifest["model"]["windows"] = windows
        path.write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(BundleError, match="windows"):
            Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize("seed", range(5))
def test_what_is_available_is_not_freed(seed: int) -> None:
    chance, window = random.Random(seed), 40
    history, length, returned, freed = WindowHistory(window), 0, 0, set[int]()
    for _ in range(400):
        action = chance.random()
        if action < 0.7:
            length += chance.choice([1, 1, 1, 8, 200])
            freed.update(place for each in history.advance(length) for place in range(*each))
        elif action < 0.8:
            freed.update(place for each in history.keep(length) for place in range(*each))
            assert history.available(length) == length
        else:
            wanted = chance.randint(max(0, length - 300), length)
            found = history.available(wanted)
            assert found <= wanted
            if wanted >= max(length - 40, returned):
                assert found == wanted
            assert not freed & set(range(max(found - window + 1 - 2 * CHUNK_ALIGNMENT, 0), found))
            history.rewind(found)
            returned = found
            length, freed = found, {place for place in freed if place < found}
        assert freed == {place for each in history.freed for place in range(*each)}
        assert set(range(length)) - freed == {place for each in history.held(length) for place in range(*each)}
