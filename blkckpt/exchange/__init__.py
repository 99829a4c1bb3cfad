"""Checkpoints to and from other programs and other hosts: NBD, image files, bundles.

Data flow::

    image tables, packs ──> exports ──> nbdkit (plugins/nbdkit_blkckpt_image.py) ──> any NBD client     (server)
                       └──> pump, in order or not ──> raw file, pipe                                     (outward)
                                server.private ──> qemu-img convert ──> qcow2, vmdk, vdi, vhdx           (outward)
                       └──> chunks by hash, leaves as hashes ──> bundle file ──> another store           (packing,
                                                                                                          unpacking)
    raw file ───────────────────────────────┬─> a VM's base, copied or in place                          (inward)
    qcow2, vmdk, … ──> qemu-img convert ────┴─> image, manifest

=============  ===================================================================================================
``inuse``      what a process reads is pinned in the store as long as it lives
``exports``    what the NBD server serves; its plugin is an adapter
``server``     that server: one a checkpoint, found again, stopped
``pump``       an image's data read by several threads
``outward``    an image to a file, whole or not at all
``core``       memory by physical address to a file: ELF core, raw
``qemuimg``    qemu-img: what a file is, conversions with progress
``inward``     a file becomes a VM's disk or a checkpoint
``bundle``     the format of a bundle.  Pure
``beside``     labels, evidence and pictures, which travel with their checkpoints
``packing``    checkpoints to a bundle, without what the other side has
``unpacking``  a bundle to checkpoints
=============  ===================================================================================================

Rules:

* **X1** What leaves has been checked: every byte that is sent or written has had its hash compared (rule S3).
* **X2** A file appears whole, under its name, or not at all; nothing is written over unless the user says so.
* **X3** Nothing that comes in is trusted: formats are not guessed where a guest could have written the header, backing
  files are refused, sizes and names are bounded, hashes are recomputed (rule S4).
* **X4** What is read stays: it is pinned until the reader has finished or is dead.

Crash windows.  An export to a file leaves a temporary file beside the target (``.tmp-…``), an import and an unbundle
leave packs that no manifest names and the next collection removes, or that the same command, repeated, finds and
does not store again.  A manifest is the last thing written, one at a time; a repeated unbundle goes on with the rest.
"""
