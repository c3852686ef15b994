"""Endpoints with the real `openai` client: requests, streamed answers, and misbehaving servers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import Server, chunk, event, text_events

from llm_edge.chat.endpoint import client as endpoints
from llm_edge.chat.endpoint import key as endpoint_key
from llm_edge.chat.endpoint.client import Endpoint, EndpointResponder, base_url, list_models, warning
from llm_edge.chat.figures import figures_line
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.history.store import Store
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.session import ChatSession
from llm_edge.chat.settings import Settings
from llm_edge.chat.stream_reader import StreamReader
from llm_edge.runtime import Constraint, FinishReason, GenerationChunk, SamplingParams
from llm_edge.runtime.errors import InputError, LlmEdgeError, MachineError, ParameterError

CANARY = "sk-canary-7f3e1b"
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def open_endpoint(server: Server) -> Iterator[Callable[..., EndpointResponder]]:
    responders: list[EndpointResponder] = []

    def make(model: str = "small", key: str = "", url: str = "", **options: Any) -> EndpointResponder:
        responders.append(EndpointResponder(Endpoint(url or server.url, model, key), **options))
        return responders[-1]

    yield make
    for each in responders:
        each.close()


def chunks(responder: EndpointResponder, params: SamplingParams | None = None, **more: Any) -> list[GenerationChunk]:
    return list(responder.answer(QUESTION, params or responder.default_params, **more))


def text(found: list[GenerationChunk]) -> str:
    return "".join(each.text for each in found if not each.reasoning)


def one_line(caught: pytest.ExceptionInfo[LlmEdgeError]) -> str:
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    assert CANARY not in message
    return message


def test_an_answer_streams_with_its_usage(server: Server, open_endpoint: Callable[..., EndpointResponder]) -> None:
    responder = open_endpoint()
    server.events = lambda: text_events("Hel", "lo ", "there", prompt_tokens=11, completion_tokens=4)
    found = chunks(responder)
    assert [each.text for each in found] == ["Hel", "lo ", "there", ""]
    assert found[-1].finish_reason is FinishReason.STOP
    assert found[-1].timings is not None
    assert (found[-1].timings.prompt_tokens, found[-1].timings.completion_tokens) == (11, 4)
    assert responder.name == "small"
    assert responder.detail == server.url.removeprefix("http://").removesuffix("/v1")
    assert responder.context_length == 4096
    assert [responder.token_text(each.token or 0) for each in found[:3]] == ["Hel", "lo ", "there"]


def test_without_usage_the_chunks_are_counted(server: Server, open_endpoint: Callable[..., EndpointResponder]) -> None:
    server.events = lambda: text_events("a", "b", "c", finish="length")
    found = chunks(open_endpoint())
    assert found[-1].finish_reason is FinishReason.LENGTH
    assert found[-1].timings is not None
    assert found[-1].timings.completion_tokens == 3


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_fields_are_separated(
    server: Server, open_endpoint: Callable[..., EndpointResponder], name: str
) -> None:
    def events() -> Iterator[bytes]:
        yield chunk(role="assistant", content=None)
        yield chunk(**{name: "I think"})
        yield from text_events("So.")

    server.events = events
    found = chunks(open_endpoint())
    assert "".join(each.text for each in found if each.reasoning) == "I think"
    assert text(found) == "So."
    assert found[-1].timings is not None
    assert found[-1].timings.reasoning_tokens == 1


@pytest.mark.parametrize(
    ("said_so", "reasoning", "answer"),
    [
        (["<think>\nI think", ".\n</think>\n\nSo."], "I think.", "So."),
        ([*"\n<think>a < b\n\n c</think>\n\nx </think> y"], "a < b\n\n c", "x </think> y"),
        (["<think></think>So."], "", "So."),
        (["<think>I am cut \n</thi"], "I am cut \n</thi", ""),
        (["The tag <think> begins", " what </think> ends."], "", "The tag <think> begins what </think> ends."),
        (["  \n", " two"], "", "  \n two"),
        (["<thi"], "", "<thi"),
        (["<thinking>"], "", "<thinking>"),
    ],
)
def test_reasoning_tags_in_the_text_are_separated(
    server: Server, open_endpoint: Callable[..., EndpointResponder], said_so: list[str], reasoning: str, answer: str
) -> None:
    server.events = lambda: text_events(*said_so)
    found = chunks(open_endpoint())
    assert "".join(each.text for each in found if each.reasoning) == reasoning
    assert text(found) == answer
    assert sum(each.token is not None for each in found) == len(said_so)


def test_a_continued_answer_has_no_further_reasoning(
    server: Server, open_endpoint: Callable[..., EndpointResponder]
) -> None:
    server.events = lambda: text_events("<think>", " opens it.")
    assert text(chunks(open_endpoint(), assistant_prefix="The tag")) == "<think> opens it."


def test_parameters_are_sent_with_their_api_names(
    server: Server, open_endpoint: Callable[..., EndpointResponder]
) -> None:
    params = SamplingParams(
        temperature=0.3, top_p=0.8, top_k=7, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.5, seed=3, max_tokens=9, stop=("END",), logit_bias=((5, 1.0),), dry_multiplier=0.8,
        repetition_window=32, mirostat_tau=5.0, dry_breakers=("x",),
        constraint=Constraint.json_schema({"type": "object"}),
    )  # fmt: skip
    chunks(open_endpoint(), params)
    asked = server.requests[0]
    expected = {
        "model": "small", "temperature": 0.3, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 3, "max_tokens": 9, "stop": ["END"], "stream": True,
        "logit_bias": {"5": 1.0}, "dry_multiplier": 0.8, "repetition_window": 32, "mirostat_tau": 5.0, "mirostat": 2,
        "repeat_penalty": 1.2, "repeat_last_n": 32, "dry_breakers": ["x"], "dry_sequence_breakers": ["x"],
    }  # fmt: skip
    assert expected.items() <= asked.items()
    assert asked["messages"] == QUESTION
    assert asked["response_format"]["type"] == "json_schema"
    assert asked["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_parameters_that_are_off_are_not_sent(server: Server, open_endpoint: Callable[..., EndpointResponder]) -> None:
    responder = open_endpoint()
    chunks(responder)
    assert set(server.requests[0]) == {
        "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens"
    }  # fmt: skip
    chunks(responder, SamplingParams(constraint=Constraint.json()))
    assert server.requests[1]["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(reasoning_budget=5),
        SamplingParams(no_repeat_ngram=3),
        SamplingParams(epsilon_cutoff=0.01),
        SamplingParams(constraint=Constraint.regex("a")),
    ],
)
def test_unsupported_parameters_are_rejected(
    server: Server, open_endpoint: Callable[..., EndpointResponder], params: SamplingParams
) -> None:
    with pytest.raises(ParameterError, match="endpoints") as caught:
        open_endpoint().answer(QUESTION, params)
    one_line(caught)
    assert server.requests == []


def test_logprobs_name_each_token(server: Server, open_endpoint: Callable[..., EndpointResponder]) -> None:
    def entry(token: str, logprob: float, *others: tuple[str, float]) -> dict[str, Any]:
        top = [{"token": name, "logprob": value} for name, value in ((token, logprob), *others)]
        return {"token": token, "logprob": logprob, "top_logprobs": top}

    def events() -> Iterator[bytes]:
        yield chunk(
            content="Hello there", logprobs={"content": [entry("Hello", -0.1, ("Hi", -2.5)), entry(" there", -1)]}
        )
        yield chunk("stop", logprobs={"content": [{"token": 5, "logprob": "much"}]})

    server.events = events
    responder = open_endpoint()
    found = chunks(responder, SamplingParams(logprobs=2))
    assert server.requests[0]["logprobs"] is True
    assert server.requests[0]["top_logprobs"] == 2
    assert [each.text for each in found] == ["Hello", " there", ""]
    first = found[0].logprob
    assert first is not None
    assert first.logprob == -0.1
    assert [(responder.token_text(token), value) for token, value in first.top] == [("Hello", -0.1), ("Hi", -2.5)]


@pytest.mark.parametrize(
    ("field", "complaint"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        ("stream_options", "stream_options: extra fields not permitted"),
        ("top_p", "temperature and top_p cannot both be specified"),
    ],
)
def test_a_field_rejected_by_name_is_dropped_or_renamed(
    server: Server, open_endpoint: Callable[..., EndpointResponder], field: str, complaint: str
) -> None:
    server.refuse = lambda asked: (400, {"message": complaint}) if field in asked else None
    responder = open_endpoint()
    params = SamplingParams(temperature=0.5, max_tokens=77)
    assert text(chunks(responder, params)) == "Hello there"
    assert text(chunks(responder, params)) == "Hello there"
    assert [field in asked for asked in server.requests] == [True, False, False]  # and this is remembered
    assert server.requests[-1].get("max_completion_tokens", server.requests[-1].get("max_tokens")) == 77


def test_a_value_set_by_the_user_is_not_dropped_silently(
    server: Server, open_endpoint: Callable[..., EndpointResponder]
) -> None:
    server.refuse = lambda asked: (400, {"message": "temperature does not support 0.5"})
    with pytest.raises(InputError, match=r"400.*temperature does not support 0\.5") as caught:
        chunks(open_endpoint(), SamplingParams(temperature=0.5))
    one_line(caught)
    assert len(server.requests) == 1


# ---- keys


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CANARY_API_KEY", CANARY)
    return "env:CANARY_API_KEY"


def test_a_key_is_sent_but_nothing_else_that_identifies_the_user(
    server: Server, open_endpoint: Callable[..., EndpointResponder], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Token: secret")
    server.key = CANARY
    chunks(open_endpoint(key=key))
    assert {each["authorization"] for each in server.headers} == {f"Bearer {CANARY}"}
    server.key, server.headers = "", []
    chunks(open_endpoint())
    assert all("authorization" not in each for each in server.headers)
    everything = json.dumps([server.headers, server.requests])
    assert "secret" not in everything
    assert "another" not in everything


def test_a_rejected_key_is_not_in_the_error_message(server: Server, key: str) -> None:
    server.key = "another"
    with pytest.raises(InputError, match="rejects the API key") as caught:
        EndpointResponder(Endpoint(server.url, "small", key))
    assert "[the key]" in one_line(caught)
    with pytest.raises(InputError, match="requires an API key") as caught:
        EndpointResponder(Endpoint(server.url, "small"))
    one_line(caught)


def test_keys_are_not_saved_in_settings(server: Server, key: str, tmp_path: Any) -> None:
    settings = Settings(tmp_path)
    endpoints.used(settings, Endpoint(server.url, "small", key))
    endpoints.used(settings, Endpoint(server.url, "large", key))
    endpoints.used(settings, Endpoint(server.url, "small", key))
    assert [each.model for each in endpoints.endpoints(Settings(tmp_path))] == ["small", "large"]
    assert CANARY not in (tmp_path / "settings.json").read_text()


@pytest.mark.parametrize("value", ["", " ", "two words", "bröken", "a\nb", "x" * 9000])
def test_an_invalid_key_is_rejected_without_showing_it(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CANARY_API_KEY", value)
    with pytest.raises(InputError) as caught:
        endpoint_key.read("env:CANARY_API_KEY", "http://x/v1")
    message = one_line(caught)
    assert not value.strip() or value not in message


class Ring:
    """A keyring in memory."""

    priority = 1

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, name: str) -> str | None:
        return self.kept.get((service, name))

    def set_password(self, service: str, name: str, password: str) -> None:
        self.kept[service, name] = password

    def delete_password(self, service: str, name: str) -> None:
        import keyring.errors

        if self.kept.pop((service, name), None) is None:
            raise keyring.errors.PasswordDeleteError


def test_the_keyring_holds_keys_by_url(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    ring = Ring()
    monkeypatch.setattr("keyring.get_keyring", lambda: ring)
    endpoint_key.store(server.url, f" {CANARY}\n")
    assert ring.kept == {("llm-edge", server.url): CANARY}
    server.key = CANARY
    assert list_models(server.url, "keyring") == ["large", "small"]
    with pytest.raises(InputError, match="has no key"):
        endpoint_key.read("keyring", "http://elsewhere/v1")
    endpoint_key.delete(server.url)
    endpoint_key.delete(server.url)
    assert ring.kept == {}


def test_missing_and_plaintext_keyrings_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    import keyring.backends.fail

    class PlaintextKeyring(Ring):
        pass

    for ring, why in ((keyring.backends.fail.Keyring(), "no keyring"), (PlaintextKeyring(), "unencrypted")):
        monkeypatch.setattr("keyring.get_keyring", lambda ring=ring: ring)
        with pytest.raises(InputError, match=why) as caught:
            endpoint_key.store("http://x/v1", CANARY)
        assert "environment variable" in one_line(caught)


# ---- errors


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (401, InputError, "requires an API key"),
        (404, InputError, "no such path or model"),
        (429, InputError, "rate limit or quota"),
        (400, InputError, "rejects the request"),
        (302, InputError, "redirects"),
        (500, MachineError, "failed"),
    ],
)
def test_server_errors_are_one_clear_line(
    server: Server,
    open_endpoint: Callable[..., EndpointResponder],
    status: int,
    kind: type[LlmEdgeError],
    expected: str,
) -> None:
    responder = open_endpoint()
    server.refuse = lambda _asked: (status, {"message": "the\nserver's \x1b[31mown\x07 words" + "!" * 9000})
    with pytest.raises(kind, match=expected) as caught:
        chunks(responder)
    message = one_line(caught)
    assert "\x1b" not in message
    assert len(message) < 600
    assert status == 302 or "server's" in message


def test_an_unreachable_server_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(InputError, match="refused the connection") as caught:
        EndpointResponder(Endpoint(f"http://127.0.0.1:{port}/v1", "small"))
    one_line(caught)


def test_a_silent_server_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(MachineError, match="timed out") as caught:
            EndpointResponder(Endpoint(url, "small"), patience=0.2)
    one_line(caught)


def test_an_unlisted_model_and_a_missing_model_list(
    server: Server, open_endpoint: Callable[..., EndpointResponder]
) -> None:
    with pytest.raises(InputError, match="no model 'huge'; it lists large, small"):
        open_endpoint("huge")
    for models in (None, [], {"data": "no"}, {"data": [{"id": 5}, "x"]}):
        server.models = models
        assert text(chunks(open_endpoint("huge"))) == "Hello there"
        assert list_models(server.url, "") == []


def malformed() -> dict[str, Callable[[], Iterator[bytes]]]:
    deep = b'{"a":' * 20_000
    return {
        "invalid JSON": lambda: iter([b"data: {\n\n"]),
        "no UTF-8": lambda: iter([b"data: \xff\xfe\n\n"]),
        "deep JSON": lambda: iter([b"data: " + deep + b"\n\n"]),
        "an array": lambda: iter([b"data: [1, 2]\n\n"]),
        "a number": lambda: iter([b"data: 5\n\n"]),
        "choices no list": lambda: iter([event({"choices": 5})]),
        "delta no object": lambda: iter([event({"choices": [{"delta": "x", "finish_reason": 7}]})]),
        "content no text": lambda: iter([event({"choices": [{"delta": {"content": {"a": 1}}}]})]),
        "HTML": lambda: iter([b"<html><body>It works!</body></html>\n\n"]),
        "nothing": lambda: iter([]),
        "an end before the end": lambda: iter([chunk(content="Hel")]),
        "an error": lambda: iter([chunk(content="Hel"), event({"error": {"message": "out of memory"}})]),
        "one line without an end": lambda: (b"data: " + b"x" * 65536 for _ in range(10_000)),
        "a filter": lambda: iter([chunk("content_filter")]),
    }


@pytest.mark.parametrize("name", malformed())
def test_malformed_responses_are_one_clear_line(
    server: Server, open_endpoint: Callable[..., EndpointResponder], name: str
) -> None:
    responder = open_endpoint(patience=5.0)
    server.events = malformed()[name]
    with pytest.raises((InputError, MachineError)) as caught:
        chunks(responder)
    one_line(caught)
    server.events = lambda: text_events("fine")
    assert text(chunks(responder)) == "fine"


def test_an_endless_stream_is_stopped(server: Server, open_endpoint: Callable[..., EndpointResponder]) -> None:
    def events() -> Iterator[bytes]:
        while True:
            yield chunk(content="x ")

    server.events = events
    found = chunks(open_endpoint(), SamplingParams(max_tokens=10))
    assert found[-1].finish_reason is FinishReason.LENGTH
    assert len(found) < 150
    assert server.gone.wait(10)


def test_keep_alive_messages_alone_time_out(server: Server, open_endpoint: Callable[..., EndpointResponder]) -> None:
    def events() -> Iterator[bytes]:
        while not server.gone.wait(0.02):
            yield b": still here\n\n"

    server.events = events
    with pytest.raises(MachineError, match="sent nothing") as caught:
        chunks(open_endpoint(patience=0.4))
    one_line(caught)


def test_a_finished_answer_does_not_wait_for_the_connection(
    server: Server, open_endpoint: Callable[..., EndpointResponder]
) -> None:
    leave = threading.Event()

    def events() -> Iterator[bytes]:
        yield chunk("stop", content="done")
        leave.wait(20)

    server.events = events
    began = time.monotonic()
    assert text(chunks(open_endpoint())) == "done"
    leave.set()
    assert time.monotonic() - began < 10


# ---- cancelling


@pytest.mark.parametrize("after", [0, 2])
def test_cancel_takes_effect_immediately_and_closes_the_connection(
    server: Server, open_endpoint: Callable[..., EndpointResponder], after: int
) -> None:
    reached, leave = threading.Event(), threading.Event()

    def events() -> Iterator[bytes]:
        for _ in range(after):
            yield chunk(content="x ")
        reached.set()
        while not leave.wait(0.01):
            yield b": waiting\n\n"

    server.events = events
    responder = open_endpoint()
    feed = StreamReader(responder.answer(QUESTION, responder.default_params))
    assert reached.wait(10)
    began = time.monotonic()
    feed.cancel()
    feed.join()
    assert time.monotonic() - began < 1.0
    last = feed.drain()[-1]
    assert isinstance(last, GenerationChunk)
    assert last.finish_reason is FinishReason.CANCELLED
    assert server.gone.wait(10)
    leave.set()
    server.events = lambda: text_events("again")
    assert text(chunks(responder)) == "again"


def test_cancel_does_not_wait_for_a_server_that_still_reads_the_prompt() -> None:
    """The server has not sent headers yet, and must see the connection close."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        asked, left = threading.Event(), threading.Event()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                while connection.recv(65536):
                    asked.set()
            left.set()

        thread = threading.Thread(target=serve)
        thread.start()
        responder = EndpointResponder(Endpoint(url, "any"))
        feed = StreamReader(responder.answer(QUESTION, responder.default_params))
        assert asked.wait(10)
        began = time.monotonic()
        feed.cancel()
        feed.join()
        assert time.monotonic() - began < 1.0
        assert left.wait(5)
        thread.join()
        responder.close()


