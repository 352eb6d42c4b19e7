"""The one address on which process 0 listens, and at which the others look for it."""

import contextlib
import errno
import ipaddress
import socket
import time

from genai_jax.config import ConfigError

_LOCAL_NAMES = ("localhost", "ip6-localhost", "ip6-loopback")
_BACKLOG = 1024  # a crowd of strangers should not keep a process waiting
_AFAR = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # nobody's: documentation


def addresses(host: str, port: int) -> list[tuple[int, str]]:
    """The family and IP address of everything that `host` stands for, in the system's order.

    Many systems list their own name as a loopback address, which other machines cannot reach: there
    it stands for the address of this machine instead, for the processes on this machine as well.

    Raises:
      OSError: the name is unknown.
    """
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    pairs = [(family, address[0]) for family, *_, address in entries]
    if _means_loopback(host):
        return pairs
    return [
        (family, (_is_loopback(ip) and source_address(family, _AFAR[family])) or ip)
        for family, ip in pairs
    ]


def source_address(family: int, ip: str) -> str | None:
    """The address of this machine on the network that leads to `ip`; None without such a network.

    Nothing is sent.
    """
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((ip, 9))
        return probe.getsockname()[0]
    return None


def listen(host: str, port: int, deadline: float) -> socket.socket:
    """A socket of process 0 that listens on the address of `host` alone.

    Behind address translation (a container with a published port) no interface has that address:
    then it is the address from which this machine would reach it.

    Raises:
      ConfigError: `host` stays unknown until the deadline, or the port is taken.
    """
    pairs = _wait_for_name(host, port, deadline)
    behind = [(family, source_address(family, ip)) for family, ip in pairs]
    problem = None
    for family, ip in [*pairs, *(pair for pair in behind if pair[1])]:
        try:
            return socket.create_server((ip, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            problem = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    raise ConfigError(
        f"process 0 cannot listen on port {port} of {host}, one above --distributed.coordinator: "
        f"{problem.strerror}"
    )


def _wait_for_name(host: str, port: int, deadline: float) -> list[tuple[int, str]]:
    """`addresses`, waiting for a cluster that publishes the names of its machines late."""
    while True:
        try:
            return addresses(host, port)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the host of --distributed.coordinator, {host}, is unknown: {error.strerror}"
                ) from None
            time.sleep(0.5)


def _means_loopback(host: str) -> bool:
    return host in _LOCAL_NAMES or host.endswith(".localhost") or _is_loopback(host)


def _is_loopback(ip: str) -> bool:
    try:
        return ipaddress.ip_address(ip).is_loopback
    except ValueError:
        return False
