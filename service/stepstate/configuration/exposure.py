"""Which addresses other machines can reach, and what a server needs to listen there."""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address

from stepstate.config import ServerConfig, split_address
from stepstate.errors import InsecureAddress, ListenError


def check_exposure(config: ServerConfig, *, identities: bool) -> None:
    """Refuses an address that other machines reach, unless TLS and identities protect the sessions.

    The metrics' address is a switch of its own, on loopback unless it is set: what is there can be
    read only, and is of no session.

    Raises:
        InsecureAddress: with the ways out.
        ListenError: the address is none.
    """
    missing = [] if config.tls_cert else ["TLS"]
    missing += [] if identities else ["identities"]
    if missing and not config.insecure and not is_local(config.listen):
        raise InsecureAddress(config.listen, " and no ".join(missing))


def is_local(address: str) -> bool:
    """Whether only this machine reaches host:port: every address of the host is loopback.

    Raises:
        ListenError: the host has no address.
    """
    host, _ = split_address(address)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ListenError("--listen", address, str(error)) from error
    return all(_is_loopback(str(where[0])) for _, _, _, _, where in found)


def _is_loopback(text: str) -> bool:
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
