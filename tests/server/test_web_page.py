"""The chat page in Chromium: every function, at three widths, in light and dark, by keyboard and for screen readers."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browsing
import pytest
import web_chat
from serving import Served
from web_chat import WebServer, until

from llm_edge.chat.fake import Said
from llm_edge.chat.history.store import Store
from llm_edge.chat.questions import QUICK

WIDTHS = {360: 740, 390: 844, 1440: 900}
MARKDOWN = """\
Here is a **list**:

- one <img src=x onerror="window.hacked = true">
- two

```python
def add(a, b):
    return a + b
```

| a | b |
|---|--:|
| 1 | 2 |

<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
"""


@pytest.fixture(scope="module")
def running(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with pytest.MonkeyPatch.context() as patch:
        server = web_chat.start(models_folder, tmp_path_factory.mktemp("data"), patch)
        yield server
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing.chromium() as found:
        yield found


@pytest.fixture
def web(running: WebServer) -> WebServer:
    running.fake.pause = 0.0
    return running


Opener = Callable[..., Any]


@pytest.fixture
def open_page(web: WebServer, browser: Any) -> Iterator[Opener]:
    """Opens the page at a width; the test fails if the browser reports an error."""
    problems: list[str] = []
    contexts = []

    def opened(path: str = "/", width: int = 1440, *, url: str = "", expected: str = "", **options: Any) -> Any:
        size = {"width": width, "height": WIDTHS[width]}
        touch = {"has_touch": True, "is_mobile": True} if width < 800 else {}
        context = browser.new_context(viewport=size, accept_downloads=True, **touch, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)

        def report(text: str) -> None:
            if not expected or not re.search(expected, text):
                problems.append(text)

        page.on("console", lambda message: report(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: report(str(error)))
        page.goto(path if path.startswith("about:") else (url or web.url) + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def ask(page: Any, text: str) -> None:
    """Type a question, send it, and wait for the end of the answer."""
    before = page.locator(".message.answer").count()
    page.fill("#question", text)
    page.click("#send")
    page.locator(".message.answer").nth(before).locator(".actions").wait_for()


def last(page: Any) -> Any:
    return page.locator(".message.answer").last


@pytest.mark.parametrize("width", WIDTHS)
def test_a_question_is_answered_at_every_width(web: WebServer, open_page: Opener, width: int) -> None:
    web.fake.enqueue(MARKDOWN)
    page = open_page(width=width)
    page.locator(".quick").first.wait_for()
    assert page.locator(".quick").all_inner_texts() == list(QUICK)
    ask(page, "Show me everything")
    answer = last(page)
    assert answer.locator("li").count() == 2
    assert answer.locator(".code .t-k").first.inner_text() == "def"
    assert answer.locator("td.right").inner_text() == "2"
    assert "weather" in answer.locator(".call summary").inner_text()
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None
    assert "tok/s" in answer.locator(".figures").first.inner_text()
    assert re.match(r"[\d,]+ of 1,024 tokens", page.inner_text("#used"))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("#send", "#open-sidebar", "#open-panel", ".code .copy"):
        box = page.locator(name).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width, name


def test_quick_questions_are_asked_edited_added_deleted_and_restored(web: WebServer, open_page: Opener) -> None:
    page = open_page()
    page.get_by_role("button", name=f"Change “{QUICK[1]}”").click()
    page.get_by_role("menuitem", name="Edit…").click()
    page.get_by_role("dialog").get_by_label("Question").fill("How many Ls?")
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator(".quick", has_text="How many Ls?").wait_for()
    page.get_by_role("button", name="Change “How many Ls?”").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.locator(".quick", has_text="How many Ls?").wait_for(state="detached")
    page.get_by_role("button", name="Undo").click()
    page.locator(".quick", has_text="How many Ls?").wait_for()
    page.get_by_role("button", name="Add a question").click()
    page.get_by_role("dialog").get_by_label("Question").fill("What now?")
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator(".quick", has_text="What now?").wait_for()
    page.get_by_role("button", name="Restore the original ones").click()
    page.locator(".quick", has_text=QUICK[1]).wait_for()
    web.fake.enqueue("The cheetah.")
    page.locator(".quick", has_text=QUICK[0]).click()
    last(page).locator(".actions").wait_for()
    assert web.fake.asked[-1][0][-1]["content"] == QUICK[0]


def test_a_reload_in_mid_answer_loses_nothing(web: WebServer, open_page: Opener) -> None:
    web.fake.pause = 0.2
    words = [f"word{n}" for n in range(50)]
    web.fake.enqueue(Said(" ".join(words), reasoning="Thinking about it."))
    page = open_page()
    page.fill("#question", "Long?")
    page.keyboard.press("Enter")
    page.locator(".block", has_text="word5").wait_for()
    page.fill("#question", "a draft")
    page.reload()
    until(lambda: page.input_value("#question") == "a draft")
    page.locator("#stop").wait_for()
    last(page).locator(".actions").wait_for()
    assert last(page).locator(".blocks").inner_text().split() == words
    assert page.locator(".reasoning-text").text_content() == "Thinking about it."


def test_an_answer_continues_when_the_page_is_closed(web: WebServer, open_page: Opener) -> None:
    web.fake.pause = 0.05
    web.fake.enqueue(" ".join(f"word{n}" for n in range(30)))
    page = open_page()
    page.fill("#question", "Leaving soon")
    page.keyboard.press("Enter")
    page.locator(".block", has_text="word2").wait_for()
    path = "/" + page.url.partition("/#")[2].join(("#", ""))
    page.context.close()
    again = open_page(path)
    again.locator(".block", has_text="word29").wait_for()


def test_a_lost_network_is_reported_and_nothing_is_missed(web: WebServer, open_page: Opener) -> None:
    web.fake.pause = 0.05
    web.fake.enqueue(" ".join(f"word{n}" for n in range(50)))
    page = open_page(expected="ERR_INTERNET_DISCONNECTED|network|Failed to load")
    page.fill("#question", "Through a tunnel")
    page.keyboard.press("Enter")
    page.locator(".block", has_text="word2").wait_for()
    page.context.set_offline(True)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # looks at the models again
    page.locator("#banner").wait_for()
    page.context.set_offline(False)
    page.locator("#banner").wait_for(state="hidden")
    page.locator(".block", has_text="word49").wait_for()
    last(page).locator(".actions").wait_for()


def test_changes_of_other_programs_appear_on_return(web: WebServer, open_page: Opener) -> None:
    page = open_page()
    ask(page, "Seen by both")
    number = int(page.url.rpartition("/")[2])
    with Store(web.data / "conversations.sqlite3") as store:
        store.add(store.load(number), "user", "Typed in the terminal")
    for hidden in ("true", "false"):
        page.evaluate(f"Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.locator(".message.question", has_text="Typed in the terminal").wait_for()


def test_reasoning_is_collapsed_with_its_length(web: WebServer, open_page: Opener) -> None:
    web.fake.enqueue(Said("Answer.", reasoning="one two three"))
    page = open_page()
    ask(page, "Think")
    assert page.locator(".reasoning summary").inner_text().replace("\n", " ") == "Reasoning · 3 words"
    assert not page.locator(".reasoning-text").is_visible()
    page.locator(".reasoning summary").click()
    assert page.locator(".reasoning-text").is_visible()


def test_an_answer_is_stopped_continued_regenerated_and_edited_on_both_sides(web: WebServer, open_page: Opener) -> None:
    web.fake.pause = 1.0
    web.fake.enqueue("one two three four five six seven eight nine ten eleven twelve")
    page = open_page()
    page.fill("#question", "Count")
    page.click("#send")
    page.locator(".block", has_text="two").wait_for()
    assert not page.locator("#send").is_visible()
    page.click("#stop")
    last(page).locator(".figures", has_text="stopped").wait_for()
    web.fake.pause = 0.0
    web.fake.enqueue(
        "one two three four five six seven eight nine ten eleven twelve", "Another answer", "To the new question"
    )
    page.get_by_role("button", name="Continue").click()
    page.locator(".block", has_text="twelve").wait_for()
    page.get_by_role("button", name="Regenerate").click()
    page.locator(".block", has_text="Another answer").wait_for()
    assert "2/2" in last(page).locator(".branches").inner_text()
    page.get_by_role("button", name="Previous version").click()
    page.locator(".block", has_text="twelve").wait_for()
    last(page).get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the answer").fill("Edited by hand")
    page.get_by_role("button", name="Save as new version").click()
    page.locator(".block", has_text="Edited by hand").wait_for()
    assert "3/3" in last(page).locator(".branches").inner_text()
    page.locator("#question").focus()
    page.keyboard.press("ArrowUp")  # edits the last question
    page.get_by_label("Edit your message").fill("New question")
    page.keyboard.press("Control+Enter")
    page.locator(".block", has_text="To the new question").wait_for()
    assert "2/2" in page.locator(".message.question .branches").inner_text()


def test_answers_and_code_are_copied(web: WebServer, open_page: Opener) -> None:
    web.fake.enqueue("Text\n\n```python\nx = 1\n```")
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Code")
    page.locator(".code .copy").click()
    page.locator(".code .copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n"
    last(page).get_by_role("button", name="Copy", exact=True).last.click()
    until(lambda: page.evaluate("navigator.clipboard.readText()").startswith("Text"))


def test_conversations_are_searched_renamed_pinned_deleted_and_restored(web: WebServer, open_page: Opener) -> None:
    web.fake.enqueue("About the narwhal.", "Other.")
    page = open_page()
    ask(page, "Which whale?")
    page.click("#new-chat")
    ask(page, "Something else")
    page.fill("#search", "narwhal")
    page.locator(".snippet", has_text="narwhal").wait_for()
    assert page.locator(".chat-link").count() == 1
    page.locator(".chat-link").click()
    page.locator(".block", has_text="About the narwhal.").wait_for()
    page.fill("#search", "")
    page.locator(".chat-link", has_text="Something else").wait_for()
    page.get_by_role("button", name="Actions for Which whale?").click()
    page.get_by_role("menuitem", name="Rename…").click()
    page.get_by_label("Title").fill("Whales")
    page.keyboard.press("Enter")
    page.locator("#title", has_text="Whales").wait_for()
    page.get_by_role("button", name="Actions for Whales").click()
    page.get_by_role("menuitem", name="Pin").click()
    page.locator("#chats h2", has_text="Pinned").wait_for()
    page.get_by_role("button", name="Actions for Whales").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.locator(".chat-link", has_text="Whales").wait_for(state="detached")
    assert page.url.endswith("#/")
    page.get_by_role("button", name="Undo").click()
    page.locator(".chat-link", has_text="Whales").wait_for()
    page.locator(".block", has_text="About the narwhal.").wait_for()


def test_a_conversation_is_exported_and_imported(web: WebServer, open_page: Opener, tmp_path: Path) -> None:
    web.fake.enqueue("To be exported.")
    page = open_page()
    ask(page, "Export this")
    for item, suffix in (("Export as Markdown", "md"), ("Export as JSON", "json")):
        page.click("#chat-menu")
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=item).click()
        assert download.value.suggested_filename == f"Export this.{suffix}"
        download.value.save_as(tmp_path / f"export.{suffix}")
    assert "To be exported." in (tmp_path / "export.md").read_text()
    page.click("#import")
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="Export all conversations").click()
    download.value.save_as(tmp_path / "all.zip")
    assert len(zipfile.ZipFile(tmp_path / "all.zip").namelist()) == len(web.get("/chats")["chats"])
    page.click("#import")
    with page.expect_file_chooser():
        page.get_by_role("menuitem", name="Import conversations…").click()
    page.set_input_files("#import-file", tmp_path / "export.json")
    page.locator(".toast", has_text="Imported 1 conversation.").wait_for()
    page.locator(".chat-link", has_text="Export this").nth(1).wait_for()
    (tmp_path / "broken.json").write_text("{}")
    broken = open_page(expected="400")
    broken.set_input_files("#import-file", tmp_path / "broken.json")
    broken.locator(".toast.error", has_text="broken.json was not imported").wait_for()


def test_every_parameter_is_a_control_that_is_sent_and_changes_the_running_answer(
    web: WebServer, open_page: Opener
) -> None:
    page = open_page()
    page.locator("#preset").wait_for()
    names = {each["name"] for each in web.get("/state")["parameters"]}
    shown = page.locator("[data-parameter]").evaluate_all("found => found.map((each) => each.dataset.parameter)")
    assert set(shown) == names
    page.locator("[data-parameter=temperature] input[type=number]").fill("0.3")
    page.locator("[data-parameter=top_k] input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    web.fake.enqueue("Fine.")
    ask(page, "With parameters")
    params = web.fake.asked[-1][1]
    assert (params.temperature, params.top_k) == (0.3, 5)
    web.fake.pause = 0.1
    page.fill("#question", "Again, slowly")
    page.click("#send")
    page.locator("#stop").wait_for()
    page.locator("[data-parameter=temperature] input[type=number]").fill("1.7")
    until(lambda: web.fake.replies[-1].params.temperature == 1.7)
    page.keyboard.press("Escape")
    last(page).locator(".figures", has_text="temperature 1.7 from token").wait_for()
    page.locator("[data-parameter=temperature] input[type=number]").fill("-5")  # is not used
    page.get_by_role("button", name="Reset Temperature").click()
    assert page.locator("[data-parameter=temperature].changed").count() == 0
    page.reload()
    page.locator("[data-parameter=top_k].changed").wait_for()


def test_presets_are_applied_saved_and_deleted_and_all_parameters_reset(web: WebServer, open_page: Opener) -> None:
    page = open_page()
    page.locator("#preset option", has_text="creative").wait_for(state="attached")
    page.select_option("#preset", "creative")
    assert page.locator("[data-parameter=dry_multiplier] input[type=number]").input_value() == "0.8"
    page.locator("[data-parameter=temperature] input[type=number]").fill("0.9")
    assert page.locator("#preset").input_value() == ""
    page.click("#save-preset")
    page.get_by_label("Name").fill("Nearly creative")
    page.keyboard.press("Enter")
    until(lambda: page.input_value("#preset") == "Nearly creative")
    page.click("#reset-params")
    assert page.locator(".parameter.changed").count() == 0
    assert page.locator("#preset").input_value() == "Model defaults"
    page.select_option("#preset", "Nearly creative")
    page.click("#delete-preset")
    page.locator("#preset option", has_text="Nearly creative").wait_for(state="detached")


def test_the_system_prompt_belongs_to_the_conversation(web: WebServer, open_page: Opener) -> None:
    web.fake.enqueue("Arr.", "Yes.")
    page = open_page()
    page.fill("#system", "Talk like a pirate.")
    ask(page, "Hello")
    assert web.fake.asked[-1][0][0] == {"role": "system", "content": "Talk like a pirate."}
    with page.expect_response(lambda response: response.request.method == "PATCH"):  # saved once typing pauses
        page.fill("#system", "Talk like a king.")
    ask(page, "And now?")
    assert web.fake.asked[-1][0][0] == {"role": "system", "content": "Talk like a king."}
    page.click("#new-chat")
    until(lambda: page.input_value("#system") == "")
    page.go_back()
    until(lambda: page.input_value("#system") == "Talk like a king.")


def test_a_page_that_starts_leaves_the_focus_to_the_field_in_use(web: WebServer, open_page: Opener) -> None:
    """The page asks for the list of chats last, after its fields are there."""
    page = open_page("about:blank")
    held: list[Any] = []
    page.route("**/ui/api/chats?*", lambda route: held.append(route))
    page.goto(web.url + "/")
    page.locator("#system").focus()
    until(lambda: held)
    for route in held:
        route.continue_()
    page.unroute("**/ui/api/chats?*")
    until(lambda: page.evaluate("document.querySelector('#messages').getAttribute('aria-busy') !== 'true'"))
    page.wait_for_load_state("networkidle")
    page.keyboard.type("Talk like a pirate.")
    assert page.input_value("#system") == "Talk like a pirate."
    assert page.input_value("#question") == ""


def test_token_probabilities_are_recorded_and_shown(web: WebServer, open_page: Opener) -> None:
    web.fake.enqueue("one two three", "one two three")
    page = open_page()
    ask(page, "Tokens")
    last(page).get_by_role("button", name="Token probabilities").click()
    page.get_by_role("button", name="Record and regenerate").click()
    page.locator(".branches", has_text="2/2").wait_for()
    last(page).get_by_role("button", name="Token probabilities").click()
    page.locator(".token", has_text="two").click()
    assert page.locator(".alternatives tr").count() == 5
    page.keyboard.press("ArrowRight")
    assert page.locator(".token[aria-pressed]").inner_text().strip() == "three"
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")


def test_another_model_is_chosen_and_loaded(web: WebServer, open_page: Opener) -> None:
    page = open_page()
    page.locator("#model option[value='other:int8']").wait_for(state="attached")
    page.select_option("#model", "other:int8")
    page.locator("#model-state[data-state=loaded]").wait_for()
    until(lambda: page.input_value("[data-parameter=temperature] input[type=number]") == "0")  # the model's default
    web.fake.enqueue("From the other.")
    ask(page, "Who are you?")
    assert next(each["state"] for each in web.get("/models")["models"] if each["name"] == "other:int8") == "loaded"
    page.select_option("#model", "tiny:fp32")


JOB = {"id": "1", "model": "new-model", "source": "owner/name", "stage": None, "progress": None, "detail": None,
       "error": None, "report": None, "status": "queued"}  # fmt: skip


def test_a_model_is_added_with_progress_and_its_report(web: WebServer, open_page: Opener, tmp_path: Path) -> None:
    report = {"precisions": [{"name": "int8", "size": 130_000_000, "max_difference": 0.0123, "top1": 0.987}]}
    stages = [
        JOB,
        {**JOB, "status": "running", "stage": "weights", "progress": 0.4, "detail": "layer 3"},
        {**JOB, "status": "finished", "report": report},
    ]
    asked: list[tuple[str, str]] = []

    def answer(route: Any) -> None:
        request = route.request
        if request.url.endswith("/events"):
            body = "".join(f"data: {json.dumps(stage)}\n\n" for stage in stages)
            route.fulfill(body=body, content_type="text/event-stream")
        elif request.method == "GET":
            allowed = {"downloads": True, "uploads": True}
            route.fulfill(json={"object": "list", "data": [], "allowed": allowed})
        else:
            asked.append((request.method, (request.post_data_buffer or b"").decode()))
            route.fulfill(status=202, json=JOB)

    page = open_page("about:blank")
    page.route("**/models/jobs**", answer)
    page.route("**/ui/api/state", lambda route: route.fulfill(json={**route.fetch().json(), "adds_models": True}))
    page.goto(web.url)
    page.get_by_role("button", name="Add a model").click()
    page.get_by_label("From the Hugging Face Hub").fill("owner/name")
    page.get_by_role("button", name="Download and convert").click()
    page.locator(".jobs", has_text="98.7 %").wait_for()
    assert json.loads(asked[0][1]) == {"source": "owner/name", "precision": "int8"}
    page.get_by_role("button", name="Remove new-model").click()
    page.locator(".jobs li").wait_for(state="detached")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    page.get_by_role("button", name="Upload and convert").click()
    page.get_by_role("alert").filter(has_text="Choose the files first.").wait_for()
    page.get_by_label("From files").set_input_files(weights)
    page.select_option("dialog select", "int4")
    page.get_by_role("button", name="Upload and convert").click()
    page.locator(".jobs", has_text="98.7 %").wait_for()
    assert "int4" in asked[-1][1]
    assert 'filename="model.safetensors"' in asked[-1][1]


def test_shortcuts_and_themes(web: WebServer, open_page: Opener) -> None:
    page = open_page(color_scheme="light")
    page.locator(".quick").first.wait_for()
    page.locator("#scroll").focus()
    page.keyboard.press("?")
    assert page.get_by_role("dialog").get_by_text("Search conversations").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    assert page.input_value("#question") == "two\nlines"
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+.")
    assert not page.locator("#panel").is_visible()
    page.keyboard.press("Control+.")
    assert page.locator("#panel").is_visible()
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_enter_on_a_phone_starts_a_line_and_drawers_open_and_close(web: WebServer, open_page: Opener) -> None:
    page = open_page(width=360)
    page.locator(".quick").first.wait_for()
    page.locator("#question").tap()
    page.keyboard.type("a")
    page.keyboard.press("Enter")
    page.keyboard.type("b")
    assert page.input_value("#question") == "a\nb"
    page.locator("#open-sidebar").tap()
    page.locator("#search").wait_for()
    page.locator("#close-sidebar").tap()
    page.locator("#search").wait_for(state="hidden")
    page.locator("#open-panel").tap()
    page.locator("#preset").wait_for()
    page.locator("#close-panel").tap()
    page.locator("#preset").wait_for(state="hidden")


def test_a_question_in_the_address_is_shown_but_not_sent(web: WebServer, open_page: Opener) -> None:
    count = len(web.fake.asked)
    page = open_page("/?q=Delete%20everything")
    until(lambda: page.input_value("#question") == "Delete everything")
    page.wait_for_timeout(300)
    assert len(web.fake.asked) == count


def test_failures_are_shown_and_the_question_is_kept(web: WebServer, open_page: Opener) -> None:
    page = open_page(expected="400")
    page.locator("#preset").wait_for()
    page.locator("details.group summary", has_text="Output").click()
    page.locator("[data-parameter=json_schema] textarea").fill("{not a schema")
    page.fill("#question", "Structured, please")
    page.click("#send")
    page.locator(".toast.error").wait_for()
    assert page.input_value("#question") == "Structured, please"
    page.click("#reset-params")
    page.click("#send")
    last(page).locator(".actions").wait_for()


def test_without_a_model_the_page_says_how_to_get_one(tmp_path: Path, web: WebServer, open_page: Opener) -> None:
    served = Served(tmp_path / "none")
    try:
        page = open_page(url=served.url, expected="404")
        page.locator("#model-text", has_text="Create one with llm-export.").wait_for()
        assert page.locator("[data-parameter=temperature]").is_visible()
        page.fill("#question", "Anybody there?")
        page.click("#send")
        page.locator(".toast.error", has_text="create one with llm-export").wait_for()
        assert page.input_value("#question") == "Anybody there?"
    finally:
        served.stop()


def test_a_key_is_asked_for_once_and_the_page_survives_a_restart(
    models_folder: Path, tmp_path: Path, web: WebServer, open_page: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = web_chat.start(models_folder, tmp_path, monkeypatch, api_keys=("correct-horse",))
    try:
        page = open_page(url=server.url, expected="401|ERR_|Failed to load")
        page.get_by_label("Key of this server").fill("wrong-horse")
        page.keyboard.press("Enter")
        page.locator("dialog", has_text="This key is not valid").wait_for()
        page.get_by_label("Key of this server").fill("correct-horse")
        page.keyboard.press("Enter")
        page.locator(".quick").first.wait_for()
        ask(page, "With a key")
        page.reload()
        last(page).locator(".actions").wait_for()
        assert "correct-horse" not in json.dumps(page.evaluate("({...localStorage})"))
        port = server.served.port
        server.stop()
        page.locator("#banner").wait_for()
        page.fill("#question", "Are you back?")
        server = web_chat.start(models_folder, tmp_path, monkeypatch, api_keys=("correct-horse",), port=port)
        page.locator("#banner").wait_for(state="hidden")
        page.click("#send")
        page.locator(".message.answer").nth(1).locator(".actions").wait_for()
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_reports_no_serious_problem(web: WebServer, open_page: Opener, scheme: str) -> None:
    script = browsing.axe_script(Path.home() / ".cache" / "llm-edge" / "axe")
    web.fake.enqueue(Said(MARKDOWN, reasoning="Let me see."))
    for width in WIDTHS:
        page = open_page(width=width, color_scheme=scheme, bypass_csp=True)
        page.locator(".quick").first.wait_for()
        assert_accessible(page, script, f"empty, {width}")
        ask(page, "Everything, please")
        assert_accessible(page, script, f"conversation, {width}")
        page.click("#open-sidebar")
        page.wait_for_timeout(300)
        assert_accessible(page, script, f"list, {width}")
        if width < 800:
            page.click("#close-sidebar")
            page.click("#open-panel")
            page.wait_for_timeout(300)
            assert_accessible(page, script, f"parameters, {width}")
        else:
            last(page).get_by_role("button", name="Token probabilities").click()
            assert_accessible(page, script, f"dialog, {width}")


def assert_accessible(page: Any, script: str, where: str) -> None:
    page.evaluate(script)
    found = page.evaluate("axe.run().then((result) => result.violations)")
    serious = [
        (each["id"], [node["html"][:200] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == [], where


def test_the_first_paint_transfers_less_than_150_kb(web: WebServer, open_page: Opener) -> None:
    page = open_page()
    page.locator(".quick").first.wait_for()
    entries = page.evaluate(
        "performance.getEntries().filter((each) => each.transferSize).map((each) => [each.name, each.transferSize])"
    )
    assert len(entries) >= 8
    assert all(name.startswith(web.url) for name, _ in entries)
    assert sum(size for _, size in entries) < 150_000, entries
