"""The sockets that a server accepts its connections from."""

from __future__ import annotations

import errno
import socket

BACKLOG = 65_535
"""Connections that wait to be accepted; the kernel has a maximum of its own, net.core.somaxconn."""
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - what an operator may write
_NOT_HERE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def listen(address: str) -> list[socket.socket]:
    """Listens at host:port, as gRPC's C core does.

    A name is listened on at each address that it has, with one port for all, even if that is
    chosen by the system (port 0). Either of the wildcards 0.0.0.0 and [::] takes clients of IPv4
    and of IPv6. SO_REUSEPORT stays off: a second server at the same port is an error, where it
    would take a part of the connections unseen.

    Raises:
        RuntimeError: the address can't be read, or not listened on.
    """
    host, _, port = address.rpartition(":")
    try:
        return _listen(_resolve(host.strip("[]")), int(port))
    except (OSError, ValueError, OverflowError) as error:
        raise RuntimeError(f"{address}: {error}") from error


def _resolve(host: str) -> list[tuple[int, str]]:
    """The addresses of a host, each with its family."""
    if host in WILDCARDS and socket.has_dualstack_ipv6():
        return [(socket.AF_INET6, "::")]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, str(where[0])) for family, _, _, _, where in found))


def _listen(places: list[tuple[int, str]], port: int) -> list[socket.socket]:
    """Listens at all addresses that this machine has.

    Raises:
        OSError: at one of them it can't, or none is this machine's.
    """
    listeners: list[socket.socket] = []
    absent = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    for family, host in places:
        try:
            listeners.append(_bind(family, host, port))
            port = listeners[0].getsockname()[1]
        except OSError as error:
            if error.errno not in _NOT_HERE:
                for listener in listeners:
                    listener.close()
                raise
            absent = error
    if not listeners:
        raise absent
    return listeners


def _bind(family: int, host: str, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
