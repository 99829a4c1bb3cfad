"""The agent: takes checkpoints, and supervises what runs.

==================  ======================================================================================
``plan``            the procedure as a pure table: ``(state, event) -> (state, actions)``, with its abort rows
``runner``          ``take``: locks, chooses the mode, walks the plan, says what went wrong
``checkpoint``      the actions themselves; the timings
``history``         what a checkpoint owes to those before it: parents, lineage, old memory images
``machine``         the hypervisor's part of the actions
``receiver``        our end of the memory receiver, a child process
``turn``            whose turn it is at the guest
``consistency``     checkpoints of several VMs, all stopped at the same time: where their runners meet
``child``           how both children are started (``early``, before the agent is loaded; ``forked``)
``guard``           the child that continues a guest whose agent was killed (with ``rescue``)
``supervisor``      runs a VM: nbdkit and QEMU (with ``nbdserver``, ``template``, ``qemuargs``, ``rundir``)
``forget``          removes a VM
==================  ======================================================================================

Processes while a checkpoint is taken::

    agent ── control socket (the lease) ──> disk server ──> copy children ──> store
      │ ├── QMP ──> QEMU ── pipe (getfd) ──> memory receiver, a child of ours ──> store, raw images
      │ └── starts, before the guest is touched: the guard
      └── manifest ──> store: the commit point (S1)

Rules:

* **A1** No path leaves the guest stopped or frozen without ``cont``, ``thaw`` or a loud recorded state.  Abort rows put
  the guest first; only a guest that *we* stopped is continued; when the agent itself is killed the guard does it.
* **A2** Every wait has a deadline: fixed for answers, "nothing has moved for five minutes" for work of unknown length.
* **A3** A checkpoint that failed leaves no manifest, no frozen layer, no growing overlay, no raw memory image, and
  QEMU's migration settings as they were.
* **A4** One checkpoint of a VM has its turn at a time, from its beginning until its memory is saved: a second is
  refused at once, or waits.  After that any number may be under way, up to a limit of the disks.

Write order: disk images and memory images are durable, then the manifest, then the overlays are committed.  With
``--retain`` the frozen layers are durable and marked in place of images (:mod:`blkckpt.disk.retaining`), the references
that stand for them are put (:func:`blkckpt.store.keeping.refer`), then the manifest; the overlays stay.

Crash windows (of the agent, or all of it at once):

* Before the manifest: the control connection ends, so the disk server commits the overlays back (D7); the receiver
  sees its orders end, and goes; QEMU's pipe breaks and the migration fails; if the guest is stopped the guard
  continues it.  Images without a manifest are garbage in the store.  Old migration settings are not put back; the
  next checkpoint knows ours when it finds them.
* Agent and guard at once, while memory is saved: QEMU sees its stream broken and leaves the guest write-protected.  The
  next checkpoint of the VM finds that, and frees it.
* Between the manifest and the commit: the checkpoint is whole; the disk server goes back to rest by itself, by commit
  or abort, which leave the same disk.
* After the commit: only the last timings and the removal of older raw images may be missing; the next checkpoint does
  the latter.
"""
