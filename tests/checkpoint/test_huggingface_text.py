"""Sampling, special tokens and chat templates of Hugging Face folders are those of transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from json_values import ODD, with_value
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlamaTokenizer

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.runtime import Model, SamplingParams
from llm_edge.runtime.errors import CheckpointError, LlmEdgeError, TemplateError
from llm_edge.runtime.text.tokenizer import Tokenizer

Export = Callable[..., tuple[int, str, str]]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
TOOL_USE = "TOOLS {{ tools | tojson }} " + tiny.CHAT_TEMPLATE
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_checkpoint(tmp_path / "folder", num_hidden_layers=1)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def change(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = read(path) | keys
    write(path, {key: value for key, value in content.items() if value is not None})


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), SourceOptions(), lambda _: None)


def runtime_tokenizer(checkpoint: Checkpoint, path: Path) -> Tokenizer:
    assets = checkpoint.tokenizer
    write(path / "tokenizer.json", assets.tokenizer_json)
    return Tokenizer.from_files(
        path / "tokenizer.json", assets.tokenizer_config, assets.chat_template, assets.named_templates
    )


# ---- sampling


@pytest.mark.parametrize(
    ("content", "params", "notes"),
    [
        ({"do_sample": True, "top_k": -1}, {}, []),
        ({"do_sample": True, "top_k": 50.0}, {"top_k": 50}, []),
        ({"max_new_tokens": 0}, {"temperature": 0}, ["generation_config.json: max_new_tokens: 0 is not allowed"]),
        (
            {"repetition_penalty": 1.8},
            {"temperature": 0, "repetition_penalty": 1.8, "repetition_window": -1},
            [],
        ),
        (
            {"suppress_tokens": [75, 46], "num_beams": 4, "penalty_alpha": 0.6},
            {"temperature": 0, "banned_tokens": (75, 46)},
            [
                "generation_config.json: ignored: num_beams: 4 is not supported",
                "generation_config.json: ignored: penalty_alpha: 0.6 is not supported",
            ],
        ),
    ],
    ids=str,
)
def test_an_exported_bundle_samples_as_its_generation_config(
    folder: Path,
    tmp_path: Path,
    llm_export: Export,
    content: dict[str, Any],
    params: dict[str, Any],
    notes: list[str],
) -> None:
    write(folder / "generation_config.json", {"eos_token_id": 2, **content})
    code, text, errors = llm_export(folder, "-o", tmp_path / "bundle", "--no-validate", "--precision", "fp32")
    assert code == 0, errors
    printed = [line.removeprefix("Note: ") for line in text.splitlines() if line.startswith("Note: ")]
    assert [line[: len(start)] for line, start in zip(printed, notes, strict=True)] == notes
    assert read(tmp_path / "bundle" / "manifest.json")["notes"] == printed
    model = Model.load(tmp_path / "bundle", "fp32", provider="cpu", threads=1)
    assert model.default_params == SamplingParams(**params)
    search = read(tmp_path / "bundle" / "genai_config.json")["search"]
    assert search["do_sample"] == content.get("do_sample", False)
    assert search["top_k"] == (params.get("top_k", 0) if content.get("do_sample") else 50)
    assert search["repetition_penalty"] == content.get("repetition_penalty", 1.0)


def test_without_a_generation_config_the_keys_of_the_config_count(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", do_sample=True, top_k=7, num_beams=2)
    found = read_folder(folder)
    assert (found.generation["do_sample"], found.generation["top_k"]) == (True, 7)
    assert found.notes == ("config.json: ignored: num_beams: 2 is not supported",)


# ---- chat templates


def as_list(folder: Path, templates: dict[str, str]) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    entries = [{"name": name, "template": text} for name, text in templates.items()]
    change(folder / "tokenizer_config.json", chat_template=entries)


def as_files(folder: Path, templates: dict[str, str]) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name, text in templates.items():
        path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        write(folder / path, text)


@pytest.mark.parametrize("store", [as_list, as_files])
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS}, {"tools": []}, {"tools": None}], ids=str)
def test_the_template_for_tools_is_taken_as_in_transformers(
    folder: Path, tmp_path: Path, store: Callable[[Path, dict[str, str]], None], variables: dict[str, Any]
) -> None:
    store(folder, {"default": tiny.CHAT_TEMPLATE, "tool_use": TOOL_USE, "rag": "{{ documents }}"})
    checkpoint = opened(folder)
    ours = runtime_tokenizer(checkpoint, tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False, **variables)
    assert ours.encode_chat(MESSAGES, **variables) == ours.encode(expected, parse_special=True)
    assert [note for note in checkpoint.notes if "rag" in note] != []


def test_without_a_default_template_only_conversations_with_tools_have_one(folder: Path, tmp_path: Path) -> None:
    as_list(folder, {"tool_use": TOOL_USE})
    ours = runtime_tokenizer(opened(folder), tmp_path)
    assert ours.encode_chat(MESSAGES, tools=TOOLS)
    with pytest.raises(TemplateError, match="no chat template without tools"):
        ours.encode_chat(MESSAGES)


def test_named_templates_reach_the_bundle(folder: Path, tmp_path: Path, llm_export: Export) -> None:
    as_files(folder, {"default": tiny.CHAT_TEMPLATE, "tool_use": TOOL_USE})
    bundle = tmp_path / "bundle"
    assert llm_export(folder, "-o", bundle, "--no-validate", "--precision", "fp32")[0] == 0
    assert "additional_chat_templates/tool_use.jinja" in read(bundle / "manifest.json")["files"]
    model = Model.load(bundle, "fp32", provider="cpu", threads=1)
    expected = AutoTokenizer.from_pretrained(bundle).apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False, tools=TOOLS
    )
    assert expected.startswith("TOOLS [{")
    tokens = model._prompts.encode_chat(MESSAGES, {"tools": TOOLS})
    assert tokens == model._prompts.tokenizer.encode(expected, parse_special=True)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ([{"name": "../x", "template": "a"}], r"name '\.\./x' is not letters"),
        ([{"name": "default"}], "chat_template is not a string"),
        (["default"], "not a list of named templates"),
        (5, "chat_template is not a string"),
        ([{"name": f"n{number}", "template": ""} for number in range(65)], "65 chat templates; the limit is 64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_templates_are_rejected_in_one_line(folder: Path, template: Any, reason: str) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)


# ---- special and added tokens

TEXT = "Hello <fim> and <extra> <|pad|>fox<|im_end|> dog"


def without_added(folder: Path, text: str) -> None:
    """Remove an added token from tokenizer.json, so that only other files name it."""
    content = read(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != text]
    write(folder / "tokenizer.json", content)


def listed(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **flags}


def in_added_tokens_decoder(folder: Path) -> None:
    decoder = {"320": listed("<fim>", special=True), "321": listed("<extra>", special=False)}
    change(folder / "tokenizer_config.json", added_tokens_decoder=decoder)


def in_added_tokens_json(folder: Path) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder=None)
    write(folder / "added_tokens.json", {"<extra>": 321, "<fim>": 320})
    write(folder / "special_tokens_map.json", {"additional_special_tokens": ["<fim>"], "eos_token": "<|im_end|>"})


def in_special_tokens_map(folder: Path) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder=None, eos_token=None, pad_token=None)
    without_added(folder, "<|im_end|>")  # still in the vocabulary
    write(folder / "special_tokens_map.json", {"eos_token": listed("<|im_end|>"), "pad_token": "<|im_end|>"})


@pytest.mark.parametrize("store", [in_added_tokens_decoder, in_added_tokens_json, in_special_tokens_map])
def test_added_tokens_of_every_file_are_those_of_transformers(
    folder: Path, tmp_path: Path, store: Callable[[Path], None]
) -> None:
    store(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    checkpoint = opened(folder)
    ours = Backend.from_str(checkpoint.tokenizer.tokenizer_json)
    ids = ours.encode(TEXT, add_special_tokens=False).ids
    assert ids == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    served = runtime_tokenizer(checkpoint, tmp_path)
    assert served.eos_token_id == theirs.eos_token_id


def test_a_complete_tokenizer_json_is_kept_as_it_is(folder: Path) -> None:
    assert read_folder(folder).tokenizer.tokenizer_json == (folder / "tokenizer.json").read_text(encoding="utf-8")


def test_named_tokens_outside_the_vocabulary_are_left_out(folder: Path, tmp_path: Path) -> None:
    change(folder / "tokenizer_config.json", pad_token="<nowhere>", bos_token="<begin>")
    found = read_folder(folder).tokenizer
    assert found.notes == (
        "bos_token: the token '<begin>' is not in the vocabulary: ignored",
        "pad_token: the token '<nowhere>' is not in the vocabulary: ignored",
    )
    assert "pad_token" not in found.tokenizer_config
    runtime_tokenizer(read_folder(folder), tmp_path)


@pytest.mark.parametrize("decoder", [{"x": {"content": "a"}}, {"320": {}}, {"320": "a"}, {"-1": {"content": "a"}}])
def test_damaged_added_tokens_are_rejected_in_one_line(folder: Path, decoder: Any) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    with pytest.raises(CheckpointError, match=r"the added token .* has no text or no valid id"):
        read_folder(folder)


# ---- other vocabularies


def test_vocab_and_merges_are_converted(folder: Path) -> None:
    content = read(folder / "tokenizer.json")
    expected = Backend.from_file(str(folder / "tokenizer.json"))
    write(folder / "vocab.json", content["model"]["vocab"])
    write(folder / "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in content["model"]["merges"]))
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    (folder / "tokenizer.json").unlink()
    found = Backend.from_str(read_folder(folder).tokenizer.tokenizer_json)
    for text in (tiny.TEXT, TEXT):
        assert found.encode(text, add_special_tokens=False).ids == expected.encode(text, add_special_tokens=False).ids


def test_a_sentencepiece_model_is_converted(folder: Path, tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXT.splitlines() * 40),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink()
    write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    expected = LlamaTokenizer.from_pretrained(folder)
    found = Backend.from_str(read_folder(folder).tokenizer.tokenizer_json)
    for text in ("The quick brown fox", "a  b\nc", "señor 你好"):
        assert found.encode(text, add_special_tokens=False).ids == expected.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(("names", "words"), [
    (("tokenizer.model",), "is not a SentencePiece model, or truncated: give the model's tokenizer.json"),
    (("tekken.json",), "not JSON"),
    (("vocab.json", "merges.txt"), "has no tokenizer.json, and transformers cannot convert vocab.json and merges.txt"),
])  # fmt: skip
def test_a_vocabulary_that_cannot_be_converted_gives_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], names: tuple[str, ...], words: str
) -> None:
    (folder / "tokenizer.json").unlink()
    for name in names:
        write(folder / name, "nonsense")
    with pytest.raises(CheckpointError) as e:
        read_folder(folder)
    assert words in str(e.value)
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_without_transformers_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    write(folder / "merges.txt", "#version: 0.2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"to convert vocab\.json and merges\.txt, pip install transformers"):
        read_folder(folder)


# ---- values of wrong types

FURTHER: dict[str, dict[str, Any]] = {
    "config.json": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "generation_config.json": {"bad_words_ids": [[1]], "suppress_tokens": [1], "eos_token_id": [1, 2]},
    "tokenizer_config.json": {
        "extra_special_tokens": ["<x>"],
        "added_tokens_decoder": {"5": {"content": "<x>"}},
        "chat_template": [{"name": "default", "template": "x"}],
    },
    "special_tokens_map.json": {"bos_token": {"content": "<x>"}, "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"<x>": 321},
}


@pytest.mark.parametrize("name", FURTHER)
def test_values_of_any_type_are_accepted_or_rejected_in_one_line(name: str, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / name
    original = (read(path) if path.exists() else {}) | FURTHER[name]
    for value in ODD:
        for content in with_value(original, value):
            write(path, json.dumps(content))
            message = ""
            try:
                open_checkpoint(str(folder), SourceOptions(), lambda _: None)
            except LlmEdgeError as error:
                message = str(error)
            assert "\n" not in message
