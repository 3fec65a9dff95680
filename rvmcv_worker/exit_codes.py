"""What an exit status of `rvmcv-worker` means."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit statuses, after sysexits.h where it has one."""

    OK = 0  #: stopped by wish, or all is well
    FAILED = 1  #: a check of the doctor or a job of the demo failed
    ALREADY_RUNNING = 75  #: another daemon works on the state directory
    CONFIG = 78  #: the configuration cannot be used; systemd does not restart
