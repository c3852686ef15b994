"""`pin`: resolves an upstream's host once, checks every address it has, and fixes the connection to one of them.

A name that resolves differently a moment later can therefore not lead a request, and its key, to another machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

import httpx2

from llm_edge.server.errors import ApiError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_RESOLVE_SECONDS = 10.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class PinnedUrl:
    """A URL whose host is an IP address.

    Attributes:
        url: where to connect to.
        host: value of the Host header.
        server_name: name that the certificate has to be valid for.
    """

    url: httpx2.URL
    host: str
    server_name: str


async def pin(url: str, *, allow_private: bool) -> PinnedUrl:
    """The URL with the host replaced by one of its addresses.

    Raises:
        ApiError: the name is unknown, or any of its addresses is not public and `allow_private` is false.
    """
    parsed = httpx2.URL(url)
    port = parsed.port or _PORTS[parsed.scheme]
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await loop.getaddrinfo(parsed.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        raise ApiError(502, f"the upstream's host {parsed.host} is unknown", "upstream_unreachable") from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        if not _is_allowed(address, allow_private=allow_private):
            message = f"the upstream's host {parsed.host} has an address that is not public: see allow_private"
            raise ApiError(502, message, "upstream_forbidden")
    if not addresses:
        raise ApiError(502, f"the upstream's host {parsed.host} has no address", "upstream_unreachable")
    return PinnedUrl(parsed.copy_with(host=str(addresses[0])), parsed.netloc.decode("ascii"), parsed.host)


def _is_allowed(address: Address, *, allow_private: bool) -> bool:
    address = _inner(address)
    if address.is_unspecified or address.is_multicast:
        return False
    return allow_private or address.is_global


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it stands for one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
