"""Several processes of one training, a rank for each GPU: torchrun starts this very child in each.

The process that the daemon started launches the ranks and waits for them. Rank 0 speaks for all; the
others are heard only when they fail. Any rank's end ends all.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvmcv_worker import errors

if TYPE_CHECKING:
    from rvmcv_worker.compute.child import Child

#: Exit status when a rank died without a word: no result, so the daemon quotes the log's last lines.
CRASHED = 3
#: As the daemon starts its children: no user site, no PYTHON* variables, no `__pycache__`.
_PYTHON = (sys.executable, "-I", "-B", "-u", "-X", "faulthandler")


def own_rank() -> int | None:
    """Return which rank this process is; None in one that torchrun did not start."""
    found = os.environ.get("RANK")
    return None if found is None else int(found)


def job_name(rank: int | None) -> str:
    """Return the file that says what a process is to do."""
    return "job.json" if rank is None else "rank-job.json"


def result_name(rank: int | None) -> str:
    """Return the file in which a process leaves its result."""
    return "result.json" if rank is None else f"rank{rank}.json"


def open_progress(progress_fd: int, rank: int) -> int:
    """Open the daemon's progress pipe, which torchrun does not pass on, in rank 0; nothing in the others."""
    path = os.devnull if rank else f"/proc/{os.getppid()}/fd/{progress_fd}"
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def launch(count: int, child: Child, job: dict[str, Any]) -> dict[str, Any]:
    """Run `job` in `count` ranks of this child and return rank 0's result.

    Raises the `JobError` that caused the end, or `StopRequestedError`; ends this process when a rank died
    without a word.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from rvmcv_worker.compute.child import StopRequestedError

    (child.directory / job_name(0)).write_text(json.dumps(job))
    for rank in range(count):
        (child.directory / result_name(rank)).unlink(missing_ok=True)
    # Behind the wall there is the loopback alone, and a host name that leads nowhere.
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"})
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    options = ["--nnodes=1", f"--nproc-per-node={count}", "--max-restarts=0", "--local-addr=127.0.0.1"]
    options += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--no-python"]
    heed_sigterm = signal.getsignal(signal.SIGTERM)
    silent: dict[int, int] = {}
    child.check_stop()  # from here on torchrun listens for SIGTERM
    try:
        torchrun.main([*options, *_PYTHON, "-m", "rvmcv_worker.compute.child", child.directory.name])
    except SignalException:
        raise StopRequestedError from None  # the ranks were asked too
    except ChildFailedError as error:
        silent = {rank: failure.exitcode for rank, failure in error.failures.items()}
    finally:
        signal.signal(signal.SIGTERM, heed_sigterm)
    answers = {rank: _read(child.directory / result_name(rank)) for rank in range(count)}
    first = answers[0]
    if not silent and first and first.get("ok"):
        result: dict[str, Any] = first["result"]
        return result
    raise _cause(answers, silent)


def _cause(answers: dict[int, dict[str, Any] | None], exits: dict[int, int]) -> BaseException:
    """Return why the ranks ended: what one says of its own fault, before what followed from it.

    When one rank ends, the others see nothing but a broken connection, and call that internal.
    """
    told = []
    for answer in answers.values():
        if answer and "error" in answer:
            error = errors.from_code(answer["error"]["code"], answer["error"]["message"])
            error.detail = answer.get("detail")
            if not isinstance(error, errors.InternalError):
                return error
            told.append(error)
    silent = {rank: status for rank, status in exits.items() if answers[rank] is None}
    for rank, status in sorted(silent.items()):
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        sys.stderr.write(f"rank {rank} of {len(answers)} ended with {how} and without a word\n")
    return told[0] if told and not silent else SystemExit(CRASHED)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found
