"""Network cards of a command line: other addresses, networks that lead nowhere, what only one machine can have."""

from __future__ import annotations

import pytest

from blkckpt.restore import machine
from blkckpt.vm import network

OLD, NEW = bytes.fromhex("525400000001"), bytes.fromhex("0200000000aa")


def readdressed(text: str, known: dict[bytes, bytes]) -> tuple[str, tuple[str, ...]]:
    words, kept = network.readdress(["qemu", *text.split()], known, lambda old: b"\x02" + old[1:])
    return " ".join(words[1:]), kept


@pytest.mark.parametrize(("given", "wanted"), [
    ("-device e1000,netdev=n,mac=52:54:00:00:00:01", "-device e1000,netdev=n,mac=02:00:00:00:00:aa"),
    ("-device e1000,netdev=n,mac=52-54-0-0-0-1", "-device e1000,netdev=n,mac=02:00:00:00:00:aa"),
    ("-nic user,model=e1000,mac=52:54:00:00:00:01", "-nic user,model=e1000,mac=02:00:00:00:00:aa"),
    ("-net nic,macaddr=52:54:00:00:00:01", "-net nic,macaddr=02:00:00:00:00:aa"),
    ('-device {"driver":"e1000","netdev":"n","mac":"52:54:00:00:00:01"}',
     '-device {"driver": "e1000", "netdev": "n", "mac": "02:00:00:00:00:aa"}'),
    ("-nic none -device virtio-blk-pci,drive=d", "-nic none -device virtio-blk-pci,drive=d"),
])  # fmt: skip
def test_known_addresses_are_replaced_wherever_they_are(given: str, wanted: str) -> None:
    found, kept = network.readdress(["qemu", *_words(given)], {OLD: NEW}, lambda old: old)
    assert (found, kept) == (("qemu", *_words(wanted)), ())


def _words(text: str) -> list[str]:
    """Words, with JSON kept whole."""
    head, brace, rest = text.partition("{")
    return [*head.split(), brace + rest] if brace else head.split()


def test_a_card_without_address_has_qemu_s_default() -> None:
    """``-nic`` is made before ``-device``, and a default that somebody has is not given again."""
    line = "-device virtio-net-pci,netdev=a -nic user,model=virtio -device virtio-net-pci,netdev=b"
    assert readdressed(line, {}) == (
        "-device virtio-net-pci,netdev=a,mac=02:54:00:12:34:57 -nic user,model=virtio,mac=02:54:00:12:34:56 "
        "-device virtio-net-pci,netdev=b,mac=02:54:00:12:34:58", (),
    )  # fmt: skip


def test_a_card_whose_state_is_not_understood_keeps_its_address() -> None:
    """QEMU would refuse its state: the serial number in it is made of the address."""
    line = "-device vmxnet3,netdev=n,mac=52:54:00:00:00:01"
    assert readdressed(line, {}) == (line, ("52:54:00:00:00:01",))


def test_derived_addresses() -> None:
    found = {machine.derived_address(owner, old) for owner in ("a", "b") for old in (OLD, NEW)}
    assert len(found) == 4
    assert all(one[0] & 3 == 2 and len(one) == 6 for one in found), "locally administered, one machine's"
    assert machine.derived_address("a", OLD) == machine.derived_address("a", OLD)


@pytest.mark.parametrize(("given", "wanted"), [
    ("-netdev user,id=n,hostfwd=tcp::22-:22,net=10.1.0.0/24", "-netdev user,id=n,net=10.1.0.0/24,restrict=on"),
    ("-netdev tap,id=n,ifname=tap0,script=/x,vhost=on", "-netdev tap,id=n,vhost=on,script=no,downscript=no"),
    ("-netdev bridge,id=n,br=br0", "-netdev tap,id=n,script=no,downscript=no"),
    ("-netdev socket,id=n,listen=:1234", "-netdev hubport,id=n,hubid=1000"),
    ("-nic tap,model=e1000,mac=52:54:00:00:00:01,br=b",
     "-nic tap,model=e1000,mac=52:54:00:00:00:01,script=no,downscript=no"),
    ("-nic none", "-nic none"),
])  # fmt: skip
def test_isolated(given: str, wanted: str) -> None:
    assert network.isolated(["qemu", *given.split()]) == ("qemu", *wanted.split())


@pytest.mark.parametrize(("line", "refused"), [
    ("-netdev user,id=n,hostfwd=tcp::22-:22", False),
    ("-netdev tap,id=n", False),
    ("-netdev tap,id=n,ifname=tap0", True),
    ("-netdev bridge,id=n,br=br0", False),
    ("-netdev socket,id=n,listen=:1234", True),
    ("-netdev socket,id=n,connect=:1234", False),
    ('-netdev {"type":"tap","id":"n","ifname":"tap0"}', True),
    ("-netdev vhost-user,id=n,chardev=c", True),
])  # fmt: skip
def test_exclusive(line: str, refused: bool) -> None:
    assert (network.exclusive(["qemu", *_words(line)]) is not None) == refused
