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

A checkpoint is *copied* into the store, as above, or *retained* (:mod:`retaining`): its frozen chain stays where it is
and is its disk, the overlay made for it is marked and becomes the lowest layer that takes writes, and overlays of later
checkpoints are committed down to it and no further.  Until it is flattened (copied after all) or given up; then the
overlay is free, and goes down like any other.

A request: range check (``disk``) → gate (``epoch``): epoch, view, ticket → ``chain``: runs of blocks by layer →
``layer``/``fileio``: data, then live bits → ticket back.  A flush: top down, take the dirty map pages of every layer;
then, bottom up, per layer: sync the data, write the pages, sync the map.

Modules, lowest first: ``blocks`` ``blockmap`` ``format`` ``fastpath`` (pure) · ``fileio`` ``claim`` ``epoch``
``job`` · ``maps`` ``layer`` · ``chain`` · ``commit`` ``fill`` ``copier`` ``port`` ``stack`` · ``disk`` ``statefile`` ·
``member`` · ``states`` · ``rounds`` ``background`` · ``copying`` ``leaving`` ``retaining`` · ``group``.
``api`` and ``barrier`` are what others speak.

Rules
-----

* **D1** A frozen layer changes only by a commit that leaves every view's content the same.  *Kept by* views: a request
  keeps the one it was admitted with, and only the newest overlay is the target of an epoch after the switch.
* **D2** A bit durable ⇒ its whole block was durable before it; durably clear ⇒ the layer below holds every flushed
  version.  *Kept by* :func:`chain.flush` (pages are taken before anything is synced, so a bit set or cleared meanwhile
  waits; what is below is synced before a page is written), and by two-slot pages.
* **D3** Flush and FUA answer when everything acknowledged before is durable in every layer.  *Kept by*
  :func:`chain.flush`; a sync under way is waited for, since it may be the one that covers our write.
* **D4** A copy-up waits for every older request on its block, of any epoch (812), and later ones wait for it: tickets.
* **D5** Everything passes the gate; a layer's files are closed, and a child reads them, after the epochs are drained.
* **D6** A guest's buffer is used before the call returns and never kept.
* **D7** A silent driver loses its lease, and the disks go back to rest; so do disks whose server finds overlays.
* **D8** Commit: :mod:`blkckpt.disk.commit`.
* **D9** A failed fsync is final for its file: :meth:`fileio.File.datasync`.  A failed map poisons its data.  Layers
  above take back what they handed down and no flush has covered: :meth:`layer.Overlay.take_back`; for a server that
  was killed before it could, the next one does: :func:`chain.take_back_of_killed`.
* **D10** Errors carry the true errno.  A write that fails sets no bit; space for maps is taken before a bit is set.
* **D11** Zero and trim set bits over holes.  The last block may be short.
* **D12** One writer per VM; every file says what it is, and one that is torn or foreign is an error with its name.
* **D13** Changed bits are set before the data and believed only after a clean stop or on the same boot.  A block that
  an overlay hands down is marked in the map of the overlay's own period before its bit there is cleared, so a copy that
  reads overlays first and maps second misses nothing, whatever is committed meanwhile (:mod:`blkckpt.disk.member`).

The fast path
-------------

An nbdkit filter in C (``plugins/fastpath``) may serve, in the same process and without the interpreter, what needs no
decision: reads of plain files, and writes, zeroes and trims that need no copy-up.  It takes no ticket and no lock.
What it has no view for, and every error, it passes on: the interpreter is complete without it.  Its rules (the C side
is ``core.c``; ours are :mod:`fastpath`, :mod:`port` and :mod:`epoch`):

* **F1** A request goes in (its thread's slot becomes odd), *then* looks at the view and at what is excluded.  Whoever
  changes those does so *first* and then settles: waits for the slots that were odd.  Both in the one order of
  sequentially consistent operations; so after a settle nobody acts on what was there before (D1, D5).
* **F2** A view in C's terms, and every file and map in it, lives until a settle after it was replaced.
* **F3** When several disks advance at one instant, all are closed to the fast path before the first advances: there is
  no moment at which a request of the new epoch on one disk can be answered and a later one on another meet the old.
* **F4** An armed view takes reads only: a change has to ask the barrier.
* **F5** A write to blocks of an exclusive ticket (copy-up, window of commit or fill) is passed on.  The ticket excludes
  them when it is drawn, and settles before it is used (D4, D8).  A write to blocks that the commit watches is noted
  before its data; who asks what was noted excludes all that is watched, and has settled.
* **F6** Order inside a change: changed bits, data, the file's dirty mark, present bits, the dirty marks of the map's
  pages (D2, D13).  A flush takes marks before what they stand for: pages, their bits, then the file's mark, the sync.
* **F7** A flush settles before it takes the dirty pages: a request may have set its bit and not yet marked the page,
  while another one, of the same block, has been answered because the bit was there (D3).
* **F8** Where the library is loaded every bit is changed by its atomic functions, from either side.  C never touches a
  page of bits that is not backed, nor sets a bit whose durable page has no space: what may find no space is ours (D10).
* **F9** Whatever goes wrong (a failed or short read or write, a poisoned file, an unknown disk) sets no bit, is passed
  on after the request has left, and is done again from the start by the interpreter, which knows the errno (D9, D10).

The same library stands in for some of libc's functions where nbdkit reads and writes its clients' sockets
(``wire.c``): at depth 32 their calls are most of what a request of 4 KiB costs.  It reads ahead, gathers the parts of
a reply, and holds replies back while requests are there that were read ahead.

* **F10** What was read ahead is read by the next reads of that socket, in order, and dies with it: when it is closed
  here, not in a child between ``vfork`` and ``exec``.
* **F11** What is held back leaves before whatever may wait for anything but a processor: a read that goes to the
  kernel, a request that goes to the interpreter, a read of data that is not in the page cache, a large transfer, a
  hole; and before the socket is shut down or closed.  So nobody who drains, or waits for a guest, waits for a reply.
* **F12** Nothing is held for longer than 0.1 ms of serving others, nor more than fits.
* **F13** A reply is held only while one thread alone reads its socket: F11 is about what that thread does next.
* **F14** A failure to send is told by the send that meets it, or by the next one; a read does not fail for it.

Crash windows
-------------

*kill -9* loses nothing: data is in the page cache, bits are in a shared mapping on tmpfs, and the next server takes up
both.  Bits that a dead server wrote and did not sync are synced by the next flush.

*Power loss* keeps what was flushed.  Between the windows:

* prepare, before the state is replaced: files nobody names; swept.  After: an empty overlay; committed (nothing) back.
* switched: unflushed blocks of the overlay are gone, as on any disk; flushed ones are in its durable map and are
  committed back.  The checkpoint never existed, since its manifest was not written.
* manifest durable, commit not yet begun: the same; the checkpoint is whole and the disks lose nothing.
* of a retained checkpoint: see :mod:`blkckpt.disk.retaining`.
* in a window of the commit: see :mod:`blkckpt.disk.commit`.
* overlay empty, state still names it: committed (nothing) again.  State replaced, files still there: swept.
* file of a restored disk full, state not yet replaced: the fill finds nothing to do and ends.
* while a server opens its layers: a live map appears under its name only when it is whole, and changes that are not
  known go into a map of a new id, so a second death in the same boot deceives nobody.
"""
