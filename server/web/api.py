"""The API of the chat page, under `/ui/api`. It may change with the page; programs use the other protocols."""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from llm_edge.chat.history import transcript
from llm_edge.chat.history.archive import write_archive
from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.chat.history.importing import import_file
from llm_edge.chat.responder import tokens_of_question
from llm_edge.chat.session import ChatSession
from llm_edge.runtime.errors import InputError
from llm_edge.server.errors import ApiError, error_route
from llm_edge.server.state import server_state
from llm_edge.server.streaming import event_stream, sse
from llm_edge.server.web.bodies import Again, Ask, ChatChange, Edit, ParamChange, Select
from llm_edge.server.web.chats import LiveChats
from llm_edge.server.web.state import WebState, web_state
from llm_edge.server.web.views import record_views, summary_view

router = APIRouter(
    prefix="/ui/api",
    route_class=error_route(lambda error: {"detail": error.message, "code": error.code}),
    include_in_schema=False,
)
_PAGE = 60  # conversations of a request
_UNSAFE = re.compile(r"[^\w .-]+")
ChatId = Annotated[int, InPath(ge=1, le=2**53)]


async def _chats(request: Request) -> LiveChats:
    return (await web_state(request)).chats


# ---- the list of conversations


@router.get("/chats")
async def chats(
    request: Request,
    search: Annotated[str, Query(max_length=1000)] = "",
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> dict[str, Any]:
    """Conversations, pinned ones first, then the most recently used; or those that a search finds."""
    live = await _chats(request)
    store = live.store
    if search.strip():
        found = await run_in_threadpool(store.search, search, _PAGE)
    else:
        found = await run_in_threadpool(store.recent, _PAGE, offset)
    running = live.running()
    more = len(found) == _PAGE and not search.strip()
    return {"chats": [summary_view(each, each.id in running) for each in found], "more": more}


@router.patch("/chats/{number}")
async def change(number: ChatId, body: ChatChange, request: Request) -> dict[str, Any]:
    """Rename or pin a conversation, or change its system prompt."""

    def apply(session: ChatSession) -> None:
        if body.title is not None:
            session.store.set_title(session.conversation, body.title)
        if body.pinned is not None:
            session.store.pin(session.conversation, body.pinned)
        if body.system is not None:
            session.store.set_system(session.conversation, body.system)

    with (await _chats(request)).use(number) as chat:
        await chat.change(apply, while_answering=True)
    return {}


@router.delete("/chats/{number}")
async def delete(number: ChatId, request: Request) -> dict[str, Any]:
    """Delete a conversation; an answer being generated is stopped."""
    with (await _chats(request)).use(number) as chat:
        chat.session.stop()
        await chat.change(lambda session: session.store.delete(number), while_answering=True)
    return {}


@router.post("/chats/{number}/restore")
async def restore(number: ChatId, request: Request) -> dict[str, Any]:
    """Undo `delete`."""
    await run_in_threadpool((await _chats(request)).store.restore, number)
    return {}


# ---- files


@router.get("/chats/{number}/export")
async def export(
    number: ChatId, request: Request, form: Annotated[Literal["markdown", "json"], Query(alias="format")] = "markdown"
) -> Response:
    """A conversation as a file."""
    with (await _chats(request)).use(number) as chat:
        title, text = await chat.read(
            lambda session: (session.conversation.title, _text_of(session.conversation, form))
        )
    suffix, kind = {"markdown": ("md", "text/markdown"), "json": ("json", "application/json")}[form]
    name = _UNSAFE.sub("", title)[:60].strip(" .") or "conversation"
    ascii_name = name.encode("ascii", "ignore").decode() or "conversation"
    headers = {"Content-Disposition": f'attachment; filename="{ascii_name}.{suffix}"'}
    return Response(text.encode("utf-8", "replace"), media_type=f"{kind}; charset=utf-8", headers=headers)


def _text_of(conversation: Conversation, form: str) -> str:
    return transcript.to_json(conversation) if form == "json" else transcript.markdown(conversation)


@router.get("/export")
async def export_all(request: Request) -> FileResponse:
    """All conversations as a zip, which can be imported."""
    store = (await _chats(request)).store
    folder = tempfile.TemporaryDirectory(prefix="llm-edge-export-")
    path = Path(folder.name) / "conversations.zip"
    try:
        await run_in_threadpool(write_archive, path, store)
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(path, filename="llm-edge-conversations.zip", background=BackgroundTask(folder.cleanup))


@router.post("/import")
async def import_(request: Request) -> dict[str, Any]:
    """Import the conversations of a file: our JSON or zip, or ChatGPT's archive or conversations.json."""
    store = (await _chats(request)).store
    with tempfile.TemporaryDirectory(prefix="llm-edge-import-") as folder:
        path = Path(folder) / "import"
        with path.open("wb") as file:
            async for chunk in request.stream():
                await run_in_threadpool(file.write, chunk)
        try:
            imported = await run_in_threadpool(import_file, str(path), store)
        except InputError as error:
            raise InputError(str(error).replace(f"{path}: ", "").replace(str(path), "the file")) from error
    return {"conversations": imported.conversations, "unreadable": imported.unreadable}


# ---- one conversation


@router.get("/chats/{number}/events")
async def events(number: ChatId, request: Request) -> StreamingResponse:
    """The conversation, and what changes from then on; see `LiveChat.events`."""
    live = await _chats(request)

    async def stream() -> AsyncIterator[bytes]:
        with live.use(number) as chat:
            async for name, data in chat.events():
                yield sse(data, name)

    return event_stream(stream(), server_state(request).config.keepalive)


@router.post("/ask")
async def ask(body: Ask, request: Request) -> dict[str, int]:
    """Ask a question in a conversation, or in a new one."""
    return await _answer(request, body.chat, body, lambda session: session.ask(body.text, _tokens(session, body.text)))


@router.post("/chats/{number}/regenerate")
async def regenerate(number: ChatId, body: Again, request: Request) -> dict[str, int]:
    """Answer a question once more, as another branch."""
    return await _answer(request, number, body, lambda session: session.regenerate(_find(session, body.message)))


@router.post("/chats/{number}/continue")
async def continue_(number: ChatId, body: Again, request: Request) -> dict[str, int]:
    """Continue the last answer where it ended."""
    return await _answer(request, number, body, lambda session: session.continue_answer(_find(session, body.message)))


@router.post("/chats/{number}/edit")
async def edit(number: ChatId, body: Edit, request: Request) -> dict[str, int]:
    """Replace a question, which is answered, or an answer; the old one stays as a branch."""

    def replace_answer(session: ChatSession) -> int:
        old = _find(session, body.message)
        question = session.conversation.messages[old.parent] if old.parent is not None else None
        if question is None:
            raise InputError("this message is not an answer")
        new = Message(0, old.parent, old.role, body.text, model=old.model, figures={"note": "edited"})
        return session.add_answer(new, question, question.parent)[1].id

    live = await _chats(request)
    with live.use(number) as chat:
        old = await chat.read(lambda session: _find(session, body.message))
        if old.role == "user":
            return await _answer(
                request, number, body, lambda s: s.edit(_find(s, body.message), body.text, _tokens(s, body.text))
            )
        return {"chat": number, "message": await chat.change(replace_answer)}


@router.post("/chats/{number}/select")
async def select(number: ChatId, body: Select, request: Request) -> dict[str, Any]:
    """Show the branch with a message."""
    with (await _chats(request)).use(number) as chat:
        await chat.change(lambda session: session.select(_find(session, body.message).id))
    return {}


@router.post("/chats/{number}/stop")
async def stop(number: ChatId, request: Request) -> dict[str, Any]:
    """Stop the answer being generated; what was generated stays."""
    with (await _chats(request)).use(number) as chat:
        chat.session.stop()
    return {}


@router.patch("/chats/{number}/params")
async def params(number: ChatId, body: ParamChange, request: Request) -> dict[str, Any]:
    """Change the parameters of the answer being generated, from its next token on."""

    def apply(session: ChatSession) -> None:
        system = session.parameters.system
        session.apply_change(lambda parameters: parameters.load({**body.params, "system": system}))

    with (await _chats(request)).use(number) as chat:
        if chat.running:
            await chat.read(apply)
    return {"running": chat.running}


@router.get("/chats/{number}/messages/{message}/tokens")
async def tokens(number: ChatId, message: ChatId, request: Request) -> dict[str, Any]:
    """The tokens of an answer with their probabilities; none if they were not recorded."""
    with (await _chats(request)).use(number) as chat:
        records = await chat.read(lambda session: list(session.record_of(_find(session, message))))
    return {"tokens": await run_in_threadpool(record_views, records)}


async def _answer(
    request: Request, number: int | None, body: Ask | Again | Edit, begin: Callable[[ChatSession], Message]
) -> dict[str, int]:
    web: WebState = await web_state(request)
    return await web.chats.answer(number, body.options(), begin)


def _find(session: ChatSession, message: int) -> Message:
    found = session.conversation.messages.get(message)
    if found is None:
        raise ApiError(404, f"message {message} does not exist in this conversation", "message_not_found")
    return found


def _tokens(session: ChatSession, text: str) -> int:
    return tokens_of_question(session.responder, text, first=not session.conversation.messages)
