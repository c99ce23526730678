"""Opens a checkpoint's files: regular ones alone, that lie in its folder.

A pipe would wait for a writer, a device may have no end, and a link may lead anywhere.
"""

from __future__ import annotations

import errno
import os
import stat

_MOST_LINKS = 40

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_file(name: str, directory: int) -> int:
    """A handle to read the file of this name from, in the folder with the handle `directory`.

    A link to another name in the same folder is followed.

    Raises:
        OSError: there is none, it cannot be read, it is no regular file, or a link that leads out
            of the folder; `strerror` says which.
    """
    start = name
    for _ in range(_MOST_LINKS):
        mode = os.lstat(name, dir_fd=directory).st_mode
        if not stat.S_ISLNK(mode):
            check_regular(mode, start)
            # Not to wait, where a pipe has taken its place since.
            handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=directory)
            try:
                check_regular(os.fstat(handle).st_mode, start)
            except OSError:
                os.close(handle)
                raise
            return handle
        name = _linked(start, os.readlink(name, dir_fd=directory), directory)
    raise OSError(errno.ELOOP, "its links lead to each other", start)


def check_regular(mode: int, name: str) -> None:
    """Refuse what is no regular file, given its `st_mode`.

    Raises:
        OSError: it is none; says what it is.
    """
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, and no file", name)


def _linked(start: str, target: str, directory: int) -> str:
    """The name in the folder that a link leads to."""
    folder, name = os.path.split(target)
    if name in ("", ".", "..") or (folder and not _is_folder(folder, directory)):
        raise OSError(
            errno.EINVAL,
            f"it is a link to {target}, which is out of its folder: put the file itself there, as `cp -L` does",
            start,
        )
    return name


def _is_folder(path: str, directory: int) -> bool:
    try:
        there = os.stat(path, dir_fd=directory)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(directory))
