"""A command line for a machine that touches nothing outside, and pictures of screens."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from blkckpt import errors
from blkckpt.vm import alone, screen

PLACE = Path("/run/x")


def test_everything_that_leads_outside_is_replaced() -> None:
    line = (
        "qemu -serial unix:/tmp/s -serial stdio -monitor stdio -vnc :1 -display gtk -device virtio-serial "
        "-chardev socket,id=a,path=/tmp/qga,server=on,wait=off "
        "-device virtserialport,chardev=a,name=org.qemu.guest_agent.0 -chardev socket,id=b,host=h,port=1 "
        "-device virtserialport,chardev=b,name=other -netdev user,id=n,hostfwd=tcp::1-:1 -vga std"
    )
    found = alone.alone(line.split(), PLACE)
    assert " ".join(found.argv) == (
        "qemu -serial file:/run/x/console-0.log -serial file:/run/x/console-1.log -device virtio-serial "
        "-chardev socket,id=a,path=/run/x/agent.sock,server=on,wait=off "
        "-device virtserialport,chardev=a,name=org.qemu.guest_agent.0 -chardev file,id=b,path=/run/x/console-2.log "
        "-device virtserialport,chardev=b,name=other -netdev user,id=n,restrict=on -vga std "
        "-display none -monitor none"
    )
    assert found.agent == PLACE / "agent.sock"
    assert len(found.consoles) == 3


def test_nographic_has_a_console_too() -> None:
    found = alone.alone(["qemu", "-nographic", "-m", "1G"], PLACE)
    assert found.argv[1:5] == ("-m", "1G", "-serial", "file:/run/x/console-0.log")
    assert found.agent is None


def test_a_serial_line_over_a_chardev_stays_one() -> None:
    found = alone.alone(["qemu", "-chardev", "stdio,id=c,mux=on", "-serial", "chardev:c", "-mon", "chardev=c"], PLACE)
    assert found.argv[1:5] == ("-chardev", "file,id=c,path=/run/x/console-0.log", "-serial", "chardev:c")


def refuse(words: str) -> errors.HypervisorError:
    return errors.HypervisorError(f"QEMU refused screendump: {words}")


@pytest.mark.parametrize("modern", [True, False])
def test_a_picture_is_png_whatever_qemu_can(tmp_path: Path, modern: bool) -> None:
    def execute(command: str, arguments: object) -> None:
        assert command == "screendump"
        assert isinstance(arguments, dict)
        if "format" in arguments and not modern:
            raise refuse("Parameter 'format' is unexpected")
        ppm = b"P6\n2 1\n255\n" + bytes(range(6))
        Path(arguments["filename"]).write_bytes(screen.PNG + b"x" if "format" in arguments else ppm)
        Path(arguments["filename"]).chmod(0o600)

    found = screen.take(execute, tmp_path)
    assert found
    assert found.startswith(screen.PNG)
    assert list(tmp_path.iterdir()) == []
    if not modern:
        assert zlib.decompress(found[found.index(b"IDAT") + 4 : found.index(b"IEND") - 8]) == b"\0" + bytes(range(6))


def test_no_screen_is_no_error(tmp_path: Path) -> None:
    def execute(command: str, arguments: object) -> None:
        raise refuse("There is no console to take a screendump from")

    assert screen.take(execute, tmp_path) is None


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    def execute(command: str, arguments: dict[str, str]) -> None:
        Path(arguments["filename"]).write_bytes(b"P6\n2 2\n255\nshort")
        Path(arguments["filename"]).chmod(0o600)

    with pytest.raises(errors.ProtocolError):
        screen.take(execute, tmp_path)  # type: ignore[arg-type]
