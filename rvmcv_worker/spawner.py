"""The one thread that starts every child."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Spawner:
    """Starts children from a thread that lives as long as the daemon.

    The kernel delivers a parent-death signal (bwrap's `--die-with-parent`) when the *thread* that
    started the process ends, not when its process does: see PR_SET_PDEATHSIG in prctl(2). A lane's thread
    that ended, or was replaced, would take a running training with it. From here children die exactly
    when the daemon does, by whatever cause.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        output: int,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start `argv` in a session of its own, stdout and stderr both to the descriptor `output`.

        It inherits `env` and `pass_fds` and nothing else. Raises `OSError` as `Popen` does.
        """
        return self._thread.submit(
            subprocess.Popen[bytes],
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        ).result()

    def close(self) -> None:
        """End the thread; every child that still runs behind a wall dies with it."""
        self._thread.shutdown()
