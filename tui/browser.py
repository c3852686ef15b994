"""`serve`: serves the chat to browsers through textual-serve.

textual-serve accepts every request. This server rejects pages of other sites, works under any address it is opened by,
loads nothing from other hosts, and ends promptly.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import sys
from urllib.parse import urlsplit

from aiohttp import web
from textual_serve.server import Server

from llm_edge.runtime.errors import InputError

_LINK = re.compile(r'<link\b[^>]*href="(https?://[^/"]+)[^>]*>')
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' "
    "rx='4' fill='%2323395b'/%3E%3Cpath d='M4 5h8M4 8h6M4 11h4' stroke='%23e8eef7' stroke-width='1.6'/%3E%3C/svg%3E"
)
# A title and an icon; a font that leaves enough columns on phones; and focus for the terminal once it is connected.
# textual-serve's page sends the focus and the size to its socket, which fails while it is still connecting.
_HEAD = f"""<head>
    <title>llm-edge</title>
    <link rel="icon" href="{_ICON}" />
    <meta name="viewport" content="width=device-width, initial-scale=1" />
    <script>
      const send = WebSocket.prototype.send;
      WebSocket.prototype.send = function (data) {{
        if (this.readyState === WebSocket.OPEN) send.call(this, data);
      }};
      addEventListener("DOMContentLoaded", () => {{
        const fontSize = new URLSearchParams(location.search).get("fontsize");
        if (innerWidth < 600 && !fontSize) document.getElementById("terminal").dataset.fontSize = "12";
      }});
      addEventListener("load", () => {{
        const looking = setInterval(() => {{
          const keyboard = document.querySelector(".textual-terminal.-connected .xterm-helper-textarea");
          if (keyboard) {{ keyboard.focus(); clearInterval(looking); }}
        }}, 50);
      }});
    </script>"""


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine's loopback: `localhost`, `127.0.0.1`, `::1`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def refuse_taken(host: str, port: int) -> None:
    """Check that the address can be used.

    Raises:
        InputError: it is unknown or in use.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host}: unknown address: use localhost for this machine, 0.0.0.0 for all networks"
        ) from error
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as trial:
                if sys.platform != "win32":  # where it would let two programs share a port
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(address)
        except OSError as error:
            raise _taken(host, port, error) from error


class ChatServer(Server):
    """A textual-serve server that runs a shell command for each visitor, and rejects requests of other sites."""

    def __init__(self, command: str, host: str, port: int) -> None:
        super().__init__(command, host=host, port=port, title="llm-edge")
        self._visits: set[asyncio.Task[object]] = set()

    def initialize_logging(self) -> None:
        """Log warnings only, without local variables."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s")

    async def on_startup(self, app: web.Application) -> None:  # noqa: ARG002 (textual-serve's)
        """Print the address."""
        where = f"[{self.host}]" if ":" in self.host else self.host
        print(f"http://{where}:{self.port}  Press Ctrl-C to stop.", flush=True)

    async def on_shutdown(self, app: web.Application) -> None:  # noqa: ARG002 (textual-serve's)
        """Close open connections; aiohttp would wait a minute for them."""
        visits = [*self._visits]
        for visit in visits:
            visit.cancel()
        await asyncio.gather(*visits, return_exceptions=True)

    async def handle_index(self, request: web.Request) -> web.Response:
        """Serve the page for the address that was requested."""
        self._reject_other_sites(request)
        self.public_url = f"{request.scheme}://{request.host}"
        page = await super().handle_index(request)
        assert isinstance(page, web.Response)
        text = _LINK.sub(self._own, page.text or "")
        page.text = text.replace("<head>", _HEAD, 1)
        return page

    def _own(self, link: re.Match[str]) -> str:
        """Keep links to this server, and drop those to other hosts, such as fonts."""
        return link[0] if link[1] == self.public_url else ""

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Handle the connection of one visitor."""
        self._reject_other_sites(request)
        if not web.WebSocketResponse().can_prepare(request).ok:
            raise web.HTTPUpgradeRequired(
                text="this address is for the page's connection: open / in a browser", headers={"Upgrade": "websocket"}
            )
        visit = asyncio.current_task()
        assert visit is not None
        self._visits.add(visit)
        try:
            return await super().handle_websocket(request)
        finally:
            self._visits.discard(visit)

    def _reject_other_sites(self, request: web.Request) -> None:
        """Reject pages of other sites by the Origin header, and DNS rebinding by the Host header."""
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise web.HTTPForbidden(text="requests of other sites are not allowed")
        try:
            name = urlsplit(f"//{request.host}").hostname or ""
        except ValueError:  # an invalid one
            name = ""
        if is_local(self.host) and not is_local(name):
            raise web.HTTPForbidden(text="only available on this machine: open it as localhost")


def serve(command: str, host: str, port: int) -> None:
    """Serve the application until Ctrl-C.

    Raises:
        InputError: the address cannot be used.
    """
    refuse_taken(host, port)
    if not is_local(host):
        print(f"warning: anyone who can reach {host}:{port} can use this chat and read its files", file=sys.stderr)
    try:
        ChatServer(command, host, port).serve()
    except OSError as error:  # another program was faster
        raise _taken(host, port, error) from error


def _taken(host: str, port: int, error: OSError) -> InputError:
    reason = (error.strerror or str(error)).lower()
    return InputError(f"cannot listen on {host}:{port} ({reason}): choose another --port or --host")
