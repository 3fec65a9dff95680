"""What an exit status of `rvmcv-worker` means."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit statuses, after sysexits.h where it has one."""

    OK = 0  #: stopped by wish, or all is well
    FAILED = 1  #: a check of the doctor or a job of the demo failed, or the worker did not do what was asked
    NOT_RUNNING = 69  #: a command for a running worker found none
    ALREADY_RUNNING = 75  #: another daemon works on the state directory
    NOT_ALLOWED = 77  #: the command is for root and for the worker's own user
    CONFIG = 78  #: the configuration cannot be used; systemd does not restart
    TIMED_OUT = 124  #: what was waited for did not come in time
