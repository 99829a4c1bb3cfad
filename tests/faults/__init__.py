"""What goes wrong: power cuts, full disks, failing syncs.

Simulated power loss (rules D2, D3, D8, S1, S2).  ``recorder.c`` is preloaded into a workload and logs every call
that changes a file or makes one durable; :mod:`tests.faults.crash` replays the log up to any point and keeps of
the unsynced part a random, reordered, torn subset; the product recovers from the files that result; and what it
then says is compared with :mod:`tests.faults.ledger`, which knows what had been acknowledged and flushed.

Every harness here is shown to work by negative controls: the same log with a sync moved or left out, as a
careless implementation would have made it, must be caught.
"""
