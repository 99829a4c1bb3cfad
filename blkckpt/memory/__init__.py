"""Memory: QEMU's migration stream taken apart, kept, and put together again.

A checkpoint's memory arrives as QEMU's background-snapshot stream: RAM pages first, the state of all devices after
them.  This package reads that stream as fast as QEMU writes it, keeps the RAM as images and everything else verbatim,
and writes streams that any QEMU of the same version loads.  It knows the RAM section's format and nothing of any
device: device state is bytes.  (Only ``nics`` knows network cards, to give a fork's addresses of its own.)

Data flow::

    QEMU ──pipe──> intake ──> stream.Parser ──> assemble ──> raw images (page cache) ──> feed ──> store images
                                   └── head, live, tail; small blocks ──> skeleton ──────────────> store image

    store image or raw image ──readers──┐
    skeleton ────────────────────────── generate.full / generate.lean ──> -incoming

Modules, lowest first: ``records`` (the words of the format), ``stream`` (the bulk parser, pure), ``skeleton`` (our file
of all that is not main RAM, pure), ``image`` (raw images), ``generate`` (the writer), ``assemble`` (pages to places),
``intake`` (reception), ``apart`` (reception as a process), ``feed`` (to the store), ``receive`` (the child process).

Terms.  A *block* is one of QEMU's RAM blocks (``pc.ram``, ``0000:00:01.0/vga.vram``).  *Main* blocks have an image of
their own; *small* ones (at most 16 MiB, together 64 MiB: ROMs, ACPI tables, the default VGA's memory) live in the
skeleton.  Which blocks a lazy restore maps is its own choice; a main block that it does not map is sent from its image.

Rules.

* **M1** The stream is drained at the speed of the page cache.  Nothing between the pipe and the raw image waits for the
  store, for a disk or for another process: a guest whose write faults queue behind the stream would stall.
* **M2** What is not understood is refused, by name, with the capability that must be off; nothing is guessed or
  skipped.  The one exception is a live section that is not RAM, which has no length (see ``stream`` for the rule that
  ends it) and is kept verbatim.
* **M3** Nothing in a stream or skeleton is believed before it is checked: names, lengths and addresses are bounded, and
  memory in use does not grow with what is read (but for device state, bounded too, and one byte for each page of RAM).
* **M4** A page that is sent again replaces the one before, also if its chunk was handed on: the block is then read
  again from the raw image, which always holds the newest.
* **M5** A page that never comes is zero (an unplugged part of a virtio-mem).  A stream without any page of a main
  block is an error: the pages went another way.
* **M6** A raw image is complete or absent, and believed only on the boot that wrote it (``image``).
* **M7** A stream that ends early is an error, never a checkpoint; so is one with anything behind its end.

Crash windows.  Until the driver writes the manifest nothing here counts: images in the store are garbage, raw images
have no name until they are whole.  Killed before a raw image is named: it is gone.  Killed between the name and its
note: the image is not believed, and replaced by the next writer.  Power lost after the note: another boot, not
believed.

Why the lean stream works.  QEMU loads into each block what the stream has for it and leaves the rest as it is.  A block
made by ``memory-backend-file,share=off`` over a raw image has the right contents already; the kernel reads a page
when the guest first touches it, and a write goes to a private copy.  The backend must get the block's own name
(``id=pc.ram`` and ``x-use-canonical-path-for-ramblock-id=off``).

Speed (2 cores, 2 GiB guest, 190,571 pages and 333,847 zero pages, 785 MB of stream).  The parser takes 0.06-0.08 s,
where a loop over pages took 1.5-3.4 s (0.6 s if pages and zero pages alternated all the way).  Runs of pages are
written with ``pwritev`` from the receive buffer, 0.24 s (a shared mapping of the file: 0.5-1.0 s, page faults).
Streams are written at 1.9 GB/s.  All of the intake takes 1.2 s of processor time, half of it the kernel's; hashing,
compressing and packing 714 MB takes 1.7 s in the other process.  QEMU itself needs 2.1-2.9 s for the same stream into
``cat > /dev/null``: it makes a system call for every page.
"""
