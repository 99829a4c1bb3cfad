"""The control socket of the disk server: how a checkpoint is driven, watched, and taken back.

Purpose
=======
nbdkit serves a VM's disks; in the same process a control server listens on ``control.sock`` in the VM's run
directory.  The agent drives checkpoints through it, ``blkckpt status`` watches, the supervisor stops the server.
It is a unix socket, 0600 in a 0700 directory; the kernel's word for the peer's uid (``SO_PEERCRED``) must be ours.

Data flow
=========
::

    client ──line of JSON, maybe a descriptor──> server ──typed parameters──> service ──> DiskGroup
    (agent)                                      (a thread each connection)   (verbs)     (blkckpt.disk)
           <──line of JSON: result or error───

==========  =============================================================================================
``wire``     framing: JSON-RPC 2.0, one message a line, at most 1 MiB; errors to and from classes.  Pure
``messages`` what each verb takes and gives, typed and bounded.  Pure
``server``   accepts, checks the peer, cuts, calls, answers; at most 32 connections.  Knows no verb
``client``   one method a verb, a deadline on each
``service``  verbs to the disk group; who drives, and what happens when the driver is gone
``host``     what lives in the nbdkit process: group, server, exports.  The plugin adapts nbdkit to it
``quitter``  ends nbdkit although clients are connected
==========  =============================================================================================

Verbs
=====
``hello`` comes first on every connection.  Steps are those of the procedure in :mod:`blkckpt.disk`.  "Driver" is
the connection that prepared a checkpoint; each drives its own, and what it asks is about that one.

============  ===========================  =================================================  ===========
verb          parameters                   answer                                             who may
============  ===========================  =================================================  ===========
``hello``     version, client              version, server, vm, pid, disks {name: {size}}     all
``status``    —                            the group's status (:class:`api.GroupStatus`):     all
                                           state, checkpoint, violation, instant (of the
                                           newest), rounds (every checkpoint under way, with
                                           its driver), job with progress, warning, disks
                                           with layers and counters; driver {pid, client} or
                                           null
``prepare``   checkpoint, retain (false)   {}     step 802; takes the lease                   all
``arm``       deadline (s); 1 descriptor   {}     flushes, then watches the QMP socket that   driver
                                           comes along (step 810 at the resume barrier)
``switch``    mode ``now`` | ``barrier``   switched, waiting, violation, instant (monotonic   driver
                                           ns).  ``barrier`` asks and switches if it passed
``disarm``    —                            {}     back to prepared                            driver
``copy``      store, parents {disk:        job    step 830; the job's result is               driver
              image | null}, rate (B/s)    {disks: {name: {image, size, new, …}}}
``retain``    store, id, images {disk:     job    instead of ``copy``: the chains stay as     driver
              image}                              those images; the same result
``flatten``   checkpoint, rate (B/s)       job    copies a retained checkpoint into its       all
                                                  store; ends with the connection
``review``    —                            job    lets go of what is not retained any more    all
``commit``    —                            job    step 834, when the manifest is durable      driver
``abort``     —                            job    gives the driver's checkpoint up; asked by  all
                                           anybody else: all that are under way
``wait``      job, timeout (≤ 30 s)        job, state ``running`` | ``done`` | ``failed``,    all
                                           progress {done, total}, result, error
``shutdown``  —                            {}     the server stops after the answer           all
============  ===========================  =================================================  ===========

An error is JSON-RPC's, with code ``-32000 - exit_code`` and data ``{"type": class in blkckpt.errors, "errno"}``;
the client raises that class again.  The protocol's version is one number, said in ``hello``; another one is
refused with a reason, since server and command are of one package.

Rules
=====
* **D7** The driver may vanish at any moment.  Its connection ends: ``abort`` at once.  It hangs, saying nothing for
  60 s: the group aborts by itself.  Any message of the driver renews the lease.  A commit that has begun is not
  undone; it needs no driver.
* Nothing that comes in is trusted with memory or descriptors: messages, nesting, connections and descriptors are
  bounded, and a descriptor that no verb claimed is closed.
* The listening sockets belong to the launcher (:mod:`blkckpt.agent.supervisor`), which hands them to the next nbdkit
  when one dies.  A client that connects between the two waits in the queue; one that was connected gets
  :class:`client.GoneError` and connects again.

Crash windows
=============
* The server is killed: nothing here is durable.  The next one opens the group, which decides from its own state what
  to resume and what to take back; it has no driver, and the agent's checkpoint has failed.
* The server is stopped in the middle of a checkpoint: as when it is killed, after a flush.
* The client is killed between sending ``commit`` and hearing its answer: the commit goes on.
"""
