"""`llm-chat --serve`: the web page, the application served by it, and access control."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

PATIENCE = 60  # timeout in seconds for a program
_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?>]*\$?[a-zA-Z]|\][^\x07]*\x07)")


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TEXTUAL_DRIVER"}
    return kept | {"LLM_EDGE_DATA": str(folder), "LLM_EDGE_CONFIG": str(folder)}


class Served:
    """A server in a separate process group."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.errors = folder / "errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llm_edge.tui", "--serve", "--port", str(self.port), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(folder),
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().decode()
        assert self.first_line, self.errors.read_text()

    def visit(self, scene: Callable[[aiohttp.ClientSession, str], Awaitable[None]]) -> None:
        """Run a scene with the page's address."""

        async def play() -> None:
            url = f"http://localhost:{self.port}"
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as client:
                await listening(self.port)
                await scene(client, url)

        asyncio.run(asyncio.wait_for(play(), PATIENCE))

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


async def listening(port: int) -> None:
    """Wait until it accepts connections; its line is written shortly before."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert time.monotonic() < deadline, "nothing listens on the port"
            await asyncio.sleep(0.05)
        else:
            writer.close()
            await writer.wait_closed()
            return


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"), "--fake")
    yield server
    server.end()


async def shown(socket: aiohttp.ClientWebSocketResponse, wanted: str) -> str:
    """The application's output up to a text, without colours and cursor movements."""
    written = ""
    while wanted not in (plain := _SEQUENCE.sub("", written)):
        message = await socket.receive()
        assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), (message, written)
        written += message.data.decode() if message.type == aiohttp.WSMsgType.BINARY else ""
    return plain


def test_the_page_serves_the_chat(served: Served) -> None:
    assert served.first_line == f"http://localhost:{served.port}  Press Ctrl-C to stop.\n"

    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        async with client.get(url) as page:
            assert page.status == 200
            text = await page.text()
        assert "llm-edge" in text
        assert f'data-session-websocket-url="ws://localhost:{served.port}/ws"' in text
        assert {*re.findall(r'(?:href|src)="(https?://[^/"]+)', text)} == {url}  # nothing is loaded from other hosts
        (style,) = re.findall(r'rel="stylesheet"\s+href="([^"]+)"', text)  # without it clicks are misplaced
        async with client.get(style) as sheet:
            assert ".xterm" in await sheet.text()
        assert '<meta name="viewport" content="width=device-width' in text
        async with client.ws_connect(f"{url}/ws?width=100&height=30", headers={"Origin": url}) as visit:
            await shown(visit, "script · fake")
            await visit.send_str(json.dumps(["stdin", "Hello\r"]))
            assert "I am a script, not a model" in await shown(visit, " · complete")
            await visit.send_str(json.dumps(["stdin", "\x11"]))  # Ctrl-Q
            while (await visit.receive()).type not in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED):
                pass

    served.visit(scene)
    assert served.errors.read_text() == ""


def test_the_page_has_a_title_and_an_icon_and_focuses_only_a_connected_terminal(served: Served) -> None:
    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        async with client.get(url) as page:
            text = await page.text()
        assert "<title>llm-edge</title>" in text
        assert re.search(r'<link rel="icon" href="data:image/svg\+xml,[^"]+"', text)
        assert ".-connected .xterm-helper-textarea" in text

    served.visit(scene)


@pytest.mark.parametrize("headers", [{}, {"Connection": "Upgrade", "Upgrade": "h2c"}, {"Upgrade": "websocket"}])
def test_a_plain_request_to_the_socket_is_answered(served: Served, headers: dict[str, str]) -> None:
    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        async with client.get(f"{url}/ws", headers=headers) as answer:
            assert answer.status in (400, 426)
            assert "open / in a browser" in await answer.text()

    served.visit(scene)
    assert served.errors.read_text() == ""


def test_the_page_uses_the_address_of_the_request(served: Served) -> None:
    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        async with client.get(url, headers={"Host": "127.0.0.1:9999"}) as page:  # a port forwarded by ssh
            assert 'websocket-url="ws://127.0.0.1:9999/ws"' in await page.text()

    served.visit(scene)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {
            "Host": "elsewhere.example",
            "Origin": "http://elsewhere.example",
        },  # another name that resolves to this address
        {"Host": "[nonsense"},
    ],
)
def test_requests_from_other_sites_are_rejected(served: Served, headers: dict[str, str]) -> None:
    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.ws_connect(f"{url}/ws", headers=headers)
        assert refused.value.status in (400, 403)
        async with client.get(url, headers=headers) as page:
            assert page.status in (400, 403)

    served.visit(scene)


def test_a_bundle_is_served_and_stopping_ends_the_sessions(tiny_bundle: Path, tmp_path: Path) -> None:
    """Served on all interfaces, with a warning; stopped during a session."""
    server = Served(tmp_path, "--host", "0.0.0.0", str(tiny_bundle), "--precision", "fp32")

    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        async with client.ws_connect(f"{url}/ws") as visit:
            await shown(visit, " · fp32")
            server.process.send_signal(signal.SIGINT)
            while (await visit.receive()).type not in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED):
                pass

    try:
        server.visit(scene)
        assert server.process.wait(PATIENCE) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)  # no process of the group is left
        lines = server.errors.read_text().splitlines()
        assert lines == [f"warning: anyone who can reach 0.0.0.0:{server.port} can use this chat and read its files"]
    finally:
        server.end()


def refused(folder: Path, *arguments: str) -> str:
    """The one-line error of a failing command."""
    command = [sys.executable, "-m", "llm_edge.tui", *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, env=environment(folder)
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    return done.stderr


def test_a_port_in_use_is_an_error(served: Served, tmp_path: Path) -> None:
    line = refused(tmp_path, "--serve", "--fake", "--port", str(served.port))
    assert line == (
        f"error: cannot listen on localhost:{served.port} (address already in use): choose another --port or --host\n"
    )


def test_an_invalid_address_is_an_error(tmp_path: Path) -> None:
    line = refused(tmp_path, "--serve", "--fake", "--host", "nowhere.invalid")
    assert line.startswith("error: --host nowhere.invalid: unknown address: ")


def test_a_fake_script_requires_a_screen(tmp_path: Path) -> None:
    assert refused(tmp_path, "--fake").startswith("error: --fake needs a terminal: ")
