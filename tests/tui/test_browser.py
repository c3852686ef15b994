"""`llm-chat --serve`: the page, the application behind it, and who may not have it."""

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

PATIENCE = 60  # seconds until a test that waits for a program gives up
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
    """A server in a process group of its own."""

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
        self.said = self.process.stdout.readline().decode()
        assert self.said, self.errors.read_text()

    def visit(self, scene: Callable[[aiohttp.ClientSession, str], Awaitable[None]]) -> None:
        """Play a scene against the page's address."""

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
    """Its line is written a moment before it listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert time.monotonic() < deadline, "nobody listens"
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
    """What the application writes until it has written this; how that is coloured and placed is left out."""
    written = ""
    while wanted not in (plain := _SEQUENCE.sub("", written)):
        message = await socket.receive()
        assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), (message, written)
        written += message.data.decode() if message.type == aiohttp.WSMsgType.BINARY else ""
    return plain


def test_a_visit(served: Served) -> None:
    assert served.said == f"http://localhost:{served.port}  Press Ctrl-C to stop.\n"

    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        async with client.get(url) as page:
            assert page.status == 200
            text = await page.text()
        assert "llm-edge" in text
        assert f'data-session-websocket-url="ws://localhost:{served.port}/ws"' in text
        assert {*re.findall(r'(?:href|src)="(https?://[^/"]+)', text)} == {url}  # nothing comes from elsewhere
        (style,) = re.findall(r'rel="stylesheet"\s+href="([^"]+)"', text)  # without which clicks go astray
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


def test_the_page_follows_the_address_it_was_asked_by(served: Served) -> None:
    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        async with client.get(url, headers={"Host": "127.0.0.1:9999"}) as page:  # a port forwarded by ssh
            assert 'websocket-url="ws://127.0.0.1:9999/ws"' in await page.text()

    served.visit(scene)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Host": "elsewhere.example", "Origin": "http://elsewhere.example"},  # a name that leads here
        {"Host": "[nonsense"},
    ],
)
def test_pages_of_other_sites_do_not_reach_it(served: Served, headers: dict[str, str]) -> None:
    async def scene(client: aiohttp.ClientSession, url: str) -> None:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.ws_connect(f"{url}/ws", headers=headers)
        assert refused.value.status in (400, 403)
        async with client.get(url, headers=headers) as page:
            assert page.status in (400, 403)

    served.visit(scene)


def test_a_bundle_is_shown_and_the_end_ends_the_visits(tiny_bundle: Path, tmp_path: Path) -> None:
    """Where it is open to the network, which is told; ended while somebody is there."""
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
            os.killpg(server.process.pid, 0)  # nobody of the group is left
        lines = server.errors.read_text().splitlines()
        assert lines == [f"warning: anyone who can reach 0.0.0.0:{server.port} can use this chat and read its files"]
    finally:
        server.end()


def refused(folder: Path, *arguments: str) -> str:
    """The one line of a command that is refused."""
    command = [sys.executable, "-m", "llm_edge.tui", *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, env=environment(folder)
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    return done.stderr


def test_a_port_that_is_taken(served: Served, tmp_path: Path) -> None:
    line = refused(tmp_path, "--serve", "--fake", "--port", str(served.port))
    assert line == (
        f"error: cannot listen on localhost:{served.port} (address already in use): choose another --port or --host\n"
    )


def test_an_address_that_is_none(tmp_path: Path) -> None:
    line = refused(tmp_path, "--serve", "--fake", "--host", "nowhere.invalid")
    assert line.startswith("error: --host nowhere.invalid: unknown address: ")


def test_a_script_needs_a_screen(tmp_path: Path) -> None:
    assert refused(tmp_path, "--fake").startswith("error: --fake needs a terminal: ")
