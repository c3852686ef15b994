"""Attacks llm-serve with clients that leave, never read, never finish a request, or send too much.

    python tests/stress/server.py [ROUNDS]

The server is a process with a tiny model of its own. The output is a table and, as its last line, one JSON document.
The exit code is 1 if a slot was not freed, a neighbour's answer changed, or a limit below was exceeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path[:0] = [str(Path(__file__).parents[1] / "support")]

from tool_templates import TEMPLATES, export_with  # noqa: E402

from llm_edge.bench.cli import machine  # noqa: E402
from llm_edge.bench.server import Server, served, stream  # noqa: E402

ROUNDS = 34  # of three disconnects each
SILENT, HALF_OPEN = 20, 200
PROBES = 100
MAX_FREED = 1.0  # seconds until a slot is free, with the time that a look at the counters takes
MAX_MEMORY = 20_000_000  # bytes more while a body of 300 MB arrives
MAX_TOOLS = 1.0  # seconds that 60 tools may delay the first token
ANSWER = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}
ASKED = [{"role": "user", "content": "Who are you?"}]
LONG = [{"role": "user", "content": "word and " * 3000}]
# Names the tools only, since prompts of their 100 kB would measure the model.
TEMPLATE = TEMPLATES["hermes"].replace("(tools | tojson)", "(tools | length | string)")


class Client:
    """A connection that has sent a request and may be closed at any moment."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def asking(cls, server: Server, receive_buffer: int = 1 << 20, **body: Any) -> Client:
        address = urlsplit(server.url)
        connection = socket.create_connection((address.hostname or "", address.port or 80))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer)
        content = json.dumps({"model": server.model, "stream": True, **body}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        return cls(reader, writer)

    async def texts(self) -> AsyncIterator[str]:
        """The text of each event."""
        async for line in self.reader:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                yield choices[0]["delta"].get("content") or "" if choices else ""
            elif line.startswith(b"data: [DONE]"):
                return

    def leave(self) -> None:
        self.writer.transport.abort()


async def counters(server: Server) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
            return str(reply.read().decode())

    lines = [line for line in (await asyncio.to_thread(read)).splitlines() if not line.startswith("#")]
    return {line.partition("{")[0].removeprefix("llm_edge_"): float(line.rpartition(" ")[2]) for line in lines}


async def until(server: Server, condition: Callable[[dict[str, float]], bool], patience: float = 30.0) -> float:
    """Wait for a state of the counters; returns the seconds."""
    began = time.perf_counter()
    while not condition(await counters(server)):
        if time.perf_counter() - began > patience:
            raise SystemExit(f"a slot was not freed within {patience:.0f} s")
    return time.perf_counter() - began


async def disconnects(server: Server, rounds: int) -> dict[str, Any]:
    """Clients leave while queued, in decode and in prefill, next to one that stays; the server has two slots."""

    async def whole() -> str:
        client = await Client.asking(server, messages=ASKED, **ANSWER)
        text = "".join([text async for text in client.texts()])
        client.leave()
        return text

    async def neighbour() -> list[str]:
        return [await whole() for _ in iter(lambda: stopped, True)]

    wanted, stopped = await whole(), False
    endless = {**ANSWER, "max_tokens": 30_000}
    texts = asyncio.create_task(neighbour())
    freed: dict[str, list[float]] = {"queued": [], "decode": [], "prefill": []}
    for _ in range(rounds):
        first = await Client.asking(server, messages=ASKED, **endless)
        async for _text in first.texts():
            break
        second = await Client.asking(server, messages=ASKED, **endless)
        await until(server, lambda now: now["waiting"] >= 1)
        second.leave()
        freed["queued"].append(await until(server, lambda now: now["waiting"] == 0))
        first.leave()
        freed["decode"].append(await until(server, lambda now: now["active"] <= 1))
        third = await Client.asking(server, messages=LONG, **endless)
        await until(server, lambda now: now["active"] == 2)
        third.leave()
        freed["prefill"].append(await until(server, lambda now: now["active"] <= 1))
    stopped = True
    answers = await texts
    return {
        "disconnects": 3 * rounds,
        "freed_s": {phase: max(seconds) for phase, seconds in freed.items()},
        "neighbour_answers": len(answers),
        "neighbour_changed": sum(answer != wanted for answer in answers),
    }


async def first_tokens(server: Server, count: int, **body: Any) -> list[float]:
    """Seconds to the first token of requests one after the other, ascending."""
    found = []
    for number in range(count):
        began = time.perf_counter()
        messages = [{"role": "user", "content": f"Question {number}"}]
        first, _ = await stream(server, {"messages": messages, "max_tokens": 4, "temperature": 0, **body})
        found.append(first - began)
    return sorted(found)


def p95(values: list[float]) -> float:
    return values[int(0.95 * len(values))]


async def bad_clients(server: Server) -> dict[str, Any]:
    """Clients that never read and connections that never send a whole request."""
    await first_tokens(server, PROBES)
    idle = p95(await first_tokens(server, PROBES))
    large = {**ANSWER, "max_tokens": 1500, "logprobs": True, "top_logprobs": 10}  # more than the sockets take
    silent = [await Client.asking(server, receive_buffer=4096, messages=ASKED, **large) for _ in range(SILENT)]
    address, half = urlsplit(server.url), []
    for _ in range(HALF_OPEN):
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        half.append(writer)
    await until(server, lambda now: now["active"] == now["waiting"] == 0, 600)  # nobody reads, and slots are free again
    busy = p95(await first_tokens(server, PROBES))
    for writer in [*half, *(client.writer for client in silent)]:
        writer.transport.abort()
    return {"first_token_p95_s": {"idle": idle, "with_bad_clients": busy}}


async def large_body(server: Server) -> dict[str, Any]:
    """Send a body of 300 MB in chunks, whose size is not announced."""
    before = server.memory()
    most, status, piece = before, b"", b" " * (1 << 20)
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode())
    with contextlib.suppress(ConnectionError):
        for _ in range(300):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            most = max(most, server.memory())
    with contextlib.suppress(ConnectionError):
        status = await reader.readline()
    writer.transport.abort()
    most = max(most, server.memory())
    return {"large_body": {"status": status.decode().strip(), "memory": most - before}}


