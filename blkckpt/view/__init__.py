"""Looking into checkpoints: as files through FUSE, as guests' files, as differences.

Data flow of a mount::

    kernel ── fuse ──> tree ──> library ──> manifests of the stores, looked at anew each time
                │        │         └──────> image tables, kept
                │        ├──> guest ──> volumes (a confined process parses the guest's file system)
                │        └──> physical, elf, devices: memory for debuggers
                ├──> held: a pin in the store for what is open
                └──> content ──> chunks ──> packs          (hash checked, decoded once, bounded)

Modules.  ``chunks`` keeps decoded chunks, ``content`` makes files of them (images, slices, pieces with holes),
``nodes`` and ``tree`` say what a checkpoint looks like, ``library`` opens and remembers, ``guest`` adds partitions and
guests' files, ``physical``, ``elf`` and ``devices`` encode and decode memory and device state (pure), ``fuse``
translates, ``held`` pins, ``mounts`` keeps records and clears up, ``daemon`` is the process, ``touched`` remembers what
a restored machine reads first.  For guests' files without a mount: ``volumes``, ``parser`` and ``extract``; for
differences: ``changes``, ``filediff``, ``heatmap``, ``report``.

Rules.

* **V1** Never a byte that is not the checkpoint's: every chunk's hash is checked when it is decoded (S3); what is
  damaged is EIO and a line in the log that names image, chunk and pack.
* **V2** What is open stays readable when its checkpoint is removed and the store collected: its images are pinned.
* **V3** Nothing is remembered that can change: a checkpoint made, amended or removed is seen by the next look, after at
  most the second for which the kernel believes a name.
* **V4** Memory is bounded whatever is mounted: chunks by bytes, tables by bytes, everything else by number.
* **V5** A mount is read-only, without set-uid and devices, and its owner's alone unless ``allow_other`` is asked for.
* **V6** A killed process leaves no dead mount: fusermount3 takes it away at once; where that was killed too, or looked
  too early, the next ``mount``, ``umount`` or ``doctor`` does.

Why it is answered by one thread.  The work (decoding) is done without the interpreter's lock, ahead of the reader, by
threads of its own; several threads of libfuse would only hand the lock around: 4 KiB random reads past the page cache
fell from 4,900 to 1,400 a second on two busy cores.  ``--threads`` is for stores where reading itself is slow.
"""
