"""A small Hugging Face Hub on 127.0.0.1: the routes that huggingface_hub's client requests, with a log.

Weights are sent like by the real Hub: the URL of a file redirects to a store on another host, here `localhost`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "1234567890abcdef1234567890abcdef12345678"
OTHER_COMMIT = "abcdefabcdefabcdefabcdefabcdefabcdefabcd"
_STORED = (".safetensors", ".bin", ".gguf", ".onnx")  # in the store, not in the Git repository


@dataclass
class Request:
    """One request as the server saw it; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class FakeHub:
    """Repositories, and simulated failures.

    Attributes:
        repos: name -> commit -> file name -> content.
        revisions: branch or tag -> commit, the same for all repositories.
        gated: repositories whose files require `token`.
        token: the access token.
        log: every request.
        cut: file name -> number of bytes after which sending it is interrupted.
        cuts: number of remaining interruptions.
        ranges: whether range requests are supported.
        status: sent for every request instead of the response.
        listed: additional entries of every list of files.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "refs/pr/1": OTHER_COMMIT})
    gated: set[str] = field(default_factory=set)
    token: str = "hf_opens"
    log: list[Request] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    cuts: Counter[str] = field(default_factory=Counter)
    ranges: bool = True
    status: int = 0
    body: bytes = b""
    listed: list[dict[str, Any]] = field(default_factory=list)
    silent: threading.Event | None = None

    def add(self, repo: str, files: Mapping[str, bytes | str], commit: str = COMMIT) -> None:
        """Put files into a repository."""
        content = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
        self.repos.setdefault(repo, {})[commit] = content

    def start(self) -> None:
        """Serve until `stop`."""
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """Close the port; may be called twice."""
        if self.silent:
            self.silent.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> list[str]:
        """Names of the files whose content was requested, in order."""
        wanted = [it.path for it in self.log if it.method == "GET" and ("/resolve/" in it.path or "/store/" in it.path)]
        return [urllib.parse.unquote(path.rpartition("/")[2]) for path in wanted]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each response waits 40 ms between headers and body

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.fake.log.append(Request(self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if self.fake.silent:
            self.fake.silent.wait(30)
            self.close_connection = True
        elif self.fake.status:
            self._answer(self.fake.status, self.fake.body)
        elif path.startswith("/store/"):
            _, _, repo_owner, repo_name, commit, name = path.split("/", 5)
            self._send_file(self.fake.repos[f"{repo_owner}/{repo_name}"][commit][name], name, {})
        else:
            self._hub(path)

    def _hub(self, path: str) -> None:
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/" if api else "/").split("/")
        repo = f"{owner}/{name}"
        if repo not in self.fake.repos:
            return self._fail(401, "RepoNotFound", "Repository not found")
        kind, revision, *names = [urllib.parse.unquote(part) for part in [*rest, "", ""]]
        commit = self.fake.revisions.get(revision or "main", revision)
        files = self.fake.repos[repo].get(commit)
        if files is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        closed = repo in self.fake.gated and self.headers.get("Authorization") != f"Bearer {self.fake.token}"
        if api and kind == "tree":
            entries = [self._entry(name, content) for name, content in files.items()]
            return self._answer(200, json.dumps(entries + self.fake.listed).encode())
        if api:
            siblings = [{"rfilename": name} for name in files]
            answer = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False}
            return self._answer(200, json.dumps(answer | {"tags": [], "downloads": 0, "likes": 0}).encode())
        if closed:
            return self._fail(403, "GatedRepo", f"Access to model {repo} is restricted")
        file = "/".join(part for part in names if part)
        if file not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        described = {"X-Repo-Commit": commit, "ETag": f'"{_etag(files[file])}"'}
        if not file.endswith(_STORED):
            return self._send_file(files[file], file, described)
        described |= {"X-Linked-Etag": described["ETag"], "X-Linked-Size": str(len(files[file]))}
        store = f"http://localhost:{self.fake.port}/store/{repo}/{commit}/{file}"
        return self._answer(302, b"", described | {"Location": store})

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(_STORED):
            entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 130}
        return entry

    def _send_file(self, content: bytes, name: str, headers: Mapping[str, str]) -> None:
        wanted, status = self.headers.get("Range"), 200
        if wanted and self.fake.ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content, status = content[start:], 206
        cut = None
        if self.command == "GET" and self.fake.cuts[name] > 0:
            self.fake.cuts[name] -= 1
            cut = self.fake.cut[name]
        self._answer(status, content, headers, cut)

    def _fail(self, status: int, code: str, message: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