async def many_tools(server: Server) -> dict[str, Any]:
    """The first token with 60 tools of 100 kB altogether, and without."""
    properties = {f"field_{number}": {"type": "string", "description": "d" * 220} for number in range(6)}
    parameters = {"type": "object", "properties": properties, "required": ["field_0"]}
    tools = [{"type": "function", "function": {"name": f"tool_{n}", "parameters": parameters}} for n in range(60)]
    without = await first_tokens(server, 10)
    with_tools = await first_tokens(server, 10, tools=tools)
    size = len(json.dumps(tools))
    return {
        "tools": {
            "bytes": size,
            "first_token_s": {"without": without[5], "with": with_tools[5], "most": with_tools[-1]},
        }
    }


def report(found: dict[str, Any]) -> int:
    """Print the figures; returns how many exceed their limit."""

    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1000:.0f} ms"

    slow, body, tools = found["first_token_p95_s"], found["large_body"], found["tools"]["first_token_s"]
    rows = [
        (f"a slot is free after a client leaves, {phase} (most)", milliseconds(seconds), seconds <= MAX_FREED)
        for phase, seconds in found["freed_s"].items()
    ]
    changed, answers = found["neighbour_changed"], found["neighbour_answers"]
    rows.append(
        (f"{found['disconnects']} disconnects: changed answers of a neighbour", f"{changed} of {answers}", not changed)
    )
    rows.append(("first token, p95", milliseconds(slow["idle"]), True))
    what = f"first token, p95, next to {SILENT} clients that never read and {HALF_OPEN} half-open connections"
    rows.append((what, milliseconds(slow["with_bad_clients"]), slow["with_bad_clients"] <= 2 * slow["idle"]))
    memory = f"{body['memory'] / 1e6:.1f} MB"
    rows.append((f"memory for a body of 300 MB ({body['status']})", memory, body["memory"] < MAX_MEMORY))
    late = tools["most"] - tools["without"]
    what = f"first token with 60 tools of {found['tools']['bytes'] // 1000} kB, later than without (most)"
    rows.append((what, milliseconds(late), late <= MAX_TOOLS))
    for text, value, fine in rows:
        print(f"{text:95} {value:>12}{'' if fine else '  too much'}")
    return sum(not fine for *_, fine in rows)


def main(rounds: int) -> int:
    """Run all attacks; returns the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_with(TEMPLATE, folder / "models" / "tiny", folder / "source", max_position_embeddings=32_768)
        with served(folder / "models" / "tiny", "fp32", 1, parallel=2) as server:
            found = asyncio.run(disconnects(server, rounds))
        with served(folder / "models" / "tiny", "fp32", 1, parallel=8) as server:
            for attack in (bad_clients, large_body, many_tools):
                found |= asyncio.run(attack(server))
    wrong = report(found)
    print(json.dumps({"machine": machine(), **found}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
