"""The hypervisor's part of a checkpoint: what QEMU is asked, in words of the plan.

Everything here finds out for itself whether there is anything to do, so that it can stand in an abort row: restoring
what was not changed, ending what does not run, continuing what is not stopped are no errors.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blkckpt import errors, log
from blkckpt.agent import drain
from blkckpt.store import manifest
from blkckpt.vm import barrier, commandline, qmp, writeprotect

_logger = log.get(__name__)

BACKGROUND = "background-snapshot"
STREAM = "blkckpt-stream"
UNLIMITED = 1 << 50
"""Bytes a second: QEMU's default of 128 MiB/s would make a checkpoint of 8 GiB take a minute."""

DEFAULT_BANDWIDTH = 128 << 20

END_SECONDS = 30.0
"""Without a byte while a migration nobody wants is seen to its end; pre-faulting sends none."""
SILENCE_SECONDS = 5.0
"""Without an answer while a snapshot nobody wants ends: then the monitor may be waiting for a write-protected page."""
CONTINUE_SECONDS = 10.0
COMPLETION_SECONDS = 60.0
"""From the end of the stream to the MIGRATION event; QEMU joins its thread and closes files in between."""
INTERVAL = 0.02

ACTIVE = frozenset({"setup", "wait-unplug", "active", "pre-switchover", "device", "cancelling", "postcopy-active"})
ENDED = frozenset({"completed", "failed", "cancelled"})

_ADVICE = {
    "paused": "continue it (`cont`)",
    "suspended": "wake it up",
    "inmigrate": "wait until it has been restored",
    "postmigrate": "continue it (`cont`)",
    "shutdown": "it has been shut down; start it again",
    "guest-panicked": "its system has crashed; restore an older checkpoint",
    "internal-error": "QEMU met an internal error; restore an older checkpoint",
    "io-error": "a disk failed; mend that and continue it (`cont`)",
}

_PAUSED = frozenset({"paused", "postmigrate", "finish-migrate"})
"""Run states in which a checkpoint leaves a guest that it stopped."""


@dataclass(slots=True)
class _Changed:
    """Settings to put back."""

    capabilities: dict[str, bool] = field(default_factory=lambda: {BACKGROUND: False})
    bandwidth: int | None = None