# ---- continuing


def test_a_text_is_continued_without_repeating_it(
    server: Server, open_endpoint: Callable[..., EndpointResponder]
) -> None:
    begin = "The capital of France is"
    server.events = lambda: text_events(" Par", "is.")
    responder = open_endpoint()
    assert text(chunks(responder, assistant_prefix=begin)) == " Paris."
    assert server.requests[0]["messages"] == [*QUESTION, {"role": "assistant", "content": begin}]
    server.events = lambda: text_events("The cap", "ital of France is Par", "is.")
    assert text(chunks(responder, assistant_prefix=begin)) == " Paris."
    server.events = lambda: text_events("The c", "at.")
    assert text(chunks(responder, assistant_prefix=begin)) == "The cat."
    server.events = lambda: text_events("The c")
    assert text(chunks(responder, assistant_prefix=begin)) == "The c"


def test_vllm_is_asked_to_continue(server: Server, open_endpoint: Callable[..., EndpointResponder]) -> None:
    server.models = {"data": [{"id": "small", "owned_by": "vllm"}]}
    chunks(open_endpoint(), assistant_prefix="So")
    assert server.requests[0]["continue_final_message"] is True
    assert server.requests[0]["add_generation_prompt"] is False


def test_servers_that_cannot_continue_are_an_error(
    server: Server, open_endpoint: Callable[..., EndpointResponder]
) -> None:
    server.models = {"data": [{"id": "small", "owned_by": "system"}]}
    with pytest.raises(InputError, match="does not continue") as caught:
        chunks(open_endpoint(), assistant_prefix="So")
    one_line(caught)


