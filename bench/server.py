"""`python -m llm_edge.bench.server BUNDLE`: throughput of llm-serve with streaming clients, and Python's share.

Starts `llm-serve` on the bundle and lets 1, 4, 8 and 16 clients stream answers of the same length at the same time.
With `--llama-server`, the same clients ask llama-server with the same weights in turn, which is built at the first use;
with `--peer URL` any other server with OpenAI's API. `--drift MINUTES` then lets 16 clients ask llm-serve for so long.

Clients are coroutines of this process, so they use a part of the machine that both servers lose alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
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
_CONTEXT = 1024  # tokens of each slot of llama-server; questions and answers have about 200
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


def _body(beginning: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{beginning}. {_WORDS * 4}"}]
    return {"messages": messages, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}


async def together(server: Server, clients: int, salt: int) -> Sample:
    """Let clients stream at the same time; `salt` makes their prompts new, so that none is cached."""
    bodies = [_body(f"{salt} {number}") for number in range(clients)]
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


async def drift(server: Server, minutes: float) -> dict[str, Any]:
    """Let the largest number of clients ask for so long; returns answers, errors and the growth of memory.

    The growth is that of the median from the second to the last fifth of the time. One moment says little: slots take
    memory as their sequences grow and return it with the next one. The clients have four questions each, so the cache
    is full after the first fifth.
    """
    began, answers, errors, memory = time.monotonic(), 0, list[str](), list[int]()

    async def ask(client: int) -> None:
        nonlocal answers
        for number in itertools.count():
            if time.monotonic() - began > 60 * minutes:
                return
            try:
                await stream(server, _body(f"{client} {number % 4}"))
            except (MachineError, OSError, EOFError) as error:
                errors.append(str(error))
                await asyncio.sleep(1)
            else:
                answers += 1

    clients = [asyncio.create_task(ask(client)) for client in range(max(CLIENTS))]
    while time.monotonic() - began < 60 * minutes:
        memory.append(server.memory())
        await asyncio.sleep(minutes / 5)  # 300 times
    await asyncio.gather(*clients)
    fifth = len(memory) // 5
    settled = statistics.median(memory[fifth : 2 * fifth])
    growth = statistics.median(memory[-fifth:]) / settled - 1
    return {"minutes": minutes, "answers": answers, "errors": errors[:10], "memory": settled, "memory_growth": growth}


@contextlib.contextmanager
def _llama_server(options: argparse.Namespace, threads: int) -> Iterator[Server]:
    """llama-server with the weights that the bundle was exported from."""
    from llm_edge.bench.peers.llama_server import built, quantized, running
    from llm_edge.bench.peers.run import source_of
    from llm_edge.runtime.bundle import Bundle

    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    weights = source_of([options.source] if options.source else [], Bundle.open(options.bundle)).gguf
    programs = built(work, lambda text: print(text, file=sys.stderr, flush=True))
    model = quantized(programs, weights, options.format, work)
    with running(programs, model, threads, max(CLIENTS), _CONTEXT) as (url, process):
        yield Server(url, "default", process)


def _bench(options: argparse.Namespace) -> None:
    threads, endurance = options.threads, None
    if options.llama_server and threads is None:  # the same for both
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(served(options.bundle.resolve(), options.precision, threads))
        servers = {"llm-serve": ours}
        if options.llama_server:
            servers["llama-server"] = stack.enter_context(_llama_server(options, threads))
        if options.peer is not None:
            servers["peer"] = Server(options.peer.rstrip("/"), options.peer_model)
        found = measure(servers, options.rounds)
        if options.drift:
            endurance = asyncio.run(drift(ours, options.drift))
    report = {name: {clients: summary(each) for clients, each in samples.items()} for name, samples in found.items()}
    _print_table(report)
    if endurance is not None:
        print(
            f"{endurance['minutes']:g} minutes of {max(CLIENTS)} clients: {endurance['answers']:,} answers, "
            f"{len(endurance['errors'])} errors, memory {endurance['memory_growth']:+.1%}"
        )
    document = {"bundle": options.bundle.name, "precision": options.precision, "machine": machine(), "tokens": TOKENS}
    document |= {"threads": threads, "rounds": options.rounds, "servers": report, "drift": endurance}
    print(json.dumps(document))


def _print_table(report: dict[str, dict[int, dict[str, float | None]]]) -> None:
    print(f"{'':12} {'clients':>7} {'tok/s':>8} {'first token, p95':>17} {'Python':>7}")
    for name, by_clients in report.items():
        for clients, figures in by_clients.items():
            share = "" if figures["python_share"] is None else f"{figures['python_share']:.1%}"
            rate, first = figures["tokens_per_second"], figures["first_token_p95_s"]
            print(f"{name:12} {clients:7} {rate:8,.0f} {first:15.2f} s {share:>7}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m llm_edge.bench.server", description="Measures llm-serve.")
    parser.add_argument("bundle", type=Path, help="bundle folder from llm-export")
    parser.add_argument("--precision", help="default: int8, if available")
    parser.add_argument("--threads", type=int, help="per operator; default: physical cores")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each; medians are reported")
    parser.add_argument("--llama-server", action="store_true", help="measure llama-server too; built at the first use")
    parser.add_argument("--source", type=Path, help="GGUF that the bundle was exported from; default: SmolLM2's")
    parser.add_argument("--format", default="Q8_0", help="of the weights in llama-server; default: Q8_0")
    parser.add_argument("--work", type=Path, default=Path(".peers"), help="folder for llama-server")
    parser.add_argument("--peer", metavar="URL", help="another server with OpenAI's API, such as http://127.0.0.1:8080")
    parser.add_argument("--peer-model", metavar="NAME", default="default", help="the model that it serves")
    parser.add_argument("--drift", type=float, default=0.0, metavar="MINUTES", help="then look for growth of memory")
    options = parser.parse_args()
    sys.exit(run(lambda: _bench(options), native_output=True))


if __name__ == "__main__":
    main()
