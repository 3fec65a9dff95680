"""A command as the installed service would run it: by its user, with its credentials.

What root sees would mislead: root builds walls where the service must not, and has no token, since systemd
hands that to the service alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rvmcv_worker.config import CREDENTIAL_FILES

USER = "rvmcv-worker"
#: Whence the unit has its `LoadCredential=`.
CREDENTIALS = Path("/etc/rvmcv-worker/credentials")
_BOOTED = Path("/run/systemd/system")


def command_line(arguments: Sequence[str]) -> list[str] | None:
    """Return what runs this program so; None without a service, or where one is it already."""
    systemd_run = shutil.which("systemd-run")
    if os.geteuid() != 0 or "CREDENTIALS_DIRECTORY" in os.environ or systemd_run is None:
        return None
    if not (_BOOTED.is_dir() and CREDENTIALS.is_dir()):
        return None
    files = [CREDENTIALS / name for name in CREDENTIAL_FILES.values()]
    properties = [f"User={USER}", f"Group={USER}"]
    properties += [f"LoadCredential={file.name}:{file}" for file in files if file.exists()]
    return [
        *(systemd_run, "--quiet", "--wait", "--pipe", "--collect", "--service-type=exec"),
        *(f"--property={each}" for each in properties),
        *(sys.executable, "-m", "rvmcv_worker.cli", *arguments),
    ]


def take_over(arguments: Sequence[str]) -> None:
    """Go on as that command; returns where there is none."""
    if command := command_line(arguments):
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted
