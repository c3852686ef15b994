"""generation_config.json means the same as in transformers, or is named as ignored."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessorList

from llm_edge.runtime.sampling.generation_config import (
    COMBINED,
    IGNORED,
    IRRELEVANT,
    SUPPORTED,
    TOKEN_IDS,
    read_generation_config,
)
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler

VOCAB = 300
EOS = [2, 7]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def processors(model: Any, content: dict[str, Any], prompt: list[int]) -> LogitsProcessorList:
    """What transformers' generate applies to the logits for a generation_config.json of this content."""
    config = GenerationConfig.from_dict(json.loads(json.dumps({**content, "eos_token_id": EOS})))
    config.update(**config._get_default_generation_params(), defaults_only=True)
    model._prepare_special_tokens(config, device=torch.device("cpu"))
    chosen: LogitsProcessorList = model._get_logits_processor(config, input_ids_seq_length=len(prompt))
    return chosen


def ours(content: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**read_generation_config(content, EOS).params)


CONTENTS: list[dict[str, Any]] = [
    {},
    {"do_sample": False},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 20, "top_p": 0.8003},
    {"do_sample": True, "top_p": 0.9003, "min_p": 0.02},
    {"do_sample": True, "typical_p": 0.6003},
    {"do_sample": True, "top_k": 0, "epsilon_cutoff": 4e-3},
    {"do_sample": True, "top_k": 0, "eta_cutoff": 6e-3, "temperature": 1.5},
    {"do_sample": True, "top_k": 0, "eta_cutoff": 0.3, "temperature": 0.2},
    {"do_sample": True, "epsilon_cutoff": 1.0, "eta_cutoff": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "do_sample": True},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [5, 2, 100]},
    {"begin_suppress_tokens": [9, 10, 11]},
    {"suppress_tokens": [5], "begin_suppress_tokens": [9], "do_sample": True, "top_k": 3},
    {"bad_words_ids": [[12], [2], [13]]},
    {"bad_words_ids": [[12]], "suppress_tokens": [14]},
    {"sequence_bias": [[[20], 7.5], [[21], -9.0]]},
    {"min_new_tokens": 3},
    {"min_new_tokens": 3, "do_sample": True, "repetition_penalty": 1.2, "temperature": 0.3, "top_k": 12},
    {"temperature": 0.6, "top_p": 0.9},  # without do_sample
]


@pytest.mark.parametrize("content", CONTENTS, ids=str)
def test_logits_are_processed_as_in_transformers(model: Any, content: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    for length in (1, 5, 150):
        prompt = random.integers(0, VOCAB, length).tolist()
        chosen = processors(model, content, prompt)
        for generated in ([], [4], [4, 2, 4, 8, 4]):
            logits = random.normal(0, 3, VOCAB).astype(np.float32)
            tokens = torch.tensor([[*prompt, *generated]])
            expected = chosen(tokens, torch.from_numpy(logits.copy())[None])[0].numpy()
            sampler = Sampler(ours(content), prompt, end_tokens=EOS, generated=generated)
            ids, row = sampler.candidates(logits)
            if not content.get("do_sample"):
                assert ids is not None
                assert ids.tolist() == [int(expected.argmax())]
                continue
            ids = np.arange(VOCAB) if ids is None else ids
            finite = np.isfinite(row)
            assert ids[finite].tolist() == np.flatnonzero(np.isfinite(expected)).tolist()
            assert row[finite] == pytest.approx(expected[np.isfinite(expected)], rel=1e-5)


@pytest.mark.parametrize("content", [c for c in CONTENTS if not c.get("do_sample")], ids=str)
def test_greedy_answers_are_those_of_transformers(model: Any, content: dict[str, Any]) -> None:
    prompt = np.random.default_rng(2).integers(8, VOCAB, 150).tolist()
    config = GenerationConfig.from_dict({**content, "max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": 0})
    model.generation_config = config
    expected = model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
    sampler = Sampler(ours(content), prompt, end_tokens=EOS)
    with torch.no_grad():
        for _ in expected:
            tokens = torch.tensor([[*sampler.tokens]])
            sampler.sample(model(tokens).logits[0, -1].numpy())
    assert list(sampler.generated) == expected


def test_the_entries_kept_for_the_bundle_mean_the_same_to_transformers(model: Any) -> None:
    for content in CONTENTS:
        entries = dict(read_generation_config(content, EOS).entries)
        prompt = list(range(30, 60))
        row = torch.from_numpy(np.random.default_rng(3).normal(0, 3, VOCAB).astype(np.float32))[None]
        tokens = torch.tensor([prompt])
        theirs, kept = (processors(model, each, prompt)(tokens, row.clone()) for each in (content, entries))
        assert torch.equal(theirs, kept)
        assert read_generation_config(entries, EOS).params == read_generation_config(content, EOS).params


def test_every_key_of_transformers_is_honoured_named_or_irrelevant() -> None:
    keys = set(GenerationConfig().__dict__) - {"_original_object_hash"}
    known = {*SUPPORTED, *COMBINED, *TOKEN_IDS, *IGNORED, *IRRELEVANT}
    assert keys - known == set()
    assert len(known) == sum(map(len, (SUPPORTED, COMBINED, TOKEN_IDS, IGNORED, IRRELEVANT)))


def test_defaults_of_transformers_are_nothing_to_mention() -> None:
    content = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    found = read_generation_config(content)
    assert (found.invalid, found.ignored) == ((), ())
    assert found.params == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("content", "params"),
    [
        ({"top_k": -1}, {}),
        ({"top_k": -5}, {}),
        ({"top_k": 0.0}, {}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"temperature": 1}, {"top_k": 50}),
        ({"temperature": 0}, {"top_k": 50, "temperature": 0.0}),
        ({"max_new_tokens": 5.0}, {"top_k": 50, "max_tokens": 5}),
        ({"stop_strings": "END"}, {"top_k": 50, "stop": ("END",)}),
        ({"stop_strings": ["a", "b"]}, {"top_k": 50, "stop": ("a", "b")}),
        (
            {"repetition_penalty": 1.2, "repetition_window": 9},
            {"top_k": 50, "repetition_penalty": 1.2, "repetition_window": 9},
        ),
        ({"max_length": 100, "max_new_tokens": 7}, {"top_k": 50, "max_tokens": 7}),
        ({"max_length": 4096}, {"top_k": 50}),
    ],
    ids=str,
)
def test_values_are_taken_in_every_usual_spelling(content: dict[str, Any], params: dict[str, Any]) -> None:
    found = read_generation_config({"do_sample": True, **content}, context=2048)
    assert (found.params, found.invalid, found.ignored) == (params, (), ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "many"),
        ("top_k", 2.5),
        ("top_k", "50"),
        ("top_k", True),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 1e400),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", 1000),
        ("min_new_tokens", -3),
        ("suppress_tokens", [-1]),
        ("suppress_tokens", 3),
        ("begin_suppress_tokens", ["a"]),
        ("stop_strings", [""]),
        ("bad_words_ids", [1, 2]),
        ("bad_words_ids", [[]]),
        ("sequence_bias", {"(1,)": 2.0}),
        ("sequence_bias", [[[1], float("nan")]]),
        ("do_sample", "yes"),
    ],
)
def test_unusable_values_are_named_and_left_out(key: str, value: Any) -> None:
    found = read_generation_config({"do_sample": True, "seed": None, key: value})
    (reason,) = found.invalid
    assert reason.startswith(f"{key}: ")
    assert "\n" not in reason
    assert key not in found.entries
    SamplingParams(**found.params)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_beams", 4, "4 is not supported"),
        ("penalty_alpha", 0.6, "0.6 is not supported"),
        ("forced_eos_token_id", 2, "2 is not supported"),
        ("exponential_decay_length_penalty", [15, 1.6], "is not supported"),
        ("guidance_scale", 1.5, "1.5 is not supported"),
        ("min_length", 10, "10 is not supported"),
        ("max_length", 100, "100; max_tokens limits the length of an answer"),
        ("bad_words_ids", [[3, 4], [5]], "1 of 2 entries have several tokens"),
        ("sequence_bias", [[[3, 4], 1.0], [[5], -1e9]], "2 of 2 entries have several tokens or exceed 100"),
        ("chat_format", "chatml\n", r"'chat_format'"),
        ("temperature", 0.7, "without do_sample the most likely token is always taken"),
    ],
)
def test_unsupported_entries_are_named(key: str, value: Any, reason: str) -> None:
    (ignored,) = read_generation_config({key: value}, context=2048).ignored
    assert key in ignored
    assert reason in ignored
    assert "\n" not in ignored
