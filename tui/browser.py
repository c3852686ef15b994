"""The application in a browser, through textual-serve. Knows nothing of the application but the command that opens it.

textual-serve alone answers whoever asks. Here a page of another site, which a browser would let connect as well, is
refused; the page works under whatever address it was opened by, loads nothing from elsewhere, and goes when told to.
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
_HEAD = """<head>
    <meta name="viewport" content="width=device-width, initial-scale=1" />
    <script>
      addEventListener("load", () => {
        const looking = setInterval(() => {
          const keyboard = document.querySelector(".xterm-helper-textarea");
          if (keyboard) { keyboard.focus(); clearInterval(looking); }
        }, 50);
      });
    </script>"""  # telephones show it in their own size, and whoever types is heard without a click before


def is_local(host: str) -> bool:
    """Whether this name is one of this machine alone: `localhost`, `127.0.0.1`, `::1`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def refuse_taken(host: str, port: int) -> None:
    """Say in time that nobody can listen there.

    Raises:
        InputError: with the reason and the remedy.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: no such address: localhost is this machine, 0.0.0.0 all networks") from error
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as trial:
                if sys.platform != "win32":  # where it lets two programs share a port
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(address)
        except OSError as error:
            raise _taken(host, port, error) from error


class ChatServer(Server):
    """See the module.

    Args:
        command: opens the application, once for each visitor; for a shell.
        host, port: where to listen.
    """

    def __init__(self, command: str, host: str, port: int) -> None:
        super().__init__(command, host=host, port=port, title="llm-edge")
        self._visits: set[asyncio.Task[object]] = set()

    def initialize_logging(self) -> None:
        """Trouble alone, and none of what the variables held meanwhile."""
        logging.basicConfig(level=logging.WARNING, format="%(message)s")

    async def on_startup(self, app: web.Application) -> None:  # noqa: ARG002 (textual-serve's)
        """Say where it is."""
        where = f"[{self.host}]" if ":" in self.host else self.host
        print(f"http://{where}:{self.port}  Ctrl-C ends it", flush=True)

    async def on_shutdown(self, app: web.Application) -> None:  # noqa: ARG002 (textual-serve's)
        """End the visits; aiohttp would wait a minute for them."""
        visits = [*self._visits]
        for visit in visits:
            visit.cancel()
        await asyncio.gather(*visits, return_exceptions=True)

    async def handle_index(self, request: web.Request) -> web.Response:
        """The page, for the address by which it was asked for."""
        self._refuse_strangers(request)
        self.public_url = f"{request.scheme}://{request.host}"
        page = await super().handle_index(request)
        assert isinstance(page, web.Response)
        text = _LINK.sub(self._own, page.text or "")
        page.text = text.replace("<head>", _HEAD, 1)
        return page

    def _own(self, link: re.Match[str]) -> str:
        """A link to what lies here; none to a font, which a browser would ask its maker for."""
        return link[0] if link[1] == self.public_url else ""

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """A visit: keys come, the screen goes."""
        self._refuse_strangers(request)
        visit = asyncio.current_task()
        assert visit is not None
        self._visits.add(visit)
        try:
            return await super().handle_websocket(request)
        finally:
            self._visits.discard(visit)

    def _refuse_strangers(self, request: web.Request) -> None:
        """Another site's page says so in Origin; one that has its name lead to this machine says so in Host."""
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise web.HTTPForbidden(text="a page of another site may not open this chat")
        try:
            name = urlsplit(f"//{request.host}").hostname or ""
        except ValueError:  # no address at all
            name = ""
        if is_local(self.host) and not is_local(name):
            raise web.HTTPForbidden(text="this chat is for this machine: open it as localhost")


def serve(command: str, host: str, port: int) -> None:
    """Offer the application until Ctrl-C.

    Raises:
        InputError: nobody can listen there.
    """
    refuse_taken(host, port)
    if not is_local(host):
        print(f"warning: whoever reaches {host}:{port} may use this chat and read its files", file=sys.stderr)
    try:
        ChatServer(command, host, port).serve()
    except OSError as error:  # somebody else was faster
        raise _taken(host, port, error) from error


def _taken(host: str, port: int, error: OSError) -> InputError:
    reason = (error.strerror or str(error)).lower()
    return InputError(f"cannot listen on {host}:{port} ({reason}): give another --port or --host")
