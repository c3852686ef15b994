"""`llm-serve --config`: what a configuration file may contain, and the line that a wrong one gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import httpx2
import pytest
from calling import call
from project import ROOT
from serving import Served

from llm_edge.runtime import Model, SamplingParams
from llm_edge.server import cli
from llm_edge.server.config_file import read_config
from llm_edge.server.options import ServeOptions

Run = Callable[..., tuple[int, str, str]]
ORIGINAL = """
model:
  name: something
  dim: 64
tokenizer:
  vocab_size: 300
training:
  learning_rate: 1e-4
api:
  host: localhost
  port: 8123
  title: a service
generation:
  do_sample: true
  temperature: 0.7
  top_p: 0.9
  top_k: 50
  max_length: 150
  repetition_penalty: 1.1
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `llm-serve --print-config` with a configuration of this text."""
    path = tmp_path / "config.yaml"

    def run_with(text: str, *words: object) -> tuple[int, str, str]:
        path.write_text(text, encoding="utf-8")
        return call(cli.main, capsys, "llm-serve", "--config", path, "--print-config", *words)

    return run_with


def test_command_line_options_override_the_file(run: Run) -> None:
    text = "server: {port: 9000, queue: 3, host: 'localhost'}\ngeneration: {temperature: 0.5}\n"
    code, out, err = run(text, "--port", "9001", "--host", "127.0.0.1")  # the default, but given
    assert (code, err) == (0, "")
    assert "port: 9001" in out
    assert "queue: 3" in out
    assert "host: 127.0.0.1" in out
    assert "temperature: 0.5" in out


def test_the_printed_configuration_can_be_used_and_contains_no_key(run: Run, tmp_path: Path) -> None:
    text = "server: {api_key: canary-canary, allowed_host: [a.example, b.example], memory: 3, host: 0.0.0.0}\n"
    code, out, err = run(text)
    assert code == 0
    assert "canary" not in out + err
    assert run(out, "--api-key", "another-key")[:2] == (0, out)


def test_sections_of_other_programs_are_ignored_with_a_note(run: Run, tmp_path: Path) -> None:
    code, out, err = run(ORIGINAL)
    assert code == 0
    assert err.count("\n") == 1
    assert "ignored: model, tokenizer, training" in err
    assert "host: localhost" in out
    assert "port: 8123" in out
    found = read_config(tmp_path / "config.yaml").generation
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 150, "repetition_penalty": 1.1}
    assert found == wanted
    SamplingParams(**wanted)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("server: {prot: 1}", ["'prot'", "did you mean port?"]),
        ("server: {alowed_hosts: [a]}", ["'alowed_hosts'", "did you mean allowed_host?"]),
        ("servr: {port: 1}", ["'servr'", "did you mean server?"]),
        ("generation: {temprature: 1}", ["'temprature'", "did you mean temperature?"]),
        ("port: 80", ["port", "below server:"]),
        ("temperature: 1", ["temperature", "below generation:"]),
        ("server: {port: '8000'}", ["server.port is '8000'", "a whole number from 0 to 65535"]),
        ("server: {port: true}", ["server.port is True"]),
        ("server: {port: 65536}", ["server.port is 65536"]),
        ("server: {parallel: 1.5}", ["server.parallel is 1.5"]),
        ("server: {memory: .nan}", ["server.memory is nan"]),
        ("server: {memory: 99999999999999999999999999999999999999999}", ["server.memory is"]),
        ("server: {models: 5}", ["server.models is 5"]),
        ("server: {models: ''}", ["server.models is ''"]),
        ("server: {allowed_host: [1]}", ["server.allowed_host is [1]"]),
        ("server: {provider: gpu}", ["server.provider is 'gpu'", "cpu, cuda, auto"]),
        ("server: {api_key: short}", ["shorter than 8 characters"]),
        ("server: {api_key_file: /nowhere/keys}", ["/nowhere/keys"]),
        ("server: {host: 0.0.0.0}", ["0.0.0.0", "--api-key-file"]),
        ("server: [1]", ["server is [1]", "section"]),
        ("generation: {temperature: -1}", ["generation.temperature: -1"]),
        ("generation: {top_k: many}", ["generation.top_k"]),
        ("generation: {do_sample: 3}", ["generation.do_sample is 3"]),
        ("server: {port: 1, port: 2}", ["duplicate key"]),
        ("server: !!python/object:os.system {}", ["tag"]),
        ("a: [", ["not YAML"]),
        ("", ["no settings"]),
    ],
)
def test_a_wrong_file_gets_one_line_with_the_file_and_the_key(run: Run, text: str, parts: list[str]) -> None:
    code, out, err = run(text)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert "config.yaml" in err or "host" in text or "key" in text


def test_a_missing_file_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(cli.main, capsys, "llm-serve", "-c", "nowhere.yaml")
    assert (code, out, err) == (2, "", "error: nowhere.yaml: no such file\n")


def test_every_option_is_a_key_of_the_file_and_the_other_way_round(run: Run, tmp_path: Path) -> None:
    out = run("server: {port: 1}")[1]
    shown = {line.split(":")[0].strip() for line in out.splitlines()[1:]}
    assert shown <= {field.name for field in dataclasses.fields(ServeOptions)}
    for field in dataclasses.fields(ServeOptions):
        code, _, err = run(f"server: {{{field.name}: {{a: 1}}}}")
        assert code == 2
        assert f"server.{field.name} is" in err


def test_the_documentation_lists_every_key() -> None:
    rows = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").splitlines()
    hints = get_type_hints(ServeOptions, include_extras=True)
    for field in dataclasses.fields(ServeOptions):
        default = "" if field.default in (None, dataclasses.MISSING) else f"{field.default} "
        assert f"| `{field.name}` | {default}| {get_args(hints[field.name])[1].help} |" in rows


def test_generation_defaults_apply_where_a_request_gives_none(models_folder: Path) -> None:
    generation = {"temperature": 0.0, "max_tokens": 5}
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32", "generation": generation})
    try:
        asked = {"messages": [{"role": "user", "content": "Hello"}]}
        url = f"{server.url}/v1/chat/completions"
        first = httpx2.post(url, json=asked).json()
        model = Model.load(models_folder / "tiny", "fp32", threads=1)
        wanted = model.chat(asked["messages"], SamplingParams(temperature=0, max_tokens=5)).result()
        assert first["choices"][0]["message"]["content"] == wanted.text
        assert first["usage"]["completion_tokens"] == len(wanted.tokens) <= 5
        more = httpx2.post(url, json={**asked, "max_tokens": 9, "ignore_eos": True}).json()
        assert more["usage"]["completion_tokens"] == 9
    finally:
        server.stop()
