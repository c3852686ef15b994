"""`python -m llm_edge.bench.server BUNDLE`: throughput of llm-serve with streaming clients, and Python's share.

Starts `llm-serve` on the bundle and lets 1, 4, 8 and 16 clients stream answers of the same length at the same time.
With `--peer URL`, the same clients ask another server with OpenAI's API in turn, such as llama-server with the same
weights.

Clients are coroutines of this process, so they use a part of the machine that both servers lose alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm_edge.bench.cli import machine
from llm_edge.runtime.command import run
from llm_edge.runtime.errors import MachineError

CLIENTS = (1, 4, 8, 16)
TOKENS = 96
ROUNDS = 3
_WORDS = "The history of the city begins with a small harbour at the mouth of a river, where ships from the north met. "


@dataclass(frozen=True, slots=True)
class Sample:
    """Streams that ran at the same time.

    Attributes:
        rate: tokens/s of all together, from the first request to the last token.
        first: seconds to the first token, of each.
        share: of the time that the server spent outside of onnxruntime; None if it does not report it.
    """

    rate: float
    first: Sequence[float]
    share: float | None


@dataclass(frozen=True, slots=True)
class Server:
    """A server to measure: its address, the model that requests name, and its process, if it was started here."""

    url: str
    model: str
    process: int = 0

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes of the process, as Linux reports them in /proc; `VmHWM` = the largest number so far."""
        lines = Path(f"/proc/{self.process}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))

    def run_seconds(self) -> float | None:
        """Time spent inside onnxruntime so far, as llm-serve reports it."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:  # noqa: S310
            lines = reply.read().decode().splitlines()
            values = [line.rpartition(" ")[2] for line in lines if line.startswith("llm_edge_run_seconds_total{")]
            return sum(map(float, values)) if values else None
        return None


async def stream(server: Server, body: dict[str, Any]) -> tuple[float, float]:
    """Stream an answer; returns the moments of its first token and of its end.

    Raises:
        MachineError: the server did not answer with a stream.
    """
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)
    try:
        content = json.dumps({"model": server.model, "stream": True, **body}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise MachineError(f"{server.url}: {status.decode(errors='replace').strip()}")
        first = 0.0
        async for line in reader:
            if not first and b'"content":"' in line.replace(b": ", b":") and b'"content":""' not in line:
                first = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                break
        return first or time.perf_counter(), time.perf_counter()
    finally:
        writer.close()


async def together(server: Server, clients: int, salt: int) -> Sample:
    """Let clients stream at the same time; `salt` makes their prompts new, so that none is cached."""
    bodies = [
        {
            "messages": [{"role": "user", "content": f"{salt} {number}. {_WORDS * 4}"}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
        for number in range(clients)
    ]
    inside, began = server.run_seconds(), time.perf_counter()
    moments = await asyncio.gather(*(stream(server, body) for body in bodies))
    seconds = max(end for _, end in moments) - began
    after = server.run_seconds()
    share = 1 - (after - inside) / seconds if inside is not None and after is not None else None
    return Sample(clients * TOKENS / seconds, [first - began for first, _ in moments], share)


@contextlib.contextmanager
def served(bundle: Path, precision: str | None, threads: int | None, parallel: int = max(CLIENTS)) -> Iterator[Server]:
    """`llm-serve` on the folder of a bundle, until the block ends."""
    command = [sys.executable, "-m", "llm_edge.server", "--models", str(bundle.parent), "--model", bundle.name]
    command += ["--port", "0", "--parallel", str(parallel), "--log-level", "error"]
    command += ["--precision", precision] if precision else []
    command += ["--threads", str(threads)] if threads else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " on http://" not in line:
            raise MachineError(f"llm-serve did not start (exit code {process.wait()})")
        yield Server(line.split()[-1], bundle.name, process.pid)
    finally:
        process.terminate()
        process.wait()


def measure(servers: dict[str, Server], rounds: int) -> dict[str, dict[int, list[Sample]]]:
    """Samples of each server and number of clients, in turn, so that all see the same load."""
    found: dict[str, dict[int, list[Sample]]] = {name: {clients: [] for clients in CLIENTS} for name in servers}
    for server in servers.values():
        asyncio.run(together(server, max(CLIENTS), 0))  # loads the model and allocates the buffers
    for number in range(rounds):
        for clients in CLIENTS:
            for name, server in servers.items():
                found[name][clients].append(asyncio.run(together(server, clients, 1 + number * 100 + clients)))
    return found


def summary(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Median throughput, 95th percentile of the time to the first token, and median share of Python."""
    first = sorted(value for sample in samples for value in sample.first)
    shares = [sample.share for sample in samples if sample.share is not None]
    return {
        "tokens_per_second": statistics.median(sample.rate for sample in samples),
        "first_token_p95_s": first[min(len(first) - 1, int(0.95 * len(first)))],
        "python_share": statistics.median(shares) if shares else None,
    }


def _bench(options: argparse.Namespace) -> None:
    with served(options.bundle.resolve(), options.precision, options.threads) as ours:
        servers = {"llm-serve": ours}
        if options.peer is not None:
            servers["peer"] = Server(options.peer.rstrip("/"), options.peer_model)
        found = measure(servers, options.rounds)
    report = {name: {clients: summary(each) for clients, each in samples.items()} for name, samples in found.items()}
    print(f"{'':10} {'clients':>7} {'tok/s':>8} {'first token, p95':>17} {'Python':>7}")
    for name, by_clients in report.items():
        for clients, figures in by_clients.items():
            share = "" if figures["python_share"] is None else f"{figures['python_share']:.1%}"
            rate, first = figures["tokens_per_second"], figures["first_token_p95_s"]
            print(f"{name:10} {clients:7} {rate:8,.0f} {first:15.2f} s {share:>7}")
    document = {"bundle": options.bundle.name, "precision": options.precision, "machine": machine(), "tokens": TOKENS}
    print(json.dumps({**document, "rounds": options.rounds, "servers": report}))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m llm_edge.bench.server", description="Measures llm-serve.")
    parser.add_argument("bundle", type=Path, help="bundle folder from llm-export")
    parser.add_argument("--precision", help="default: int8, if available")
    parser.add_argument("--threads", type=int, help="per operator; default: physical cores")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each; medians are reported")
    parser.add_argument("--peer", metavar="URL", help="another server with OpenAI's API, such as http://127.0.0.1:8080")
    parser.add_argument("--peer-model", metavar="NAME", default="default", help="the model that it serves")
    options = parser.parse_args()
    sys.exit(run(lambda: _bench(options), native_output=True))


if __name__ == "__main__":
    main()
