"""At which of its addresses a machine can be reached, and over which interface of its network."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.training.errors import InputError, StorageError

ADDRESS_VARIABLE = "HOLDFAST_ADDRESS"
SIOCGIFCONF = 0x8912
IFREQ_BYTES = 40
MAX_INTERFACES = 256
REACH_S = 5.0
ANYWHERE = ("192.0.2.1", 9)  # of no machine: only asked which way it would be, nothing is sent


@dataclass(frozen=True)
class OwnAddress:
    """An address of this machine.

    Attributes:
        host: in numbers.
        port: that others are to come to; 0 lets the system choose.
        interface: of the network that it belongs to; None where that cannot be told.
    """

    host: str
    port: int
    interface: str | None


def own_address(environment: Mapping[str, str] = os.environ) -> OwnAddress:
    """Where other machines find this one: as HOLDFAST_ADDRESS says, else the way to anywhere.

    Raises InputError where what it says is no address of this machine.
    """
    told = environment.get(ADDRESS_VARIABLE, "")
    if not told:
        host = _towards(ANYWHERE) or next(iter(_outside()), "127.0.0.1")
        return OwnAddress(host, 0, interface_of(host))
    name, port = _parts(told)
    try:
        host = socket.gethostbyname(name)
    except OSError as error:
        raise InputError(f"{ADDRESS_VARIABLE}={told}: {name} is not known: {error}") from None
    if not _is_own(host):
        raise InputError(
            f"{ADDRESS_VARIABLE}={told} is no address of this machine; it has "
            f"{', '.join(f'{own} ({name})' for own, name in interfaces().items())}"
        )
    return OwnAddress(host, port, interface_of(host))


def address_towards(host: str, port: int) -> OwnAddress:
    """The address by which this machine comes to another one; HOLDFAST_ADDRESS where it is set."""
    if os.environ.get(ADDRESS_VARIABLE):
        return own_address()
    own = _towards((host, port)) or host
    return OwnAddress(own, 0, interface_of(own))


def listening_socket(address: OwnAddress) -> socket.socket:
    """A socket that others can come to, at this address alone. Raises InputError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InputError(
            f"machines cannot meet at {address.host}:{address.port}: {error.strerror}; name "
            f"another port, or none, in {ADDRESS_VARIABLE}=HOST:PORT"
        ) from None
    return listener


def interface_of(host: str) -> str | None:
    """The interface that has an address; None where none is known to."""
    if host.startswith("127."):
        host = "127.0.0.1"
    return interfaces().get(host)


def interfaces() -> dict[str, str]:
    """The interfaces of this machine by their IPv4 addresses; empty where Linux is not asked."""
    buffer = array.array("B", bytes(IFREQ_BYTES * MAX_INTERFACES))
    asked = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking.fileno(), SIOCGIFCONF, asked)
        except OSError:
            return {}
    num_bytes = struct.unpack("iP", answer)[0]
    found = {}
    for start in range(0, num_bytes, IFREQ_BYTES):
        entry = buffer[start : start + IFREQ_BYTES].tobytes()
        name = entry[:16].partition(b"\0")[0].decode().partition(":")[0]
        found[socket.inet_ntoa(entry[20:24])] = name
    return found


def require_reachable(host: str, port: int) -> None:
    """Raise StorageError where nothing at this address takes connections from here."""
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except OSError as error:
        raise unreachable(host, port, error.strerror or str(error)) from error


def unreachable(host: str, port: int, why: str) -> StorageError:
    """The error for a meeting place that does not answer."""
    return StorageError(
        f"{host}:{port}, where the machines of this run meet, cannot be reached: {why}; if that "
        f"machine lives, let all ports through between the machines, or name another of its "
        f"addresses in HOLDFAST_ADDRESS there"
    )


def _outside() -> list[str]:
    return [host for host in interfaces() if not host.startswith("127.")]


def _towards(place: tuple[str, int]) -> str | None:
    """The address by which packets would leave for a place; None where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(place)
        except OSError:
            return None
        return str(asking.getsockname()[0])


def _is_own(host: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trying:
        try:
            trying.bind((host, 0))
        except OSError:
            return False
    return True


def _parts(told: str) -> tuple[str, int]:
    name, colon, port = told.rpartition(":")
    if not colon:
        return told, 0
    if not name or not port.isdecimal() or int(port) > 65535:
        raise InputError(
            f"{ADDRESS_VARIABLE}={told} is no address: write a name or an IPv4 address, and with "
            f":PORT behind it also the port"
        )
    return name, int(port)
