"""Headers, slots and the state file: round trips, and every damage has a name (D12)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkckpt import errors
from blkckpt.disk import api
from blkckpt.disk import format as formats

LAYER, OTHER, BOOT = "0a" * 16, "0b" * 16, "0c" * 16
WHERE = Path("/somewhere/file")


def state() -> formats.GroupState:
    changed = formats.ChangedState("01" * 16, "image-1")
    disks = (
        formats.DiskState(
            "vda",
            "/base",
            1 << 40,
            changed,
            (formats.OverlayState("02" * 16, formats.Retained("/s", "c1", "06" * 16, "07" * 16)),),
            (formats.ChangedState("03" * 16),),
        ),
        formats.DiskState("vdb", "/b", 700, changed, source=api.ImageRef("/store", "image-9"), fill="04" * 16),
    )
    return formats.GroupState("vm-id", disks, clean=False, boot=BOOT)


def test_state_comes_back() -> None:
    assert formats.decode_state(formats.encode_state(state()), WHERE) == state()


@given(st.integers(0, 5000), st.integers(1, 255))
def test_d12_a_changed_byte_of_the_state_is_noticed(position: int, flip: int) -> None:
    data = bytearray(formats.encode_state(state()))
    position %= len(data)
    data[position] ^= flip
    try:
        found = formats.decode_state(bytes(data), WHERE)
    except errors.CorruptError as error:
        assert str(WHERE) in str(error)
    else:
        assert found == state(), "white space, or a change that is none"


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff\xfe", b'{"magic":"blkckpt-state","version":1}'])
def test_d12_a_foreign_state_file_is_an_error(data: bytes) -> None:
    with pytest.raises(errors.CorruptError, match=str(WHERE)):
        formats.decode_state(data, WHERE)


def resealed(**changes: object) -> bytes:
    body = json.loads(formats.encode_state(state()))
    del body["checksum"]
    body.update(changes)
    body["checksum"] = formats._checksum(body)
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"unknown": 1}, {"disks": [{}]}, {"disks": 7}],
    ids=["version", "key", "disk", "type"],
)
def test_d12_a_state_of_another_version_or_with_unknown_keys_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(errors.CorruptError, match=str(WHERE)):
        formats.decode_state(resealed(**changes), WHERE)


def test_d12_layer_ids_in_the_state_cannot_leave_the_directory() -> None:
    disk = dataclasses.replace(state().disks[0], overlays=(formats.OverlayState("../../../etc/passwd"),))
    with pytest.raises(errors.CorruptError):
        formats.decode_state(formats.encode_state(dataclasses.replace(state(), disks=(disk,))), WHERE)


def test_live_header() -> None:
    header = formats.encode_live_header(LAYER, 12345, BOOT)
    assert len(header) == 4096
    assert formats.check_live_header(header, LAYER, 12345, WHERE) == BOOT


@pytest.mark.parametrize(
    ("layer", "size", "spoil", "says"),
    [
        (OTHER, 12345, None, "another layer"),
        (LAYER, 999, None, "12345 bytes"),
        (LAYER, 12345, 0, "magic"),
        (LAYER, 12345, 20, "torn"),
        (LAYER, 12345, 59, "torn"),
    ],
)
def test_d12_headers_that_do_not_fit_are_errors_with_a_name(
    layer: str, size: int, spoil: int | None, says: str
) -> None:
    live = bytearray(formats.encode_live_header(LAYER, 12345, BOOT))
    lasting = bytearray(formats.encode_durable_header(LAYER, 12345))
    if spoil is not None:
        live[spoil] ^= 1
        lasting[min(spoil, 43)] ^= 1
    with pytest.raises(errors.CorruptError, match=says):
        formats.check_live_header(bytes(live), layer, size, WHERE)
    with pytest.raises(errors.CorruptError, match=says):
        formats.check_durable_header(bytes(lasting), layer, size, WHERE)


def test_d12_an_empty_file_is_not_an_empty_map() -> None:
    for data in (b"", bytes(4096)):
        with pytest.raises(errors.CorruptError, match="magic"):
            formats.check_live_header(data, LAYER, 1, WHERE)


BITS = bytes(range(252)) * 16
ZEROS = bytes(4096)


def pair(*sequences: int) -> bytes:
    slots = [ZEROS, ZEROS]
    for sequence in sequences:
        slots[sequence & 1] = formats.encode_slot(LAYER, 3, sequence, BITS[:4031] + bytes((sequence,)))
    return b"".join(slots)


def test_the_newest_slot_counts() -> None:
    assert formats.choose_slot(LAYER, 3, pair(), WHERE, clean=True) == (0, b"")
    assert formats.choose_slot(LAYER, 3, pair(1), WHERE, clean=True)[0] == 1
    assert formats.choose_slot(LAYER, 3, pair(4, 5), WHERE, clean=True)[0] == 5
    assert formats.choose_slot(LAYER, 3, pair(5, 6), WHERE, clean=True)[1][-1] == 6


@given(st.integers(0, 4095), st.integers(1, 255))
def test_d12_a_torn_slot_leaves_the_version_before_after_an_unclean_stop_only(position: int, flip: int) -> None:
    torn = bytearray(pair(5, 6))
    torn[position] ^= flip  # sequence 6 is in the first slot
    assert formats.choose_slot(LAYER, 3, bytes(torn), WHERE, clean=False)[0] == 5
    with pytest.raises(errors.CorruptError, match="page 3"):
        formats.choose_slot(LAYER, 3, bytes(torn), WHERE, clean=True)


def test_d12_two_bad_slots_are_damage() -> None:
    torn = bytearray(pair(5, 6))
    torn[100] ^= 1
    torn[5000] ^= 1
    with pytest.raises(errors.CorruptError, match="page 3"):
        formats.choose_slot(LAYER, 3, bytes(torn), WHERE, clean=False)


def test_a_slot_of_another_page_or_layer_is_bad() -> None:
    slot = formats.encode_slot(LAYER, 3, 1, BITS)
    assert formats.decode_slot(LAYER, 3, slot) == (1, BITS)
    assert formats.decode_slot(LAYER, 4, slot) is None
    assert formats.decode_slot(OTHER, 3, slot) is None


def test_a_version_is_never_written_over_the_one_before_it() -> None:
    for sequence in range(1, 10):
        assert formats.slot_offset(7, sequence) != formats.slot_offset(7, sequence + 1)
