"""Machines as network namespaces of this one: each with an address and a cable that can be cut."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest

CHUNK_BYTES = 2**16


@dataclass(frozen=True)
class Namespace:
    """One machine's network.

    Attributes:
        name: of the namespace.
        address: by which others find it.
        cable: the end of it that is plugged into the switch.
    """

    name: str
    address: str
    cable: str

    @property
    def prefix(self) -> list[str]:
        """What a command line that is to run there begins with."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """From now on nothing leaves this machine, and it is told to nobody."""
        _ip("link", "set", self.cable, "down")


@dataclass
class Network:
    """A switch that this machine is plugged into, too."""

    token: str = field(default_factory=lambda: secrets.token_hex(3))
    subnet: str = field(default_factory=lambda: f"10.77.{secrets.randbelow(254) + 1}")
    namespaces: list[Namespace] = field(default_factory=list)
    listeners: list[socket.socket] = field(default_factory=list)

    @property
    def switch(self) -> str:
        return f"hf{self.token}"

    @property
    def address(self) -> str:
        """Of this machine."""
        return f"{self.subnet}.254"

    def plug_in(self) -> Namespace:
        """One machine more."""
        number = len(self.namespaces) + 1
        name = f"{self.switch}n{number}"
        found = Namespace(name, f"{self.subnet}.{number}", f"{self.switch}c{number}")
        _ip("netns", "add", name)
        self.namespaces.append(found)
        _ip("link", "add", found.cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", found.cable, "master", self.switch, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{found.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return found

    def let_in(self, port: int) -> str:
        """A port of this machine's loopback, for those that are plugged in; its address."""
        listener = socket.create_server((self.address, port))
        self.listeners.append(listener)
        threading.Thread(target=_pass_on, args=(listener, port), daemon=True).start()
        return f"{self.address}:{port}"

    def open(self) -> None:
        _ip("link", "add", self.switch, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.switch)
        _ip("link", "set", self.switch, "up")

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        for namespace in self.namespaces:
            _ip("netns", "del", namespace.name)
        _ip("link", "del", self.switch)


@contextmanager
def network() -> Iterator[Network]:
    """A network without machines; the test is skipped where none can be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("namespaces of the network need root, and ip")
    built = Network()
    try:
        built.open()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network can be made here: {error.stderr}")
    try:
        yield built
    finally:
        built.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _pass_on(listener: socket.socket, port: int) -> None:
    with suppress(OSError):  # closed
        while True:
            here, _ = listener.accept()
            threading.Thread(target=_both_ways, args=(here, port), daemon=True).start()


def _both_ways(here: socket.socket, port: int) -> None:
    with here, suppress(OSError), socket.create_connection(("127.0.0.1", port)) as there:
        back = threading.Thread(target=_copy, args=(there, here), daemon=True)
        back.start()
        _copy(here, there)
        back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(CHUNK_BYTES):
            target.sendall(content)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
