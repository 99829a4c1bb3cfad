"""The agent of a host: works off the schedules of its VMs, for as long as the host is up.

(:mod:`blkckpt.agent` takes one checkpoint; this is what has one taken again and again.)

Data flow
=========
::

    blkckpt schedule ──> vms/NAME/schedule.json ──> host ──> task, one a VM ──> child: blkckpt checkpoint ──┐
                                                      │        │    ^             child: blkckpt prune       │
    blkckpt agent status ── control socket ───────────┤        │    └──── result (a file) ──────────────────┘
    Prometheus ── metrics socket, loopback port ──────┤        └──> vms/NAME/scheduled.json
    systemd ── signals, notifications ────────────────┘        └──> disk server: counters, for a quiet moment

==============  =======================================================================================
``schedule``    what the user wants; its file, and the command lines it means
``record``      what became of it so far; its file
``quiet``       the quietest moment of a window: a rule of optimal stopping.  Pure
``planner``     what to do next, and what an attempt does to the record.  Pure
``jobs``        children: started, waited for, ended, adopted
``readings``    questions to a VM's disk server, with short deadlines
``task``        one VM: a thread that decides, waits and runs children
``survey``      what the stores hold, measured now and then
``metrics``     what Prometheus is told
``exposition``  … over HTTP, on a unix socket and a port of the loopback
``service``     the agent's control socket, both ends
``notify``      systemd's notification protocol
``packaged``    units, a dashboard, alert rules
``host``        the whole: lock, threads, signals, the end
==============  =======================================================================================

Rules
=====
* **T1** to **T3** (:mod:`planner`): missed times are made good by one checkpoint; failures are retried later and later
  with their reason kept, and a VM that does not run is no failure; the clock may be set.
* **T4** The agent holds nothing that a checkpoint needs.  It is a process of its own, which takes back what it began
  when it is told to end; an agent that is killed leaves it alone, and the next one adopts it.
* **T5** One agent a home (a lock), one attempt a VM (its thread), so many at a time on the host (:class:`task.Turns`).
* **T6** Keep rules look only at checkpoints with the schedule's tags: what people took stays.
* **A2** holds: an attempt has the schedule's timeout, a child that is told to end 90 s, a disk server 2 s to answer.

Crash windows
=============
* Killed while it waits: the next agent reads the record; what was due meanwhile is made good by one.
* Killed during a checkpoint: adopted.  If that ended meanwhile, its result is in its file; with neither process nor
  result it has failed, and is tried again.
* Killed between a child's start and the record of it (microseconds): the next attempt is told that a checkpoint is
  being taken already, and is repeated after its pause.
* Killed while old checkpoints are removed: the child goes on; removing is safe to repeat (S5).
* nbdkit or QEMU killed: that is the supervisor's to mend.  The checkpoint under way fails, and is tried again.
* The machine loses power: the child is gone with it, and its result too (the run directory is volatile): a failure,
  tried again as soon as the VM runs.
"""