# ---- conversations that are too long


@pytest.mark.parametrize(
    "refusal",
    [
        {
            "message": "the request exceeds the context",
            "type": "exceed_context_size_error",
            "n_prompt_tokens": 300,
            "n_ctx": 100,
        },
        {"message": "The maximum context length is 100 tokens. However, your messages resulted in 300 tokens."},
    ],
)
def test_the_oldest_turns_are_dropped_once_the_limit_is_known(
    server: Server, open_endpoint: Callable[..., EndpointResponder], tmp_path: Path, refusal: dict[str, Any]
) -> None:
    server.models = None
    server.refuse = lambda asked: (400, refusal) if len(asked["messages"]) > 3 else None
    server.events = lambda: text_events("x" * 400)
    session = ChatSession(Store(tmp_path / "x.db"), ChatParameters(SamplingParams()))
    session.set_responder(open_endpoint("any"))

    def ended(message: Message) -> Message:
        while session.answering is not None:
            session.poll()
            time.sleep(0.005)
        return message

    ended(session.ask("q" * 400))
    assert "error" not in session.conversation.path()[-1].figures
    failed = ended(session.ask("another"))
    assert "error" not in failed.figures
    failed = ended(session.ask("and another"))
    assert "the context holds 100" in failed.figures["error"].replace("model's context", "context")
    assert "ask again" in failed.figures["error"]
    again = ended(session.regenerate(failed))
    assert again.content == "x" * 400
    assert session.responder is not None
    assert session.responder.context_length == 100
    assert server.requests[-1]["messages"][-1]["content"] == "and another"


