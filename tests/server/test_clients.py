"""Clients and frameworks that people use with OpenAI's API, and our terminal chat, against the server.

The official clients of OpenAI, Anthropic and Ollama are in test_openai.py, test_tools.py and test_other_protocols.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import openai
import platformdirs
import pydantic
import pytest
from calling import call
from project import ROOT
from serving import Served

from llm_edge.runtime import GenerationResult, Model, SamplingParams
from llm_edge.tui import cli as chat_cli

ASKED = "Hello"
JAVASCRIPT = Path(__file__).parent / "javascript"


class City(pydantic.BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    large: bool


@pytest.fixture(scope="module")
def expected(models_folder: Path) -> GenerationResult:
    """The greedy answer of the model itself, of at most 12 tokens."""
    model = Model.load(models_folder / "tiny", "fp32", threads=1)
    return model.chat([{"role": "user", "content": ASKED}], SamplingParams(temperature=0, max_tokens=12)).result()


@pytest.fixture
def langchain(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    langchain_openai = pytest.importorskip("langchain_openai")

    def create(**options: Any) -> Any:
        shared = {"base_url": f"{served.url}/v1", "api_key": "unused", "model": "tiny", "max_retries": 0}
        return langchain_openai.ChatOpenAI(**{**shared, "temperature": 0, "max_tokens": 12, **options})

    return create


def test_langchain_gets_the_models_text_whole_and_streamed(langchain: Any, expected: GenerationResult) -> None:
    whole = langchain().invoke(ASKED)
    assert whole.content == expected.text
    assert whole.usage_metadata["output_tokens"] == len(expected.tokens)
    parts = list(langchain(stream_usage=True).stream(ASKED))
    assert "".join(part.content for part in parts) == expected.text
    counts = [part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata]
    assert sum(counts) == len(expected.tokens)


def test_langchain_gets_tool_calls_and_structured_output(langchain: Any) -> None:
    bound = langchain(max_tokens=200).bind_tools([City], tool_choice="required", parallel_tool_calls=False)
    (called,) = bound.invoke(ASKED).tool_calls
    assert called["name"] == "City"
    City.model_validate(called["args"])
    merged = None
    for part in bound.stream(ASKED):
        merged = part if merged is None else merged + part
    assert merged.tool_calls[0]["args"] == called["args"]
    for method in ("json_schema", "function_calling"):
        assert isinstance(langchain(max_tokens=200).with_structured_output(City, method=method).invoke(ASKED), City)


def test_langchain_uses_the_responses_api(langchain: Any, expected: GenerationResult) -> None:
    answer = langchain(use_responses_api=True).invoke(ASKED)
    assert answer.content[0]["text"] == expected.text


def test_pydantic_ai_gets_text_streams_and_validated_output(served: Served, expected: GenerationResult) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
            model = OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=client))
            short = {"temperature": 0.0, "max_tokens": 12}
            agent = pydantic_ai.Agent(model, model_settings=short)
            whole = await agent.run(ASKED)
            assert whole.output == expected.text
            assert whole.usage.output_tokens == len(expected.tokens)
            async with agent.run_stream(ASKED) as stream:
                parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
            assert "".join(parts) == expected.text
            more = await agent.run("And then?", message_history=whole.all_messages())
            assert more.usage.input_tokens > whole.usage.input_tokens
            settings = {"temperature": 0.0, "max_tokens": 200, "parallel_tool_calls": False}
            typed = pydantic_ai.Agent(model, output_type=City, model_settings=settings)
            first = await typed.run(ASKED)
            assert isinstance(first.output, City)
            assert isinstance((await typed.run(ASKED, message_history=first.all_messages())).output, City)

    asyncio.run(ask())


def test_the_agent_in_the_documentation_runs(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("pydantic_ai")
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", (ROOT / "docs" / "serving.md").read_text("utf-8"), flags=re.MULTILINE)
    (block,) = [textwrap.dedent(block) for block in blocks if "output_type=Weather" in block]
    code = block.replace("http://127.0.0.1:8000", served.url).replace("smollm2-135m", "tiny")
    code = code.replace('"max_tokens": 100', '"max_tokens": 300, "seed": 1, "parallel_tool_calls": False')
    code = code.replace("city: str", "city: Literal['Paris', 'Rome']")  # a random model would not end the text
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"city='(Paris|Rome)' sky='(sunny|cloudy|rainy)'\n", done.stdout)


def test_llm_gets_the_models_text_whole_and_streamed(
    served: Served, expected: GenerationResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    pytest.importorskip("llm")
    from llm.default_plugins.openai_models import Chat

    model = Chat("local", key="unused", model_name="tiny", api_base=f"{served.url}/v1", supports_schema=True)
    options = {"temperature": 0, "max_tokens": 12}
    assert model.prompt(ASKED, stream=False, **options).text() == expected.text
    assert "".join(model.prompt(ASKED, stream=True, **options)) == expected.text
    answer = model.prompt(ASKED, schema=City, stream=False, temperature=0, max_tokens=200).text()
    City.model_validate_json(answer)
    conversation = model.conversation()
    for _ in range(2):
        assert conversation.prompt(ASKED, **options).text() is not None


def test_the_terminal_chat_answers_from_the_server(
    served: Served, expected: GenerationResult, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--endpoint", f"{served.url}/v1", "--model", "tiny", "--temperature", 0, "--max-tokens", 12)
    code, out, err = call(chat_cli.main, capsys, "llm-chat", *words, "--ask", ASKED, "--no-stdin")
    assert code == 0, err
    assert expected.text.strip() in out


@pytest.fixture(scope="module")
def node_folder() -> Path:
    """A folder outside of the tree with the npm packages and our script."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    lock = JAVASCRIPT / "package-lock.json"
    name = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    folder = platformdirs.user_cache_path("llm-edge") / "test-clients" / name
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(JAVASCRIPT / file, folder / file)
        npm = ("npm", "ci", "--ignore-scripts", "--no-fund", "--no-audit", "--fetch-retries=1")
        done = subprocess.run(npm, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            pytest.skip(f"npm cannot install the clients: {done.stderr.strip()[-200:]}")
        (folder / "complete").touch()
    shutil.copy(JAVASCRIPT / "clients.mjs", folder / "clients.mjs")
    return folder


def test_the_npm_clients_get_the_models_text_and_calls(
    served: Served, expected: GenerationResult, node_folder: Path
) -> None:
    command = ("node", "clients.mjs", f"{served.url}/v1", "tiny")
    done = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for key in ("openai", "openaiStream", "openaiResponse", "ai", "aiStream"):
        assert found[key] == expected.text, key
    assert found["openaiUsage"] == found["aiUsage"] == len(expected.tokens)
    assert found["aiFinish"] == found["aiStreamFinish"] in ("length", "stop")
    assert found["openaiCall"]["name"] == found["aiCall"]["toolName"] == "weather"
    arguments = (json.loads(found["openaiCall"]["arguments"]), found["aiCall"]["input"], found["aiStreamCall"]["input"])
    for each in arguments:
        assert each["city"] in ("Paris", "Rome")
