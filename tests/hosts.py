"""Several hosts on one machine, for tests of launchers: network namespaces on a bridge.

They share the machine's files, as nodes share a network file system, and nothing of its network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace, with its address on the bridge that it shares with the others."""

    name: str
    address: str

    def start(
        self, command: list[str], log: Path, cwd: Path, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command here, in a session of its own, with both outputs in a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, start_new_session=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip

    def processes(self) -> list[int]:
        """The processes that run here, oldest first."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return sorted(int(number) for number in found.stdout.split())


def why_not() -> str | None:
    """Why this machine cannot make hosts; None where it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Create hosts from address 10.77.0.1 on; at exit, kill what runs there and remove them."""
    bridge = "eth0"  # the first host's interface; it is in that namespace alone, so that two tests may run at once
    made = [Host(f"host{os.getpid()}x{number}", f"10.77.0.{number}") for number in range(1, count + 1)]
    try:
        for host in made:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", made[0].name, "link", "add", bridge, "type", "bridge")
        _ip("-n", made[0].name, "link", "set", bridge, "up")
        _ip("-n", made[0].name, "address", "add", f"{made[0].address}/24", "dev", bridge)
        for number, host in enumerate(made[1:], 2):
            port = f"port{number}"
            _ip("-n", made[0].name, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("-n", made[0].name, "link", "set", port, "master", bridge, "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
        yield made
    finally:
        for host in made:
            subprocess.run(f"ip netns pids {host.name} | xargs -r kill -9", shell=True, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "delete", host.name], stderr=subprocess.DEVNULL)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
