"""Where this machine stands towards a host: `python launch/network.py HOST PORT`, for torchrun.sh.

Prints three words: whether HOST is this machine (true or false), this machine's address towards it,
and the network interface that has that address.
"""

from __future__ import annotations

import ipaddress
import socket
import sys

import psutil


def towards(host: str, port: int) -> tuple[bool, str, str]:
    """Whether `host` is this machine, and this machine's address and interface towards it.

    Raises:
        OSError: the name is not known, or no route leads there.
        LookupError: no interface has the address.
    """
    family, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    address = _source(family, target)
    mine = _bare(target[0]) == address  # a machine talks to itself from the address that it is asked at
    if ipaddress.ip_address(address).is_loopback:
        mine = True
        if host not in (
            "localhost",
            target[0],
        ):  # many machines have their own name at 127.0.1.1, which is no use to others
            address = _source(socket.AF_INET, ("192.0.2.1", port))  # RFC 5737: never anybody's
    for interface, known in psutil.net_if_addrs().items():
        if any(_bare(entry.address) == address for entry in known):
            return mine, address, interface
    raise LookupError(f"no interface of this machine has the address {address}, from which {host} would be reached")


def _source(family: int, target: tuple) -> str:
    """The address from which this machine talks to another."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # of a datagram socket: nothing is sent, but a route is chosen
        return _bare(probe.getsockname()[0])


def _bare(address: str) -> str:
    """Without the interface that a link-local address carries, as in fe80::1%eth0."""
    return address.partition("%")[0]


def main(host: str, port: str) -> None:
    try:
        mine, address, interface = towards(host, int(port))
    except (OSError, LookupError) as error:
        sys.exit(f"the host {host!r} cannot be reached from {socket.gethostname()}: {error}")
    print(str(mine).lower(), address, interface)


if __name__ == "__main__":
    main(*sys.argv[1:])