def test_parameters_changed_mid_answer_apply_to_the_next_answer(
    server: Server, open_endpoint: Callable[..., EndpointResponder], tmp_path: Path
) -> None:
    go = threading.Event()

    def events() -> Iterator[bytes]:
        yield chunk(content="x")
        go.wait(10)
        yield from text_events("y")

    server.events = events
    session = ChatSession(Store(tmp_path / "x.db"), ChatParameters(SamplingParams()))
    session.set_responder(open_endpoint())
    answer = session.ask("Hi")
    while not answer.content:
        session.poll()
        time.sleep(0.005)
    session.apply_change(lambda parameters: parameters.set("temperature", 0.1))
    go.set()
    while session.answering is not None:
        session.poll()
        time.sleep(0.005)
    assert answer.figures["changes"] == [{"at": None, "name": "temperature", "value": "0.1"}]
    assert "changed mid-answer: temperature 0.1 from the next answer" in figures_line(answer.figures)
    assert "temperature" not in answer.params


# ---- addresses


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("api.openai.com", "https://api.openai.com/v1"),
        ("localhost:11434", "http://localhost:11434/v1"),
        ("127.0.0.1:8000/v1/chat/completions", "http://127.0.0.1:8000/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        (" https://x.example/openai/v1 ", "https://x.example/openai/v1"),
    ],
)
def test_base_urls_are_completed(typed: str, url: str) -> None:
    assert base_url(typed) == url


@pytest.mark.parametrize(
    "typed",
    ["", "ftp://x/v1", "https://user:secret@x/v1", "http://", "https://x:99999/v1", "https://x/v1?a=1", "https://[::1/v1",
     "http://x\x1b/v1", "file:///etc/passwd"],
)  # fmt: skip
def test_invalid_base_urls_are_rejected(typed: str) -> None:
    with pytest.raises(InputError) as caught:
        base_url(typed)
    assert "secret" not in one_line(caught)


def test_sending_a_key_over_plain_http_gives_a_warning() -> None:
    assert "unencrypted http" in warning("http://192.168.0.5:8000/v1", with_key=True)
    assert warning("http://192.168.0.5:8000/v1", with_key=False) == ""
    assert warning("https://api.example.com/v1", with_key=True) == ""
    for local in ("http://localhost:1/v1", "http://127.0.0.1/v1", "http://[::1]:3/v1"):
        assert warning(local, with_key=True) == ""
