"""The data plane: a VM's disks, and how they are switched, copied and committed while the guest goes on.

Each disk is a chain of layers::

      [overlay …]   sparse file + map of the blocks present; one is made per checkpoint (802) and committed back (834)
      [file]        of a restored disk only: sparse file + map, the base-to-be, filled from the image in the background
      floor         the raw base, or the image of a checkpoint

``resolve(block)`` is the newest layer whose bit is set, else the floor, **the same in every state**.  States only
choose where writes go.  That is why the switch writes nothing to disk and costs the guest nothing: an overlay that is
prepared and empty changes no read, whatever crashes.

States (all disks of a VM together, for one checkpoint; :mod:`blkckpt.disk.group`)::

    state        writes go to                                   what the driver waits for
    REST         the bottom                                     —
    PREPARED     the layer below the new, empty overlay         (802 done)
    ARMED        the same; every mutating request first asks    the guest's resume (804 to 808)
                 whether the guest has been resumed
    SWITCHED     the overlay; all below is frozen (810)         the copy child (830), started once the writes in flight
                                                                at the switch are done (812)
    COMMITTING   blocks in the overlay: there; others: below    the overlay is empty (834), then removed (838)

Checkpoints are *stacked*: a next one may be prepared when the one before has switched, however far that is from being
copied.  Each has its overlay; the frozen chain of each is all that is below it.  Copies are made in the order of the
switches, each relative to the one before; an overlay goes down, the lowest first, as soon as its checkpoint is over.

A request: range check (``disk``) → gate (``epoch``): epoch, view, ticket → ``chain``: runs of blocks by layer →
``layer``/``fileio``: data, then live bits → ticket back.  A flush: bottom up, per layer: take the dirty map pages, sync
the data, write the pages, sync the map.

Modules, lowest first: ``blocks`` ``blockmap`` ``format`` (pure) · ``fileio`` ``epoch`` ``job`` · ``maps`` ``layer`` ·
``chain`` · ``commit`` ``fill`` ``copier`` ``stack`` · ``disk`` ``statefile`` · ``member`` · ``rounds`` ``background`` ·
``copying`` · ``group``.
``api`` and ``barrier`` are what others speak.

Rules
-----

* **D1** A frozen layer changes only by a commit that leaves every view's content the same.  *Kept by* views: a request
  keeps the one it was admitted with, and only the newest overlay is the target of an epoch after the switch.
* **D2** A bit durable ⇒ its whole block was durable before it; durably clear ⇒ the layer below holds every flushed
  version.  *Kept by* :meth:`layer.Overlay.flush` (pages are taken before the sync, so a bit set meanwhile waits), by
  two-slot pages, and by the commit, which makes the layer below durable before it clears a live bit.
* **D3** Flush and FUA answer when everything acknowledged before is durable in every layer.  *Kept by*
  :func:`chain.flush`; a sync under way is waited for, since it may be the one that covers our write.
* **D4** A copy-up waits for every older request on its block, of any epoch (812), and later ones wait for it: tickets.
* **D5** Everything passes the gate; a layer's files are closed, and a child reads them, after the epochs are drained.
* **D6** A guest's buffer is used before the call returns and never kept.
* **D7** A silent driver loses its lease, and the disks go back to rest; so do disks whose server finds overlays.
* **D8** Commit: :mod:`blkckpt.disk.commit`.
* **D9** A failed fsync is final for its file: :meth:`fileio.File.datasync`.  A failed map poisons its data.
* **D10** Errors carry the true errno.  A write that fails sets no bit; space for maps is taken before a bit is set.
* **D11** Zero and trim set bits over holes.  The last block may be short.
* **D12** One writer per VM; every file says what it is, and one that is torn or foreign is an error with its name.
* **D13** Changed bits are set before the data and believed only after a clean stop or on the same boot.  A block that
  an overlay hands down is marked in the map of the overlay's own period before its bit there is cleared, so a copy that
  reads overlays first and maps second misses nothing, whatever is committed meanwhile (:mod:`blkckpt.disk.member`).

Crash windows
-------------

*kill -9* loses nothing: data is in the page cache, bits are in a shared mapping on tmpfs, and the next server takes up
both.  Bits that a dead server wrote and did not sync are synced by the next flush.

*Power loss* keeps what was flushed.  Between the windows:

* prepare, before the state is replaced: files nobody names; swept.  After: an empty overlay; committed (nothing) back.
* switched: unflushed blocks of the overlay are gone, as on any disk; flushed ones are in its durable map and are
  committed back.  The checkpoint never existed, since its manifest was not written.
* manifest durable, commit not yet begun: the same; the checkpoint is whole and the disks lose nothing.
* in a window of the commit: see :mod:`blkckpt.disk.commit`.
* overlay empty, state still names it: committed (nothing) again.  State replaced, files still there: swept.
* file of a restored disk full, state not yet replaced: the fill finds nothing to do and ends.
* while a server opens its layers: a live map appears under its name only when it is whole, and changes that are not
  known go into a map of a new id, so a second death in the same boot deceives nobody.
"""
