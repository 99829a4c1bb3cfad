"""The virtual machine as seen from outside: its definition, its monitor, the resume barrier, its command line.

This package is the only place that knows QMP.

==================  ======================================================================================
``definition``      ``vm.json``: name, identity, disks, store; what base files are refused
``qmp``             a QMP session: blocking, with deadlines, and a socket that can be left unread
``barrier``         has the guest been resumed yet? asked of the socket's receive queue by peeking
``qemuopts``        QEMU's command line as options, and the two syntaxes of their values
``commandline``     the recorded command line rewritten for a copy of the guest
``alone``           the same for a machine that touches nothing outside
``screen``          a picture of the guest's screen
``network``         its network cards: other addresses, networks that lead nowhere
``guestagent``      freezing and thawing the guest's file systems
``unfinished``      the mark of a VM that must not be served
==================  ======================================================================================

The resume barrier
------------------

A checkpoint needs the disks as they were when the virtual CPUs stood still.  QEMU's background snapshot stops them for
some milliseconds, by itself, in the middle of one command (``migrate``), and offers no hook inside.  But it says what
it does, on the monitor's socket, and the order of what it says and does is fixed::

    QEMU                                  QMP socket            disk server
    ------------------------------------  --------------------  -------------------------------------------
    pre-fault RAM (guest runs)            MIGRATION setup       requests -> old layer
    ...                                   MIGRATION active      requests -> old layer
    stop virtual CPUs                     STOP                  requests (in flight) -> old layer
    drain and flush the disks                                   ... until QEMU has all its answers
    save devices, write-protect RAM
                                          RESUME                (nothing can arrive here)
    virtual CPUs run                                            request: sees RESUME -> switch, new layer

So the disk server looks at the socket before each mutating request, and switches at the first that finds RESUME.  The
agent looks as well, so that the disks of an idle guest switch too.  Nobody reads the socket meanwhile, or one looker
would take the events from the other.

Rules:

* **V1** Nothing reads the QMP socket from before arming until the barrier is PASSED, VIOLATED or disarmed.
* **V2** The armed window is drained first and shows exactly setup, active, STOP, RESUME; anything that is not known to
  be harmless makes the checkpoint invalid.  Doubt is VIOLATED, never PASSED.
* **V3** Whole JSON lines are judged by their keys: nothing a guest can name decides.
* **V4** The queue stays far below the point where QEMU would hold an event back.
* **V5** After RESUME no second one may be seen until the migration has ended (see :mod:`blkckpt.vm.barrier`).
* **V6** Every wait has a deadline, and QEMU going away is an error of ours, never a hang (A2).

What a fault does: QEMU refuses or fails — its words become the error, the disks are disarmed, nothing has changed.
QEMU dies — end of file, VIOLATED.  The agent dies — the disk server's lease ends the arming; its own duplicate of
the descriptor keeps the socket, and QEMU's events, valid until then.
"""
