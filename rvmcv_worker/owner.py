"""What root does in a directory of the worker's user, it does as that user: no link there leads it astray."""

from __future__ import annotations

import os
from pathlib import Path


def become(directory: Path) -> None:
    """Take, for good, the rights of the user to whom `directory` belongs, if this process is root's.

    What it makes there is that user's too, whose daemon has to work with it. Raises `OSError`.
    """
    if os.geteuid() != 0:
        return
    owner = directory.lstat()
    if owner.st_uid == 0:
        owner = directory.stat()  # root's own link: the directory may have been moved to another disk
    if owner.st_uid == 0:
        return
    os.setgroups([])
    os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
