"""blkckpt: checkpoints of running virtual machines, taken and used beneath stock QEMU.

The chapters are the docstrings of the packages:

* :mod:`blkckpt.disk` — layers, maps, the switch, drain, copy and commit (rules D1 to D13)
* :mod:`blkckpt.control` — the control socket of the disk server
* :mod:`blkckpt.store` — chunks, packs, images, manifests (rules S1 to S6)
* :mod:`blkckpt.vm` — QMP, the resume barrier, how a machine was started
* :mod:`blkckpt.memory` — QEMU's stream, memory images
* :mod:`blkckpt.agent` — the plan of a checkpoint and its runner (rules A1 to A3)
* :mod:`blkckpt.restore` — lazy, eager, revert
* :mod:`blkckpt.exchange` — NBD exports, image files, bundles for another host (rules X1 to X4)
* :mod:`blkckpt.view` — checkpoints as files, guests' files, differences (rules V1 to V6)
* :mod:`blkckpt.daemon` — schedules, and the agent of a host that works them off (rules T1 to T6)
* :mod:`blkckpt.cli` — the command line
"""

__version__ = "0.1.0"
