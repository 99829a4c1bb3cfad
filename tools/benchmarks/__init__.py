"""Benchmarks: blkckpt beside the programs it wants to be measured against, in one run on one machine.

Each bench is a module ``bench_NAME`` with ``DESCRIPTION`` and ``run(context) -> list[figures.Figure]``.  The rules:

* A peer is started by the bench, on the same data, and measured in turns with ours (round-robin), so that a noisy
  moment of the machine hits both.  A figure that is a ratio compares medians.
* Every sample is kept and written to the JSON; the table shows the median and the range.
* Data is prepared outside the measured time, dirty pages are written out before each sample.
* Nothing survives a run: every server, guest, directory and socket is removed, also on Ctrl-C.
"""
