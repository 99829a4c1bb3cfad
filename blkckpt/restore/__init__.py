"""Using a checkpoint: a new VM from it, or the same VM back at it.

Data flow::

    manifest ── disks ──> vms/NEW: definition, an empty overlay over each image        (disks)
             └─ memory ─> vms/NEW/incoming: raw images to map, the stream              (ram)
             └─ machine ─> the recorded command line with sockets, memory and -incoming replaced
                          └──> supervisor ──> nbdkit, QEMU ──> stream through QMP ──> cont      (machine)

Ways to go on:

========  ============================================================================================================
lazy      the default.  QEMU maps a raw image of the memory privately and gets a *lean* stream without the pages of
          main memory: it runs after reading less than a megabyte, whatever the guest's size.  The image is the one
          kept with the checkpoint; when that is gone it is made from the store first.  QEMU's background snapshot
          cannot write-protect a private mapping of a file that is not on tmpfs, so the next checkpoint of such a
          guest stops it for as long as its memory is saved (see :data:`machine.LAZY_NOTE`).
          With ``--memory fuse`` there is no raw image: QEMU maps a file of a mount that reads the store's chunks
          (:mod:`blkckpt.restore.fused`, which says what the death of that mount means and what ends the dependence).
eager     every page goes through the stream; the machine that results is like the original in every respect.
print     the disks and the memory are prepared and the command line is printed for a person to run.
revert    the same VM, its own disks: what differs is written back (:mod:`blkckpt.restore.revert`).
boot      for a look only: apart from everything, and taken away again (:mod:`blkckpt.restore.boot`).
fork      many at once, lazily, sharing one image (:mod:`blkckpt.restore.fork`).
flatten   a retained checkpoint becomes an ordinary one, or is given up (:mod:`blkckpt.restore.flatten`).
========  ============================================================================================================

What a restored machine shares with the original, which may still be running: nothing that is written.  The raw image
is mapped privately, store images are immutable, disks have their own overlays.  But it *is* the same machine to the
outside: the same MAC addresses and host name, and random number generators continue from the same state.  A guest
with a VMGENID device is told that it is a copy (``guid=auto``), any other does not notice.  Put a copy on a network
of its own, or change its command line.

Rules:

* **R1** A VM whose disks are not wholly one state is marked (:mod:`blkckpt.vm.unfinished`) and not served.
* **R2** Nothing is written to a disk before every chunk that will be needed has been read and checked.
* **R3** A failed restore leaves nothing; a failed start of a restored VM leaves the VM, to be started again or removed.
* **R4** No raw image is written to after it has its name; whoever needs it for long holds a link or a mapping.
* **R5** The images that a restored disk reads from are pinned in the store until the disk is filled or the VM removed.
  Where an image stands for layers of a VM (a retained checkpoint), the pin keeps these where they are.

Crash windows.  Between the reservation of the name and ``vm.json``: the directory bears the mark, is not listed, and
is cleared by the next restore of that name.  Between ``vm.json`` and the end of the preparation: the VM is listed and
refused with the advice to remove it.  During a revert: see its module.  After the preparation a crash leaves a VM
whose disks are those of the checkpoint and whose memory waits in ``incoming``, to be removed with the VM.
"""