class Machine:
    """One guest over one QMP session.  Used by the agent's thread only."""

    def __init__(self, session: qmp.QmpSession) -> None:
        self.session = session
        self._changed: _Changed | None = None
        self._stopped = False
        self._handed = False
        self._migrating = False
        self._since = session.mark()
        self._watch: barrier.ResumeBarrier | None = None

    # --- before ---

    def check(self) -> None:
        """Refuse a guest that does not run, that is being migrated, or that cannot be.

        A guest whose memory a snapshot left write-protected, when its agent and its guard were killed together, is
        freed first.
        """
        if self.session.execute("query-migrate").get("status") in ("failed", "cancelled"):
            self._free()
        status = str(self.session.execute("query-status").get("status"))
        if status != "running":
            advice = _ADVICE.get(status, "continue it (`cont`)")
            raise errors.StateError(
                f"the guest does not run (QEMU says {status}): {advice} and try again, "
                "or take a checkpoint of the disks alone (--disk-only)"
            )
        migration = self.session.execute("query-migrate")
        if migration.get("status") in ACTIVE:
            raise errors.StateError("QEMU is migrating or saving this guest already; wait for that or cancel it")
        if reasons := migration.get("blocked-reasons"):
            raise errors.HypervisorError(f"QEMU cannot save this guest: {'; '.join(map(str, reasons))[:300]}")

    def _free(self) -> None:
        """Take away what protects the guest's memory for a snapshot that has ended or that nobody wants.

        Only after a failure: to look means to walk all of QEMU's memory map.
        """
        if freed := writeprotect.release(self.session.peer_pid):
            _logger.warning("the guest was left write-protected, and is freed", extra={"fields": {"ranges": freed}})

    def try_background(self) -> qmp.RefusedError | None:
        """Set QEMU to snapshot this guest in the background; why it cannot, None if it can.

        Only trying tells, and QEMU then registers all of the guest's memory: 40 ms for 2 GiB, so it is done once.
        """
        try:
            self._change(background=True)
        except qmp.RefusedError as error:
            return error
        return None

    @functools.cached_property
    def ram_size(self) -> int:
        """Bytes of the guest's memory, without what was plugged in later."""
        return int(self.session.execute("query-memory-size-summary")["base-memory"])

    def info(self) -> manifest.MachineInfo:
        """How the guest was started, for its manifest."""
        kvm = self.session.execute("query-kvm").get("enabled")
        kind = str(self.session.execute("qom-get", {"path": "/machine", "property": "type"}))
        return manifest.MachineInfo(
            argv=command_line(self.session.peer_pid),
            machine_type=kind.removesuffix("-machine"),
            accel="kvm" if kvm else "tcg",
            qemu_version=self.session.version,
            ram_size=self.ram_size,
        )

    # --- settings ---

    def set_up(self, *, background: bool) -> None:
        """Capabilities and bandwidth for a checkpoint; :meth:`restore_settings` puts the old ones back."""
        self._change(background=background)
        bandwidth = self.session.execute("query-migrate-parameters").get("max-bandwidth")
        assert self._changed is not None
        # What an agent that was killed has left is not what the user had.
        self._changed.bandwidth = DEFAULT_BANDWIDTH if bandwidth == UNLIMITED else bandwidth
        self.session.execute("migrate-set-parameters", {"max-bandwidth": UNLIMITED})

    def _change(self, *, background: bool) -> None:
        now = self._capabilities()
        wanted = {"events": True, BACKGROUND: background}
        changes = {name: value for name, value in wanted.items() if now.get(name) != value}
        if changes:
            self._set_capabilities(changes)
        self._changed = self._changed or _Changed()
        for name in changes:
            self._changed.capabilities.setdefault(name, now.get(name, False))

    def restore_settings(self) -> None:
        """Put capabilities and bandwidth back."""
        changed, self._changed = self._changed, None
        if changed is None:
            return
        if changed.bandwidth is not None:
            self.session.execute("migrate-set-parameters", {"max-bandwidth": changed.bandwidth})
        self._set_capabilities(changed.capabilities)

    def _capabilities(self) -> dict[str, bool]:
        answer = self.session.execute("query-migrate-capabilities")
        return {str(entry["capability"]): bool(entry["state"]) for entry in answer}

    def _set_capabilities(self, states: Mapping[str, bool]) -> None:
        listed = [{"capability": name, "state": state} for name, state in states.items()]
        self.session.execute("migrate-set-capabilities", {"capabilities": listed})

    # --- the window ---

    def hand_stream(self, descriptor: int) -> None:
        """Give QEMU the pipe that the stream goes through."""
        self.session.send_fd(STREAM, descriptor)
        self._handed = True

    def leave_unread(self) -> None:
        """From here on the QMP socket is only looked at."""
        self.session.pause_reading()
        self._since = self.session.mark()
        self._watch = barrier.ResumeBarrier(self.session.duplicate())

    @property
    def watch(self) -> barrier.ResumeBarrier:
        """Our own look at the armed window."""
        assert self._watch is not None
        return self._watch

    def read_again(self) -> None:
        """End the look; idempotent."""
        self.session.resume_reading()
        if self._watch is not None:
            self._watch.poll()
            self._watch.close()

    def migrate(self) -> qmp.Reply:
        """Start it; the reply can be had when the socket is read."""
        self._migrating = True
        return self.session.submit("migrate", {"uri": f"fd:{STREAM}"})

    def stop(self) -> None:
        """Stop the virtual CPUs and drain the disks."""
        self._since = self.session.mark()
        self._stopped = True
        self.session.execute("stop")

    def await_running(self, timeout: float) -> None:
        """Until QEMU has resumed a guest that *we* stopped before a background snapshot.

        QEMU 7.2 does so by itself; a newer one leaves a guest stopped that was.  Pages are only sent once memory is
        write-protected, so a guest that is still paused then is ours to continue.
        """
        deadline = time.monotonic() + timeout
        while not self._seen("RESUME"):
            migration = self.session.execute("query-migrate")
            if migration.get("status") in ("failed", "cancelled"):
                raise self.failure(migration)
            ram = migration.get("ram", {})
            if ram.get("normal", 0) + ram.get("duplicate", 0) > 0 and not self._seen("RESUME"):
                self.continue_guest()
                return
            if time.monotonic() > deadline:
                raise errors.DeadlineError(f"QEMU did not resume the guest within {timeout:g} s")
            time.sleep(INTERVAL)
        self._stopped = False

    def continue_guest(self) -> None:
        """Continue the guest if it is paused and it was us, or our migration, that stopped it (rule A1)."""
        if not self.may_be_stopped:
            return
        deadline = time.monotonic() + CONTINUE_SECONDS
        while (status := self.session.execute("query-status").get("status")) in _PAUSED:
            try:
                self.session.execute("cont")
            except qmp.RefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(INTERVAL)
        if status != "running":
            raise errors.HypervisorError(f"the guest does not run again: QEMU says {status}")
        self._stopped = False

    @property
    def may_be_stopped(self) -> bool:
        """Whether the guest may still be stopped by us."""
        return self._stopped or self._stopped_by_migration()

    def _stopped_by_migration(self) -> bool:
        times = self._watch.times if self._watch is not None else barrier.EventTimes()
        return times.stop_us is not None and times.resume_us is None and not self._seen("RESUME")

    # --- the migration's end ---

    def migration_ended(self) -> bool:
        """Whether QEMU has said so."""
        return any(event.data.get("status") in ENDED for event in self._events("MIGRATION"))

    def check_completed(self, *, background: bool) -> None:
        """Wait for the end, a moment after the stream's; raises unless it completed undisturbed."""
        ended = self.session.wait_event(
            lambda event: event.name == "MIGRATION" and event.data.get("status") in ENDED,
            since=self._since,
            timeout=COMPLETION_SECONDS,
        )
        if ended.data["status"] != "completed":
            raise self.failure(self.session.execute("query-migrate"))
        self._migrating = False
        if background and len(self._events("RESUME")) > 1:
            # A `cont` between "active" and QEMU's own stop shows a pair of STOP and RESUME before the real one: then
            # the disks switched too early.  It cannot be told from a stop and cont later, so both are refused.
            raise errors.HypervisorError(
                "somebody stopped and continued the guest while its memory was saved, so the instant is not certain; "
                "take the checkpoint again"
            )

    def failure(self, migration: Mapping[str, Any]) -> errors.HypervisorError:
        """What a failed migration says."""
        words = " ".join(str(migration.get("error-desc") or "no reason given").split())[:300]
        return errors.HypervisorError(f"QEMU could not save the guest ({migration.get('status')}): {words}")

    def failed(self) -> errors.HypervisorError | None:
        """Why the migration failed, if it did."""
        migration = self.session.execute("query-migrate")
        return self.failure(migration) if self._migrating and migration.get("status") == "failed" else None

    @property
    def migrating(self) -> bool:
        """Whether a migration of ours may still run."""
        return self._migrating

    def end_migration(self, stream: int | None, *, background: bool) -> None:
        """See the migration to its end, and take the descriptor back if it was not used.

        A background snapshot is let to complete, its *stream* (the pipe's read end) thrown away; it must not be
        cancelled (:mod:`blkckpt.agent.drain`).  One that broke off all the same has left the guest's memory
        write-protected, and that is taken away before QEMU is asked anything: its monitor may be waiting for a page.
        A plain migration is cancelled.
        """
        if self._migrating:
            thrown = drain.Drain(stream) if background and stream is not None else None
            if not background:
                with contextlib.suppress(qmp.RefusedError):
                    self.session.execute("migrate_cancel")
            elif self.migration_ended():
                self._free()
            self._await_end(thrown, background=background)
        self._migrating = False
        if self._handed:
            self._handed = False
            with contextlib.suppress(qmp.RefusedError):  # a migration that began took it
                self.session.execute("closefd", {"fdname": STREAM})

    def _await_end(self, thrown: drain.Drain | None, *, background: bool) -> None:
        moved, since = 0, time.monotonic()
        status = "active"
        while status in ACTIVE:
            if thrown is not None and thrown.moved != moved:
                moved, since = thrown.moved, time.monotonic()
            if time.monotonic() - since > END_SECONDS:
                raise errors.DeadlineError(f"QEMU's migration has not moved for {END_SECONDS:g} s")
            try:
                status = self.session.execute("query-migrate", timeout=SILENCE_SECONDS).get("status")
            except errors.DeadlineError:
                if background:
                    self._free()
            if status in ACTIVE:
                time.sleep(INTERVAL)
        if background and status in ("failed", "cancelled"):
            self._free()
        if thrown is not None:
            thrown.join(END_SECONDS)

    # --- times ---

    def stop_and_resume(self) -> tuple[int | None, int | None]:
        """QEMU's own times of the first STOP and RESUME of the window, microseconds of the host's real clock."""
        stops, resumes = self._events("STOP"), self._events("RESUME")
        return (stops[0].stamp_us if stops else None), (resumes[0].stamp_us if resumes else None)

    def _seen(self, name: str) -> bool:
        return bool(self._events(name))

    def _events(self, name: str) -> list[qmp.Event]:
        return [event for event in self.session.events(self._since) if event.name == name]


def command_line(pid: int) -> tuple[str, ...]:
    """The command line of process *pid*, such that it means the same in any working directory.

    The program is the one that runs: as it was called if that finds it, else by its path.
    """
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as error:
        raise errors.from_os_error(error, f"reading how QEMU (pid {pid}) was started") from error
    words = [os.fsdecode(word) for word in raw.split(b"\0")[:-1]]
    if not words:
        raise errors.HypervisorError(f"process {pid} at the other end of the QMP socket has no command line")
    with contextlib.suppress(OSError):
        program = os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115  (a path as a string)
        if os.path.realpath(shutil.which(words[0]) or "") != program and Path(program).exists():
            words[0] = program
        return commandline.absolute(words, os.readlink(f"/proc/{pid}/cwd"))  # noqa: PTH115
    return tuple(words)
