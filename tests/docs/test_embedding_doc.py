"""docs/embedding.md, examples/ and the engine of the README: all Python runs, and answers end when clients leave."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import ROOT
from starlette.testclient import TestClient

from llm_edge.chat.endpoint.client import Endpoint, EndpointResponder
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime import PRESETS, Engine, SamplingParams

DOCUMENT = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
BUNDLE = "artifacts/smollm2-135m"
QUESTION = [{"role": "user", "content": "Hi"}]


def run_blocks(blocks: list[str], bundle: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks in one namespace; a failure names the line of the document."""
    for block in blocks:
        line = DOCUMENT[: DOCUMENT.index(block)].count("\n")
        code = compile("\n" * line + block.replace(BUNDLE, bundle.as_posix()), "docs/embedding.md", "exec")
        exec(code, names)
    return names


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def states_bundle(tiny_checkpoint: Path, tiny_bundle: Path) -> Path:
    """The guide's second bundle, with hidden states."""
    folder = tiny_bundle.with_name(f"{tiny_bundle.name}-states")
    export(str(tiny_checkpoint), ExportOptions(folder, precision="fp32", hidden_states=True, validate=False))
    return folder


@pytest.mark.usefixtures("states_bundle")
def test_the_guide_runs_from_top_to_bottom(tiny_bundle: Path, where: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == DOCUMENT.count("```") / 2  # every block is included
    names = run_blocks(BLOCKS, tiny_bundle, {"__name__": "guide"})
    shown = capsys.readouterr().out
    assert names["found"].finish_reason == "stop"
    assert set(json.loads(names["found"].text)) == {"city", "year"}
    assert len(names["result"].logprobs) == len(names["result"].tokens)
    assert names["vectors"].shape == (2, 64)
    assert names["saved"] > 64
    assert names["saved"] - 64 < names["answer"].timings.cached_tokens <= names["saved"]
    assert names["counters"].cached_tokens > 0
    assert re.search(r"^\d+ tokens are more than 1024$", shown, flags=re.MULTILINE)


def test_the_engine_of_the_readme_runs(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = re.search(r"### Embed it in a service\n\n.*\n\n((?:    .*\n|\n)+)", README)
    assert section is not None
    exec(compile(textwrap.dedent(section[1]).replace(BUNDLE, tiny_bundle.as_posix()), "README.md", "exec"), {})
    assert re.fullmatch(r"\['(yes|no)', '(yes|no)', '(yes|no)'\]\n", capsys.readouterr().out)


def test_statements_about_presets_and_options(tiny_bundle: Path) -> None:
    named = re.search(r"Presets are named combinations of parameters \((.*?)\)", DOCUMENT)
    assert named is not None
    assert re.findall(r"`(\w+)`", named[1]) == list(PRESETS)
    for call in re.findall(r"`Engine\.load\(…, (.*?)\)`", DOCUMENT):
        options: dict[str, Any] = eval(f"dict({call})")
        Engine.load(tiny_bundle, "fp32", **options).close()


# ---- the service


@pytest.fixture
def service(tiny_bundle: Path, where: Path) -> Iterator[dict[str, Any]]:
    """The guide up to its service."""
    until = next(number for number, block in enumerate(BLOCKS) if "FastAPI()" in block)
    names = run_blocks(BLOCKS[: until + 1], tiny_bundle, {"__name__": "guide"})
    yield names
    names["engine"].close()


def parse_events(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_the_service_streams(service: dict[str, Any]) -> None:
    with TestClient(service["app"]) as client:
        with client.stream("POST", "/chat", json={"messages": QUESTION, "max_tokens": 9}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            found = parse_events(list(response.iter_lines()))
        assert 1 <= len(found) <= 9
        assert [event["finish_reason"] is None for event in found] == [True] * (len(found) - 1) + [False]
        refused = client.post("/chat", json={"messages": [{"role": "user", "content": "word " * 2000}]})
        assert refused.status_code == 422
        assert "tokens, but the model's context holds 1024" in refused.json()["detail"]


@pytest.mark.parametrize("events_before", [0, 3])
def test_a_disconnected_client_cancels_its_answer(
    service: dict[str, Any], events_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ASGI server reports the disconnect immediately or after some events."""
    engine, batch = service["engine"], service["engine"]._batch
    engine.default_params = dataclasses.replace(engine.default_params, min_tokens=1000)  # does not end by itself, and
    decode, extend = batch.decode, batch.extend
    monkeypatch.setattr(batch, "decode", lambda *given: time.sleep(0.01) or decode(*given))  # not soon
    monkeypatch.setattr(batch, "extend", lambda *given: time.sleep(0.01) or extend(*given))
    body = json.dumps({"messages": QUESTION, "max_tokens": 100_000}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/chat",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def talk() -> int:
        sent = 0
        gone = asyncio.Event()
        asked = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in asked:
                return message
            if events_before:
                await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal sent
            sent += message["type"] == "http.response.body"
            if sent >= events_before:
                gone.set()
            await asyncio.sleep(0)  # as over a network

        await asyncio.wait_for(service["app"](scope, receive, send), 30)
        return sent

    assert asyncio.run(talk()) <= events_before + 5
    until = time.monotonic() + 10
    while engine.counters().active or engine.counters().cancelled < 1:
        assert time.monotonic() < until, engine.counters()
        time.sleep(0.01)


def test_no_cache_is_kept_without_space(tiny_bundle: Path) -> None:
    with Engine.load(tiny_bundle, "fp32", cache_bytes=0) as engine:
        prompt = list(range(10, 100))
        for _ in range(3):
            result = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=3)).result()
            assert result.timings.cached_tokens == 0


# ---- the examples


def example(name: str, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_examples_are_short() -> None:
    found = {path.name: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "examples").glob("*.py")}
    assert {"batch_file.py", "extract.py", "mcp_agent.py", "service.py"} <= set(found)
    assert max(found.values()) < 140
    others = ("serving.md", "finetuning.md")
    documents = DOCUMENT + "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in others)
    assert all(f"examples/{name}" in documents for name in found)


def test_the_batch_example(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = [f"{number} foxes jump" for number in range(80)]
    prompts[30] = "word " * 2000  # does not fit
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": prompt, "id": prompt[:2]}) for prompt in prompts))
    done = example("batch_file.py", source, target, "--bundle", tiny_bundle, "--max-tokens", 5)
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert all(answer["id"] == prompt[:2] for answer, prompt in zip(answers, prompts, strict=True))
    assert [number for number, answer in enumerate(answers) if "error" in answer] == [30]
    with Engine.load(tiny_bundle) as engine:
        for number in (0, 17, 79):
            own = engine.chat(
                [{"role": "user", "content": prompts[number]}], SamplingParams(temperature=0, max_tokens=5)
            ).result()
            assert (answers[number]["text"], answers[number]["finish_reason"]) == (own.text, own.finish_reason)

    source.write_text('{"prompt": "Hi"}\n["Hi"]\n')
    done = example("batch_file.py", source, target, "--bundle", tiny_bundle)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*prompts\.jsonl: each line has to be .*\n", done.stderr)


def test_the_extraction_example(tiny_bundle: Path, tmp_path: Path) -> None:
    done = example("extract.py", "--bundle", tiny_bundle, stdin="Ada Lovelace was born in London in 1815.")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)) == {"people", "places", "year"}

    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    done = example("extract.py", "--bundle", tiny_bundle, "--schema", schema, stdin="Is it so?")
    assert json.loads(done.stdout) in ("yes", "no")
    done = example("extract.py", "--bundle", tiny_bundle, "--max-tokens", 3, stdin="Is it so?")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cut off after 3 tokens")


def test_the_service_example_works_with_the_openai_client_and_the_chat(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="of the dev extra")
    openai = pytest.importorskip("openai", reason="of the tui extra")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples/service.py"), "--bundle", str(tiny_bundle), "--port", str(port)]
    url, name = f"http://127.0.0.1:{port}/v1", tiny_bundle.name
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            client = openai.OpenAI(base_url=url, api_key="-", max_retries=0)
            until = time.monotonic() + 60
            while True:
                try:
                    (model,) = client.models.list().data
                    break
                except openai.APIConnectionError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < until, log.read_text()
                    time.sleep(0.1)
            assert model.id == name
            asked = {"model": name, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
            whole = client.chat.completions.create(**asked)
            chunks = list(client.chat.completions.create(**asked, stream=True))
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert whole.choices[0].message.content == streamed
            assert whole.choices[0].finish_reason in ("length", "stop")
            assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens > 0
            with pytest.raises(openai.BadRequestError, match="Error code: 400") as refused:
                client.chat.completions.create(**{**asked, "temperature": 900})
            assert "temperature" in str(refused.value.body)

            responder = EndpointResponder(Endpoint(url, name))
            params = dataclasses.replace(responder.default_params, max_tokens=8, temperature=0.0)
            assert "".join(chunk.text for chunk in responder.answer(QUESTION, params)) == streamed
            responder.close()
            client.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
    assert log.read_text() == ""
