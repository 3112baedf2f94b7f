"""Where a call comes from: the names of connections, and of the clients behind proxies.

gRPC names a connection such as "ipv4:127.0.0.1:51724". The clients of a proxy share its
connections: there, each client address that the proxy names in `x-forwarded-for` is a client. Only
trusted proxies are asked: anyone can send the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import unquote

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

_FORWARDED = "x-forwarded-for"
_BEHIND_PROXY = "forwarded"


def client_name(
    connection: str,
    metadata: Sequence[tuple[str, str | bytes]],
    trusted: tuple[Network, ...],
) -> str:
    """The name of the peer that a call is from.

    It is the last address of `x-forwarded-for` that is not itself a trusted proxy: what is before
    it the client may have written. Where no such address can be read, it is the connection.

    Args:
        connection: the name that gRPC has for it.
        metadata: of the call.
        trusted: networks of proxies.
    """
    if not _is_trusted(connection, trusted):
        return connection
    given = [str(value) for key, value in metadata if key == _FORWARDED]
    for text in reversed(",".join(given).split(",")):
        try:
            address = _plain(ip_address(text.strip()))
        except ValueError:
            return connection
        if not _within(address, trusted):
            return f"{_BEHIND_PROXY}:{address}"
    return connection


def network_of(client: str) -> str:
    """The address of a client by its name, or the network of IPv6 that one customer has.

    A client without an address, as of a unix socket, keeps its name.
    """
    scheme, _, rest = client.partition(":")
    address = ip_address(rest) if scheme == _BEHIND_PROXY else address_of(client)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address, 64), strict=False))
    return client if address is None else str(address)


@lru_cache(maxsize=4096)
def _is_trusted(connection: str, trusted: tuple[Network, ...]) -> bool:
    address = address_of(connection)
    return address is not None and _within(address, trusted)


def address_of(connection: str) -> Address | None:
    """The address in gRPC's name of a connection; None: it has none, as of a unix socket.

    The forms are "ipv4:1.2.3.4:5", "ipv6:[::1]:5" (with `%5B` and `%5D` for the brackets) and
    "unix:PATH" (grpc/doc/naming.md).
    """
    scheme, _, rest = connection.partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return None
    host = unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]  # without a zone
    try:
        return _plain(ip_address(host))
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    """IPv4 as such, also where a socket for both shows it as "::ffff:1.2.3.4"."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _within(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)
