"""What a checkpoint does, as a table: ``(state, event) -> (state, actions)``.  Pure.

The runner performs the actions of a step in order, and reports DONE when all of them succeeded or FAILED at the
first that did not (an error, a deadline, Ctrl-C).  It decides nothing.  While ABORTING every action is tried, also
after one has failed.

Modes (numbers are the steps of the procedure)::

    BARRIER   the disks switch inside QEMU's own stopped window, at the resume barrier           no pause added
    EXPLICIT  stop, switch, background snapshot; QEMU or we resume                                    pause: pre-fault
    STOPPED   stop, switch, plain migration, cont: for guests that cannot be snapshot in the background
              (memory mapped privately from a file)                                                   pause: all memory
    DISKS     switch at one instant, no hypervisor: crash consistent                                  no pause
    FROZEN    as DISKS inside fsfreeze/thaw of the guest agent: filesystem consistent                 writes wait

Commit point: PUBLISH puts the manifest.  Everything that fails before it is taken back (A3).  After it nothing is:
the checkpoint is whole, and the disks return to rest by themselves whether or not COMMIT is heard.

Turns (A4).  From the beginning until END_TURN no other checkpoint of the VM begins.  After it others may be under way
too, each with its own row here; they are copied in their order and end in any.

Abort rows.  The guest comes first: thaw, let the migration end (a background snapshot that breaks off hangs it, see
:mod:`blkckpt.agent.drain`), continue; then the receiver, the disks, residue.  Each abort action finds out for itself
whether there is anything to do, so a row may name more than was reached.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class Mode(enum.Enum):
    """How the instant is made."""

    BARRIER = "barrier"
    EXPLICIT = "explicit"
    STOPPED = "stopped"
    DISKS = "disks"
    FROZEN = "frozen"


class State(enum.Enum):
    """Named for what is being done; REST, FINISHED and TAKEN_BACK are the ends."""

    REST = "rest"
    PREPARING = "preparing"
    SETTING_UP = "setting up"
    ARMING = "arming"
    CROSSING = "crossing"
    FREEZING = "freezing"
    STOPPING = "stopping"
    SWITCHING = "switching"
    RESUMING = "resuming"
    SAVING = "saving"
    PUBLISHING = "publishing"
    COMMITTING = "committing"
    ABORTING = "aborting"
    FINISHED = "finished"
    TAKEN_BACK = "taken back"


class Event(enum.Enum):
    """What the runner reports."""

    BEGIN = "begin"
    DONE = "done"
    FAILED = "failed"


class Action(enum.Enum):
    """What the runner can do.  The first group changes the world forward, the second takes back."""

    PREPARE_DISKS = "make the overlays (802)"
    START_GUARD = "start the process that looks after the guest should we die"
    AWAIT_GUARD = "wait until that process stands"
    START_RECEIVER = "start the memory receiver and hand QEMU the stream's descriptor"
    SET_CAPABILITIES = "set the migration's capabilities and parameters, remembering the old ones"
    PAUSE_READING = "leave the QMP socket unread"
    ARM = "arm the disks with the QMP socket"
    MIGRATE = "start the migration (804 to 808)"
    AWAIT_BARRIER = "wait until the guest was resumed, switch the disks (810)"
    RESUME_READING = "read the QMP socket again"
    CHECK_WINDOW = "check QEMU's reply and the events of the window"
    FREEZE = "freeze the guest's file systems"
    THAW = "thaw the guest's file systems"
    STOP_GUEST = "stop the guest"
    SWITCH_NOW = "switch the disks at once (810)"
    AWAIT_RUNNING = "wait until QEMU has resumed the guest, else continue it"
    CONTINUE_GUEST = "continue the guest if it was us who stopped it"
    RELEASE_GUARD = "tell the guard that the guest needs us no more"
    START_COPY = "start copying the frozen layers, or keeping them where they are (830)"
    AWAIT_MEMORY = "wait for memory and device state (820 to 828)"
    AWAIT_COPY = "wait until they are copied, or durable"
    CHECK_MIGRATION = "check that the migration completed undisturbed"
    RESTORE_CAPABILITIES = "put capabilities and parameters back"
    END_TURN = "let the next checkpoint begin"
    PUBLISH = "put the manifest (832)"
    COMMIT = "commit the overlays (834), unless what is below them is kept"

    END_MIGRATION = "let the migration end, or cancel one that can be"
    STOP_RECEIVER = "end the memory receiver"
    ABORT_DISKS = "disarm, commit the overlays back"
    WITHDRAW_MANIFEST = "remove a manifest that was not durably put"
    REMOVE_MEMORY = "remove the raw memory images"


Step = tuple[State, tuple[Action, ...]]
Table = Mapping[tuple[State, Event], Step]

_A = Action

_UNDO = (
    _A.RESUME_READING,
    _A.END_MIGRATION,
    _A.STOP_RECEIVER,
    _A.CONTINUE_GUEST,
    _A.RELEASE_GUARD,
    _A.ABORT_DISKS,
    _A.RESTORE_CAPABILITIES,
    _A.WITHDRAW_MANIFEST,
    _A.REMOVE_MEMORY,
)
"""The abort row of the modes with a machine."""

_UNDO_STOPPED = (
    _A.END_MIGRATION,
    _A.CONTINUE_GUEST,
    *(action for action in _UNDO if action is not _A.CONTINUE_GUEST),
)
"""The guest waits here: it is continued before anything else is tidied."""

_UNDO_DISKS = (_A.ABORT_DISKS, _A.WITHDRAW_MANIFEST)
_UNDO_FROZEN = (_A.THAW, _A.RELEASE_GUARD, *_UNDO_DISKS)

_PREPARE = (_A.START_RECEIVER, _A.START_GUARD, _A.PREPARE_DISKS)
"""The children first: they start while the overlays are made."""

_SET_UP = (_A.AWAIT_GUARD, _A.SET_CAPABILITIES)
_TAIL: tuple[Step, ...] = (
    (State.PUBLISHING, (_A.PUBLISH,)),
    (State.COMMITTING, (_A.COMMIT,)),
)
_SAVE_MACHINE = (
    _A.START_COPY,
    _A.AWAIT_MEMORY,
    _A.CHECK_MIGRATION,
    _A.RELEASE_GUARD,
    _A.RESTORE_CAPABILITIES,
    _A.END_TURN,
    _A.AWAIT_COPY,
)

_CHAINS: Mapping[Mode, tuple[Step, ...]] = MappingProxyType({
    Mode.BARRIER: (
        (State.PREPARING, _PREPARE),
        (State.SETTING_UP, _SET_UP),
        (State.ARMING, (_A.PAUSE_READING, _A.ARM)),
        (State.CROSSING, (_A.MIGRATE, _A.AWAIT_BARRIER, _A.RESUME_READING, _A.CHECK_WINDOW)),
        (State.SAVING, _SAVE_MACHINE),
        *_TAIL,
    ),
    Mode.EXPLICIT: (
        (State.PREPARING, _PREPARE),
        (State.SETTING_UP, _SET_UP),
        (State.STOPPING, (_A.STOP_GUEST,)),
        (State.SWITCHING, (_A.SWITCH_NOW,)),
        (State.RESUMING, (_A.MIGRATE, _A.AWAIT_RUNNING)),
        (State.SAVING, _SAVE_MACHINE),
        *_TAIL,
    ),
    Mode.STOPPED: (
        (State.PREPARING, _PREPARE),
        (State.SETTING_UP, _SET_UP),
        (State.STOPPING, (_A.STOP_GUEST,)),
        (State.SWITCHING, (_A.SWITCH_NOW,)),
        (State.RESUMING, (_A.MIGRATE, _A.CHECK_MIGRATION, _A.CONTINUE_GUEST, _A.RELEASE_GUARD)),
        (State.SAVING, (_A.START_COPY, _A.RESTORE_CAPABILITIES, _A.AWAIT_MEMORY, _A.END_TURN, _A.AWAIT_COPY)),
        *_TAIL,
    ),
    Mode.DISKS: (
        (State.PREPARING, (_A.PREPARE_DISKS,)),
        (State.SWITCHING, (_A.SWITCH_NOW,)),
        (State.SAVING, (_A.START_COPY, _A.END_TURN, _A.AWAIT_COPY)),
        *_TAIL,
    ),
    Mode.FROZEN: (
        (State.PREPARING, (_A.PREPARE_DISKS,)),
        (State.SETTING_UP, (_A.START_GUARD, _A.AWAIT_GUARD)),
        (State.FREEZING, (_A.FREEZE,)),
        (State.SWITCHING, (_A.SWITCH_NOW, _A.THAW, _A.RELEASE_GUARD)),
        (State.SAVING, (_A.START_COPY, _A.END_TURN, _A.AWAIT_COPY)),
        *_TAIL,
    ),
})  # fmt: skip

_ABORTS: Mapping[Mode, tuple[Action, ...]] = MappingProxyType({
    Mode.BARRIER: _UNDO,
    Mode.EXPLICIT: _UNDO_STOPPED,
    Mode.STOPPED: _UNDO_STOPPED,
    Mode.DISKS: _UNDO_DISKS,
    Mode.FROZEN: _UNDO_FROZEN,
})  # fmt: skip

ENDS = frozenset({State.FINISHED, State.TAKEN_BACK})


def _build(mode: Mode) -> Table:
    """The rows of *mode*: its chain on DONE, its abort row on FAILED."""
    table: dict[tuple[State, Event], Step] = {}
    chain = _CHAINS[mode]
    event, state = Event.BEGIN, State.REST
    for following, actions in chain:
        table[state, event] = (following, actions)
        event, state = Event.DONE, following
        table[state, Event.FAILED] = (State.ABORTING, _ABORTS[mode])
    # The manifest is durable: a commit that is not heard of any more is finished by the disks themselves.
    table[State.COMMITTING, Event.DONE] = (State.FINISHED, ())
    table[State.COMMITTING, Event.FAILED] = (State.FINISHED, ())
    table[State.ABORTING, Event.DONE] = (State.TAKEN_BACK, ())
    table[State.ABORTING, Event.FAILED] = (State.TAKEN_BACK, ())
    return MappingProxyType(table)


TABLES: Mapping[Mode, Table] = MappingProxyType({mode: _build(mode) for mode in Mode})


class IllegalStepError(Exception):
    """An event that the state does not know: a fault of the runner.  Nothing has changed."""


class Plan:
    """Where one checkpoint is.  Not thread safe."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.state = State.REST

    def step(self, event: Event) -> tuple[Action, ...]:
        """Move on *event*; returns the actions of the new state.  An illegal event changes nothing."""
        try:
            self.state, actions = TABLES[self.mode][self.state, event]
        except KeyError:
            raise IllegalStepError(f"{event.value} while {self.state.value} ({self.mode.value})") from None
        return actions

    @property
    def ended(self) -> bool:
        return self.state in ENDS
