from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.presets import DESCRIPTIONS, PRESET_PARAMETERS, PRESETS, apply_preset
from llm_edge.runtime.sampling.sampler import Sampler

BASE = SamplingParams(
    seed=7, max_tokens=33, stop=("END",), banned_tokens=(4,), repetition_penalty=1.2, top_k=3, dry_breakers=("x",)
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_values_and_keeps_all_others(name: str) -> None:
    found = apply_preset(name, BASE)
    for field in dataclasses.fields(SamplingParams):
        kept = getattr(BASE, field.name)
        wanted = PRESETS[name].get(field.name, field.default) if field.name in PRESET_PARAMETERS else kept
        assert getattr(found, field.name) == wanted


def test_the_last_preset_wins() -> None:
    for first in PRESETS:
        for second in PRESETS:
            assert apply_preset(second, apply_preset(first, BASE)) == apply_preset(second, BASE)
    assert len({apply_preset(name, BASE) for name in PRESETS}) == len(PRESETS)


def test_each_preset_has_a_one_line_description() -> None:
    assert list(DESCRIPTIONS) == list(PRESETS)
    assert all(text and "\n" not in text for text in DESCRIPTIONS.values())


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["mine"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        PRESETS["greedy"]["temperature"] = 1.0  # type: ignore[index]


def test_presets_are_ordered_by_randomness() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 2000).astype(np.float32)
    distinct = []
    for name in ("greedy", "precise", "balanced", "creative", "wild"):
        sampler = Sampler(apply_preset(name, SamplingParams(seed=1)), [])
        distinct.append(len({sampler.sample(logits) for _ in range(300)}))
    assert distinct[0] == 1
    assert distinct == sorted(distinct)


@pytest.mark.parametrize("name", ["", "Greedy", "warm"])
def test_an_unknown_preset_is_rejected_with_a_list_of_presets(name: str) -> None:
    with pytest.raises(ParameterError) as caught:
        apply_preset(name, BASE)
    known = "greedy, precise, balanced, creative, wild, steady"
    assert str(caught.value) == f"unknown preset {name!r}; available: {known}"
