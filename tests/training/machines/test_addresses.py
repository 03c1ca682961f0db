"""At which address a machine is found, and what is said where that cannot be."""

from __future__ import annotations

import socket

import pytest

from holdfast.training.errors import InputError, StorageError
from holdfast.training.machines.addresses import (
    ADDRESS_VARIABLE,
    OwnAddress,
    address_towards,
    interface_of,
    interfaces,
    listening_socket,
    own_address,
    require_reachable,
)


def test_a_named_address_is_taken_with_its_port_and_interface() -> None:
    assert own_address({ADDRESS_VARIABLE: "127.0.0.3"}) == OwnAddress("127.0.0.3", 0, "lo")
    named = own_address({ADDRESS_VARIABLE: "localhost:4567"})
    assert named == OwnAddress("127.0.0.1", 4567, "lo")


def test_without_a_name_it_is_one_of_this_machine() -> None:
    found = own_address({})
    assert interface_of(found.host) == found.interface
    with listening_socket(found) as listener:
        require_reachable(*listener.getsockname())


def test_towards_another_machine_it_is_the_one_of_that_network() -> None:
    assert interfaces()["127.0.0.1"] == "lo"
    assert address_towards("127.0.0.1", 1) == OwnAddress("127.0.0.1", 0, "lo")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("192.0.2.7", "192.0.2.7 is no address of this machine; it has 127.0.0.1 (lo)"),
        ("no.such.machine.invalid", "no.such.machine.invalid is not known"),
        ("127.0.0.1:99999", "is no address: write a name or an IPv4 address"),
        (":4567", "is no address: write a name or an IPv4 address"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(named: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        own_address({ADDRESS_VARIABLE: named})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: Address already in use; name"):
            listening_socket(OwnAddress("127.0.0.1", port, "lo"))


def test_a_place_where_nobody_is_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StorageError, match=f"127.0.0.1:{port}, where the machines of this run"):
        require_reachable("127.0.0.1", port)
