"""The checkpoint store: content-addressed, immutable, one directory.

What it is
    A *checkpoint* is one **manifest**.  It names **images**: of each disk, of each block of memory, and of the
    migration stream without its pages.  An image is a table of 64 KiB **chunks**; a chunk is kept once, whatever
    image of whatever VM it occurs in, and compressed; a chunk of zeros is not kept at all.  Chunks lie in **packs**,
    large files that are appended to until they are sealed and never change afterwards.

::

    store.json                     what kind of store this is                        (layout)
    manifests/VM/NAME.json         a checkpoint                                      (manifest)
    labels/VM/NAME.json            its tags, notes and pin, which may change         (labels)
    evidence/VM/NAME.json, .png    whether it lives when resumed, its guest's screen (evidence)
    pins/OWNER.json                images in use without a manifest                  (pins)
    images/xx/ID.image             an image: header and directory of leaves          (layout)
                                   or a reference to layers that a VM keeps          (reference)
    packs/xx/ID.pack               chunks and leaves, an index, a trailer            (layout, packs)
    index/N.sqlite                 hash → place; a cache, may be deleted             (index)
    tmp/                           packs being written; residue of killed writers    (backend)
    lock                           writers shared, the collector exclusive           (lock)
    gc.lock, labels.lock           one collection, one change of labels at a time    (lock)

Data flow
    ``Store.image_writer`` → :mod:`writer` (workers hash, look up, compress; one appender) → :mod:`packs`,
    :mod:`leaves` → image table.  ``Store.put_manifest`` publishes, with what :mod:`contents` sees
    on the disks and in the memory skeleton.  ``Store.image`` → :mod:`images` reads: directory →
    leaf → chunk, one ranged read each, O(1) whatever the size.  :mod:`retention` decides which checkpoints stay;
    :mod:`collect` deletes what, by :mod:`marks`, nothing needs, and has :mod:`repack` rewrite packs that are mostly
    dead; :mod:`check` verifies, :mod:`usage` accounts, :mod:`ingest` (a process of its own) copies frozen disks in.

    The disks of a *retained* checkpoint are not here: under the id of each image stands a **reference** to layers in
    the home of its VM, and ``Store.image`` reads those (:mod:`retained`).  Flattened, the table takes its place.
    Whether a VM is to keep them is for the manifest to say (:mod:`keeping`).

    A **leaf** is the entries of 512 chunks, and is stored as a chunk.  An image that differs from its parent in one
    chunk therefore costs that chunk, one leaf and a directory; two images are compared by their directories, and
    below that by the leaves that differ, without reading data.  Reading needs no index and no lock.

Rules
    * **S1** The rename of the manifest, with the sync of its directory, is the only commit point.
    * **S2** A manifest references durable files only.
    * **S3** The hash of every chunk and leaf is checked whenever it is read, and by ``verify``.
    * **S4** Nothing in a store is trusted: sizes, names, offsets and compressed lengths are bounded before use.
    * **S5** Deleting never removes what another manifest needs; it may be interrupted anywhere and repeated.
    * **S6** The backend interface is narrow: put, append, ranged get, list, delete of immutable objects.

Write order
    1. Packs, under temporary names, while data arrives.  A full pack: index and trailer, fsync, rename, directory
       fsync.  Only then do its chunks enter the index, where others find them.
    2. The image's table, when all its packs are durable: written, fsync, rename, directory fsync.
    3. The manifest, when all its images are durable: written, fsync, link (it never replaces one), directory fsync.

    ``put_manifest`` looks once more whether every image is there, and notes what is used of it and what a memory
    skeleton holds; it is the only commit point.

Crash windows
    *While a pack is written.*  The temporary file stays in ``tmp``.  It is locked while its writer lives; ``collect``
    removes the unlocked ones.  Nothing refers to it.

    *Between the rename of a pack and the table.*  The pack is whole and nothing needs it: garbage.  Its chunks may be
    found by later writers, which is welcome; otherwise ``collect`` deletes it.  If the index was not told, the next
    writer reads the pack's own index (``reconcile``).

    *Between the table and the manifest.*  The image is whole and nothing names it: garbage.  Whoever was to put the
    manifest held the store's lock (``Store.hold``); with its death the lock is gone, and ``collect`` may delete.

    *While the manifest is put.*  Before the link there is no checkpoint (and perhaps a ``.tmp-`` file, which
    ``collect`` removes).  After the link and before the directory's sync a power cut leaves either; what the
    manifest names is durable in both cases, and the caller has not yet been told.

    *While a checkpoint is removed.*  Its manifest is there or not; the data is not touched.

    *While packs are repacked.*  New packs are durable before a table names them, tables are replaced one by one, and
    what was emptied goes with a sweep afterwards: in between an image reads from the old places or the new ones, and
    both are there (:mod:`repack`).

    *While a retained checkpoint is taken or flattened.*  References precede the manifest, tables replace references,
    each by one rename, before the manifest says that it is not retained any more: whatever is there can be read.

    *While labels are changed.*  The old ones or the new ones are there.  Those a checkpoint is taken with precede its
    manifest; without it they count for nothing and are collected.

    *While garbage is collected.*  Images are deleted before packs, so an image that is there has all its packs.
    Everything deleted was needed by nothing, and nothing can come to need it: writers are kept out.  The next
    collection works it all out anew.

    *While the index is written.*  It is SQLite in WAL mode; a crash loses rows at most.  Lost or damaged, it costs
    duplicates or a rebuild, never data.

    *While the index is rebuilt.*  The new one appears complete under the next number.

Who may do what at once
    Any number of writers (each has its own pack) and readers, in any number of processes; one collection.  It waits
    for writers and keeps new ones waiting while it deletes; while it repacks it keeps nobody waiting.  Within one
    process, a writer's images are protected from its first chunk until the manifest or ``Store.abandon``; a process
    whose *children* write images takes ``Store.hold`` around all of it.  A reader whose image is repacked under it
    finds the pack gone, reads the table again and goes on.  One whose checkpoint is removed and collected gets an
    error, never wrong bytes; what must not lose its images takes a pin.
"""
