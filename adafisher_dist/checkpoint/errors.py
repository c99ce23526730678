"""What saves and loads raise."""

from __future__ import annotations

import errno

from adafisher_dist.printable import printable

_LONGEST_LINE = 3000


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 500]} … {line[-400:]}"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not fit. Raised on all ranks alike."""

    def __init__(self, problem: object = "") -> None:
        # Names in it may come from a file.
        super().__init__("\n".join(map(_shortened, printable(problem).split("\n"))))


# What helps, by the operating system's number of the error.
_REMEDIES = {
    errno.ENOSPC: "Free some room there, or save elsewhere; keep_last deletes old checkpoints.",
    errno.EDQUOT: "Free some room there, or save elsewhere; keep_last deletes old checkpoints.",
    errno.EACCES: "Give this user the permission (ls -ld tells who has it), or choose another folder.",
    errno.EPERM: "Give this user the permission (ls -ld tells who has it), or choose another folder.",
    errno.EROFS: "Choose a folder that can be written to, or mount this one so.",
    errno.EMFILE: "Raise the limit of open files, as by `ulimit -n 65536`.",
    errno.ENFILE: "The machine has too many files open: close some, or raise fs.file-max.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EIO: "The disk or its network failed: look at the kernel's log, and try again.",
    errno.ESTALE: "The network file system has lost the folder: mount it again, and try again.",
}


def reason(error: OSError) -> str:
    """What went wrong, without the error's number and the path."""
    return error.strerror or f"{error}"


def os_problem(error: OSError) -> str:
    """What went wrong, with the path and what to do: "PATH: No space left on device. Free …"."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    told = ": ".join([*([" → ".join(names)] if names else []), reason(error)])
    remedy = _REMEDIES.get(error.errno or 0)
    return told if remedy is None else f"{told}. {remedy}"
