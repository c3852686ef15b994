"""The chat page's API: conversations shared with the terminal chat, answers that keep going, branches and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import web_chat
from web_chat import WebServer, until

from llm_edge.chat.fake import FakeResponder, Said
from llm_edge.chat.history.store import Store
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.questions import QUICK
from llm_edge.chat.session import ChatSession
from llm_edge.runtime.errors import MachineError
from llm_edge.runtime.sampling.params import SamplingParams


@pytest.fixture(scope="module")
def running(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with pytest.MonkeyPatch.context() as patch:
        server = web_chat.start(models_folder, tmp_path_factory.mktemp("data"), patch)
        yield server
        server.stop()


@pytest.fixture
def web(running: WebServer) -> WebServer:
    running.fake.pause = 0.0
    return running


def texts(chat: dict[str, list[dict[str, str]]]) -> list[str]:
    return [message["text"] for message in chat["messages"]]


def test_an_answer_is_stored_for_the_terminal_chat_and_rendered_for_the_page(web: WebServer) -> None:
    web.fake.enqueue(Said("Yes, **indeed**.", reasoning="Is it so?"))
    begun = web.ask("Is it?", params={"temperature": 0.5})
    shown = web.chat(begun["chat"])
    assert texts(shown) == ["Is it?", "Yes, **indeed**."]
    assert shown["messages"][1]["blocks"] == ["<p>Yes, <strong>indeed</strong>.</p>\n"]
    assert shown["messages"][1]["reasoning"] == "Is it so?"
    assert shown["params"] == {"temperature": 0.5}
    assert shown["used"] > 0
    with Store(web.data / "conversations.sqlite3") as store:
        stored = store.load(begun["chat"])
    assert [message.content for message in stored.path()] == ["Is it?", "Yes, **indeed**."]
    assert stored.title == "Is it?"


def test_a_conversation_of_the_terminal_chat_continues_on_the_page(web: WebServer) -> None:
    with Store(web.data / "conversations.sqlite3") as store:
        session = ChatSession(store, ChatParameters(SamplingParams()))
        session.set_responder(FakeResponder("From the terminal."))
        session.ask("First")
        while session.answering is not None:
            session.wait(1)
            session.poll()
        number = session.conversation.id
        assert texts(web.chat(number)) == ["First", "From the terminal."]
        web.fake.enqueue("From the page.")
        web.ask("Second", chat=number)
        assert [each["content"] for each in web.fake.asked[-1][0]] == ["First", "From the terminal.", "Second"]
        session.open(number)
        assert [message.content for message in session.conversation.path()][2:] == ["Second", "From the page."]


def test_an_answer_continues_unwatched_and_a_late_page_misses_nothing(web: WebServer) -> None:
    web.fake.pause = 0.02
    text = " ".join(f"word{n}" for n in range(60)) + "\n\n```python\nx = 1\n```\n\nEnd."
    web.fake.enqueue(Said(text, reasoning="Let me think."))
    number = web.post("/ask", text="Long?")["chat"]
    blocks: list[str] = []
    reasoning, seen = "", 0
    for name, data in web.events(number):  # connects in the middle, leaves, and connects again
        seen += 1
        if name == "answer" and any("word20" in block for block in data["blocks"]):
            break
    for name, data in web.events(number):
        if name == "chat":
            answer = data["messages"][-1]
            if data["running"] is None:
                break
            blocks, reasoning = list(answer["blocks"]), answer["reasoning"]
        else:
            blocks[data["from"] :] = data["blocks"]
            reasoning = reasoning[: data["reasoning_from"]] + data["reasoning"]
            assert data["used"] > 0
    assert answer["text"] == text
    assert seen > 1
    assert answer["blocks"][: len(blocks) - 1] == blocks[:-1]
    assert answer["reasoning"] == reasoning == "Let me think."


def test_changed_parameters_reach_the_running_answer(web: WebServer) -> None:
    web.fake.pause = 0.05
    number = web.post("/ask", text="Slow?")["chat"]
    changed = web.send("PATCH", f"/chats/{number}/params", {"params": {"temperature": 1.5, "max_tokens": 20}})
    assert changed == {"running": True}
    until(lambda: web.fake.replies[-1].params.temperature == 1.5)
    refused = web.http.patch(f"/chats/{number}/params", json={"params": {"top_p": 7}})
    assert refused.status_code == 400
    assert "top_p" in refused.json()["detail"]
    web.wait(number)
    assert "changed mid-answer: max tokens 20" in web.chat(number)["messages"][1]["figures"]
    assert web.send("PATCH", f"/chats/{number}/params", {"params": {"top_p": 0.5}}) == {"running": False}


def test_stop_keeps_what_was_generated_and_continue_goes_on(web: WebServer) -> None:
    web.fake.pause = 0.05
    web.fake.enqueue("one two three four five six seven eight nine ten")
    begun = web.post("/ask", text="Count")
    number = begun["chat"]
    for name, data in web.events(number):
        if name == "answer" and any("two" in block for block in data["blocks"]):
            break
    refused = web.http.post("/ask", json={"text": "Another", "chat": number})
    assert refused.status_code == 409
    web.post(f"/chats/{number}/stop")
    web.wait(number)
    partial = web.chat(number)["messages"][1]
    assert "stopped" in partial["figures"]
    assert "one two three four five six seven eight nine ten".startswith(partial["text"])
    web.fake.pause = 0.0
    web.fake.enqueue("one two three four five six seven eight nine ten")
    web.post(f"/chats/{number}/continue", message=begun["message"])
    web.wait(number)
    assert texts(web.chat(number))[1] == "one two three four five six seven eight nine ten"


def test_of_two_questions_at_once_the_second_is_refused_without_harm_to_the_first(web: WebServer) -> None:
    web.fake.enqueue("First.")
    number = web.ask("Begin")["chat"]
    web.fake.pause = 0.02
    web.fake.enqueue("one two three four five six")
    body = {"text": "At once", "chat": number, "model": "other:int4"}  # which has to be loaded
    with ThreadPoolExecutor(4) as threads:
        statuses = list(threads.map(lambda _: web.http.post("/ask", json=body).status_code, range(4)))
    assert sorted(statuses) == [200, 409, 409, 409]
    web.wait(number)
    answer = web.chat(number)["messages"][-1]
    assert answer["text"] == "one two three four five six"
    assert "complete" in answer["figures"]


def test_both_sides_are_edited_into_branches_that_can_be_selected(web: WebServer) -> None:
    web.fake.enqueue("A1", "A2", "B1")
    begun = web.ask("Question")
    number = begun["chat"]
    again = web.post(f"/chats/{number}/regenerate", message=begun["message"])
    web.wait(number)
    shown = web.chat(number)
    assert texts(shown) == ["Question", "A2"]
    assert shown["messages"][1]["branches"] == [begun["message"], again["message"]]
    edited = web.post(f"/chats/{number}/edit", message=again["message"], text="A2, corrected")
    assert texts(web.chat(number)) == ["Question", "A2, corrected"]
    question = web.chat(number)["messages"][0]["id"]
    web.post(f"/chats/{number}/edit", message=question, text="Other question")
    web.wait(number)
    assert texts(web.chat(number)) == ["Other question", "B1"]
    web.post(f"/chats/{number}/select", message=edited["message"])
    assert texts(web.chat(number)) == ["Question", "A2, corrected"]
    assert web.fake.asked[-1][0] == [{"role": "user", "content": "Other question"}]


def test_conversations_are_found_renamed_pinned_deleted_and_restored(web: WebServer) -> None:
    web.fake.enqueue("A very peculiar aardvark.")
    number = web.ask("Which animal?")["chat"]
    found = web.get("/chats", search="aardvark")["chats"]
    assert [each["id"] for each in found] == [number]
    assert "aardvark" in found[0]["snippet"]
    web.send("PATCH", f"/chats/{number}", {"title": "Animals\nof the world", "pinned": True, "system": "Be brief."})
    first = web.get("/chats")["chats"][0]
    assert (first["id"], first["title"], first["pinned"]) == (number, "Animals of the world", True)
    assert web.chat(number)["system"] == "Be brief."
    web.fake.enqueue("Brief.")
    web.ask("And?", chat=number)
    assert web.fake.asked[-1][0][0] == {"role": "system", "content": "Be brief."}
    web.send("DELETE", f"/chats/{number}")
    assert number not in [each["id"] for each in web.get("/chats")["chats"]]
    assert next(web.events(number))[0] == "gone"
    web.post(f"/chats/{number}/restore")
    assert texts(web.chat(number))[:2] == ["Which animal?", "A very peculiar aardvark."]


def test_a_new_conversation_starts_with_its_system_prompt(web: WebServer) -> None:
    web.fake.enqueue("Arr.")
    number = web.ask("Hello", system="Talk like a pirate.")["chat"]
    assert web.fake.asked[-1][0][0] == {"role": "system", "content": "Talk like a pirate."}
    assert web.chat(number)["system"] == "Talk like a pirate."


def test_an_export_can_be_imported(web: WebServer) -> None:
    web.fake.enqueue("Said once.")
    number = web.ask("Export me: ä/..\\?")["chat"]
    markdown = web.http.get(f"/chats/{number}/export")
    assert "Said once." in markdown.text
    assert markdown.headers["content-disposition"] == 'attachment; filename="Export me .md"'
    exported = web.http.get(f"/chats/{number}/export", params={"format": "json"})
    assert json.loads(exported.text)["messages"][1]["content"] == "Said once."
    assert web._checked(web.http.post("/import", content=exported.content)) == {"conversations": 1, "unreadable": 0}
    newest = max(each["id"] for each in web.get("/chats")["chats"])
    assert newest != number
    assert texts(web.chat(newest)) == ["Export me: ä/..\\?", "Said once."]
    for broken in (b"", b"{", b"PK", b'{"format": "other"}', b"[1,"):
        refused = web.http.post("/import", content=broken)
        assert refused.status_code == 400, broken
        assert "/tmp" not in refused.json()["detail"]


def test_token_probabilities_are_recorded_on_request(web: WebServer) -> None:
    web.fake.enqueue("one two", "one two")
    plain = web.ask("Without")
    assert web.get(f"/chats/{plain['chat']}/messages/{plain['message']}/tokens") == {"tokens": []}
    begun = web.ask("With", params={"logprobs": 3})
    tokens = web.get(f"/chats/{begun['chat']}/messages/{begun['message']}/tokens")["tokens"]
    assert [token["text"] for token in tokens] == ["one", " two"]
    assert all(0 < token["p"] <= 1 and len(token["top"]) == 3 for token in tokens)
    assert web.http.get(f"/chats/{begun['chat']}/messages/99999/tokens").status_code == 404


def test_presets_are_offered_saved_and_deleted(web: WebServer) -> None:
    def names() -> list[str]:
        return [each["name"] for each in web.get("/models/details", model="tiny")["presets"]]

    assert {"Model defaults", "creative", "precise"} <= set(names())
    web.send("POST", "/presets", {"name": "Mine", "params": {"temperature": 0.1}}, model="tiny")
    mine = next(each for each in web.get("/models/details", model="tiny")["presets"] if each["name"] == "Mine")
    assert (mine["own"], mine["values"], mine["decides"]) == (True, {"temperature": 0.1}, None)
    refused = web.http.post("/presets", json={"name": "creative", "params": {}}, params={"model": "tiny"})
    assert refused.status_code == 400
    web.send("DELETE", "/presets", model="tiny", name="Mine")
    assert "Mine" not in names()


def test_quick_questions_are_the_original_ten_and_can_be_edited(web: WebServer) -> None:
    assert web.get("/state")["questions"] == list(QUICK)
    assert len(QUICK) == 10
    web.send("PUT", "/questions", {"text": "Why?"}, old=QUICK[0])
    web.send("DELETE", "/questions", old=QUICK[1])
    changed = web.post("/questions", text="How?")["questions"]
    assert changed == ["Why?", *QUICK[2:], "How?"]
    assert web.http.delete("/questions", params={"old": "Unknown"}).status_code == 404
    assert web.post("/questions/restore")["questions"][:10] == list(QUICK)


def test_every_editable_parameter_is_described_with_its_range(web: WebServer) -> None:
    parameters = {each["name"]: each for each in web.get("/state")["parameters"]}
    assert {"temperature", "top_p", "max_tokens", "seed", "stop", "dry_multiplier", "json_schema"} <= set(parameters)
    for each in parameters.values():
        assert each["title"]
        assert each["help"]
        assert (each["slider"] is not None) == (each["kind"] in ("int", "float")), each["name"]


def test_models_are_listed_with_their_load_state(web: WebServer) -> None:
    web.ask("Load it")
    listed = web.get("/models")
    states = {each["name"]: each["state"] for each in listed["models"]}
    assert states["tiny:fp32"] == "loaded"
    assert states["other:int8"] == "idle"
    assert listed["default"] == "tiny:fp32"


def test_a_failed_answer_says_why(web: WebServer) -> None:
    web.fake.enqueue(Said("Half an", failure=MachineError("the machine is on fire")))
    number = web.ask("Go on")["chat"]
    answer = web.chat(number)["messages"][1]
    assert answer["error"] == "the machine is on fire"
    assert answer["text"] == "Half an"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/ask", {"text": " \n"}),
        ("/ask", {"text": "x", "params": {"temperature": -1}}),
        ("/ask", {"text": "x", "params": {"no_such": 1}}),
        ("/ask", {"text": "x", "model": "no-such-model"}),
        ("/ask", {"text": "x", "chat": 987654}),
        ("/ask", {"text": "x", "chat": 2**63}),
        ("/ask", {"text": "x", "unknown": True}),
        ("/chats/987654/regenerate", {"message": 1}),
        ("/chats/0/stop", {}),
        ("/chats/987654/restore", {}),
        ("/questions", {"text": "\n"}),
    ],
)
def test_unusable_requests_are_refused_with_one_line(web: WebServer, path: str, body: object) -> None:
    refused = web.http.post(path, json=body)
    assert refused.status_code in (400, 404), refused.text
    assert refused.json()["detail"].count("\n") == 0
    assert not web.http.get("/chats", params={"search": "x"}).is_error


def test_the_page_is_public_but_conversations_need_the_key(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = web_chat.start(models_folder, tmp_path, monkeypatch, api_keys=("secret-key",))
    try:
        page = httpx2.get(server.url)
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert httpx2.get(f"{server.url}/static/app.js").status_code == 200
        assert httpx2.get(f"{server.url}/static/..%2f..%2fapp.py").status_code == 404
        for path in ("/state", "/chats", "/chats/1/events", "/models"):
            assert server.http.get(path).status_code == 401
            allowed = server.http.get(path, headers={"Authorization": "Bearer secret-key"}, timeout=60)
            assert allowed.status_code == 200
            if path.endswith("events"):
                assert "event: gone" in allowed.text
    finally:
        server.stop()


def test_an_unusable_store_is_replaced_for_the_time_being_with_a_note(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conversations.sqlite3").write_text("not a database, but a text of some length" * 50)
    server = web_chat.start(models_folder, tmp_path, monkeypatch)
    try:
        assert "Conversations are lost when the server stops" in server.get("/state")["note"]
        number = server.ask("Still works?")["chat"]
        assert len(server.chat(number)["messages"]) == 2
    finally:
        server.stop()
    assert (tmp_path / "conversations.sqlite3").read_text().startswith("not a database")
