"""The tree of errors.

Every error a user can cause or meet is a :class:`BlkckptError`: one line that says what was being done, to
what, and what to do now.  The exit code of the command line and the errno that a guest or an NBD client sees
live on the class.  The cause is kept with ``raise ... from``.

Exit codes (documented in the README; 2 is the command-line library's own code for a wrong call):

====  ======================================================================
 0    done
 1    the operation failed (an environment or I/O error, an internal error)
 2    wrong usage: an unknown option, a missing argument
 3    bad input: a name, size, path or file that cannot be what it should be
 4    no such thing: VM, checkpoint, store
 5    busy or in the wrong state: try again, or do first what the message says
 6    damaged data: a store, map, state file, stream or message that is not whole
 7    the hypervisor refused or failed
 8    no space left (store, overlay, run directory)
 9    not permitted
 10   something this machine lacks (``blkckpt doctor`` says what)
 130  interrupted (Ctrl-C), cleaned up
====  ======================================================================
"""

from __future__ import annotations

import errno


class BlkckptError(Exception):
    """Base of all expected errors.  ``str()`` is one line, fit for a user."""

    exit_code = 1
    errno = errno.EIO


class InputError(BlkckptError):
    """A name, size, path or option value that cannot be used."""

    exit_code = 3
    errno = errno.EINVAL


class NotFoundError(BlkckptError):
    """A VM, disk, checkpoint or store that is not there."""

    exit_code = 4
    errno = errno.ENOENT


class StateError(BlkckptError):
    """The request does not fit the present state (busy, already running, not running)."""

    exit_code = 5
    errno = errno.EBUSY


class CorruptError(BlkckptError):
    """Data on disk or on the wire that is torn, foreign or of a newer version."""

    exit_code = 6
    errno = errno.EIO


class ProtocolError(CorruptError):
    """A peer (control client, QMP, memory stream) broke its protocol."""


class HypervisorError(BlkckptError):
    """QEMU refused a command, failed, or vanished."""

    exit_code = 7


class NoSpaceError(BlkckptError):
    """ENOSPC or EDQUOT somewhere that must be said by name."""

    exit_code = 8
    errno = errno.ENOSPC


class AccessError(BlkckptError):
    """A file, directory or peer that is not the owner's, or permissions that are too wide."""

    exit_code = 9
    errno = errno.EACCES


class MissingError(BlkckptError):
    """A program, library or kernel feature that this machine lacks."""

    exit_code = 10
    errno = errno.ENOSYS


class DeadlineError(BlkckptError):
    """A wait reached its deadline (rule A2: every wait has one)."""

    exit_code = 7
    errno = errno.ETIMEDOUT


class PoisonedError(BlkckptError):
    """An fsync of this file failed; its contents are not trusted until restart (rule D9)."""

    errno = errno.EIO


def from_os_error(error: OSError, doing: str) -> BlkckptError:
    """Turn *error* into the class that has its exit code, saying what was being done.

    ENOSPC and EDQUOT become :class:`NoSpaceError`, EACCES and EPERM :class:`AccessError`, ENOENT
    :class:`NotFoundError`, anything else :class:`BlkckptError` with the same errno.  Raise the result
    ``from error``.
    """
    message = f"{doing}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"{message}; free some space and try again")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessError(message)
    if error.errno == errno.ENOENT:
        return NotFoundError(message)
    result = BlkckptError(message)
    if error.errno is not None:
        result.errno = error.errno
    return result


def describe(error: BaseException, what: str = "") -> dict[str, object]:
    """*error* for another process: ``{"type", "message", "errno"}``.  One that is none of ours is put after *what*."""
    ours = isinstance(error, BlkckptError)
    message = str(error) if ours else f"{what}{type(error).__name__}: {error}"
    return {"type": type(error).__name__, "message": message, "errno": getattr(error, "errno", None) if ours else None}
