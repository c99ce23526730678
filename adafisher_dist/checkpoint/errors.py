"""What saves and loads raise."""

from __future__ import annotations

import errno

from adafisher_dist.printable import printable

_LONGEST_LINE = 3000

# What to do about a damaged checkpoint.
ANOTHER = "Load another checkpoint of its folder, by its name, or copy this one again from where it is whole."


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 500]} … {line[-400:]}"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not fit. Raised on all ranks alike."""

    def __init__(self, problem: object = "") -> None:
        # Names in it may come from a file.
        super().__init__("\n".join(map(_shortened, printable(problem).split("\n"))))


def damaged(what: object, why: object, then: str = "") -> CheckpointError:
    """The error for a file or folder that is not what a save wrote.

    Args:
        what: its path.
        why: what is wrong with it.
        then: what was not done, a sentence.
    """
    return CheckpointError(f"{what} is damaged: {why}. {then}{' ' if then else ''}{ANOTHER}")


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
    return ": ".join([*([" → ".join(names)] if names else []), reason_and_remedy(error)])


def reason_and_remedy(error: OSError) -> str:
    """The same without the path."""
    remedy = _REMEDIES.get(error.errno or 0)
    return reason(error) if remedy is None else f"{reason(error)}. {remedy}"
