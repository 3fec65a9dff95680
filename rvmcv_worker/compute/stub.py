"""A job for trials: as a training to the daemon, but without torch, and able to misbehave in every way.

    {"task": "stub", "steps": 5, "step_s": 0.01, "then": "complete", "payload_bytes": 4096}

Each epoch reports ``loss``, "nan" too. With ``"checkpoint_steps": n`` it leaves a checkpoint after every n
steps, after the last, and when it is stopped, and goes on from that of an earlier attempt. With ``ranks`` it
runs in so many processes.

`then` is a name of `ENDINGS`, followed in every attempt or only in that of number ``then_in``; ``rank_then``
gives some ranks an ending of their own, as in ``{"1": "segfault"}``. Those that eat or flood stop at
``at_most_bytes`` and then complete, so that a limit that does not work shows as a job that completes.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rvmcv_worker import errors
from rvmcv_worker.compute import checkpoint_file, ranks
from rvmcv_worker.compute.checkpoint_file import HISTORY_EPOCHS, CheckpointError, Run, State
from rvmcv_worker.compute.child import Child, StopRequestedError

_CHUNK_BYTES = 16 * 1024 * 1024


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Report `steps` epochs of `step_s` seconds, write a model of `payload_bytes`, end as `then` says."""
    if job.get("ranks", 1) > 1 and child.rank is None:
        return ranks.launch(int(job["ranks"]), child, job)
    steps, step_s = int(job.get("steps", 5)), float(job.get("step_s", 0.01))
    attempt = int(job.get("attempt", 1))
    then = job.get("rank_then", {}).get(str(child.rank), job.get("then", "complete"))
    ending = ENDINGS.get(then)
    if ending is None:
        raise errors.InvalidJobError(f"then = {then!r} is not one of {', '.join(sorted(ENDINGS))}")
    if job.get("then_in", attempt) != attempt:
        ending = _complete
    state = left_off = _left_off(job, child)
    every = 0 if child.rank else int(job.get("checkpoint_steps", 0))  # rank 0 speaks for all
    child.report(phase="train", fraction=state.epochs / max(steps, 1), epoch=state.epochs, epochs=steps)
    for entries in left_off.history_again():
        child.report(phase="train", history=entries)
    told: deque[dict[str, Any]] = deque(maxlen=HISTORY_EPOCHS)
    for step in range(left_off.epochs + 1, steps + 1):
        child.stop_requested.wait(step_s)
        try:
            child.check_stop()
        except StopRequestedError:
            if every and state is not left_off:
                _leave(child, state)
            raise
        loss = float(job.get("loss", round(1 / step, 5)))
        told.append({"epoch": step, "epochs": steps, "losses": {"box_loss": loss}, "epoch_s": step_s})
        child.report(
            phase="train",
            fraction=step / steps,
            epoch=step,
            epochs=steps,
            losses={"box_loss": loss},
            history=[told[-1]],
        )
        run = Run(attempt=attempt, epochs=step - left_off.epochs)
        ended_by = "epochs" if step == steps else None
        state = left_off.after(run, told, trained_s=step_s * run.epochs, ended_by=ended_by)
        if every and (step % every == 0 or ended_by):
            _leave(child, state)
    model = str(job.get("model", "model.bin"))
    (child.directory / model).write_bytes(payload(int(job.get("payload_bytes", 4096))))
    ending(job, child)
    return {
        "model": model,
        "metrics": {"mAP50": 0.5, "mAP50-95": 0.25, "fitness": 0.25, "loss": float(job.get("loss", 0.0))},
        "files": [model],
        "effective": {"steps": steps, "step_s": step_s},
        "versions": {},
        "epochs": steps,
        "attempts": state.attempts(),
        "ended_by": "epochs",
    }


def _left_off(job: dict[str, Any], child: Child) -> State:
    if job.get("resume"):
        try:
            return checkpoint_file.unpack(child.root / job["resume"], child.directory, frozenset())
        except CheckpointError as error:
            sys.stdout.write(f"the checkpoint cannot be used, the job starts from the beginning: {error}\n")
    if not child.rank:
        checkpoint_file.discard(child.directory)
    return State()


def _leave(child: Child, state: State) -> None:
    checkpoint_file.write(child.directory, state, {})
    child.report(checkpoint={"epoch": state.epochs})


def payload(size_bytes: int) -> bytes:
    """Return the model's content: the same for the same size, and not compressible."""
    return hashlib.shake_256(b"rvmcv-worker stub").digest(size_bytes)


def _complete(_job: dict[str, Any], _child: Child) -> None:
    """End as a job should."""


def _fail(job: dict[str, Any], _child: Child) -> None:
    raise errors.from_code(
        job.get("error_code", "dataset_invalid"), job.get("message", "the stub was told to fail")
    )


def _bug(_job: dict[str, Any], _child: Child) -> None:
    raise RuntimeError("the stub was told to have a bug")


def _bug_when_stopped(_job: dict[str, Any], child: Child) -> None:
    """Fail as one rank does when another ends."""
    child.stop_requested.wait()
    raise RuntimeError("the stub was told to have a bug")


def _exit(job: dict[str, Any], _child: Child) -> None:
    os._exit(int(job.get("exit_code", 3)))


def _segfault(_job: dict[str, Any], _child: Child) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(_job: dict[str, Any], child: Child) -> None:
    """Wait forever, but end when asked to."""
    child.stop_requested.wait()
    child.check_stop()


def _ignore_sigterm(_job: dict[str, Any], _child: Child) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Event().wait()


def _setsid_grandchild(job: dict[str, Any], child: Child) -> None:
    """Leave a process in a session of its own (see `grandchild.pid`); complete, or ``stay``."""
    sleeper = (
        "import signal, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN); threading.Event().wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
    (child.directory / "grandchild.pid").write_text(str(process.pid))
    process.returncode = 0  # left behind on purpose: no warning about it when this object goes
    if job.get("stay"):
        _ignore_sigterm(job, child)


def _garbage_progress(_job: dict[str, Any], child: Child) -> None:
    os.write(child.progress_fd, b"\x00\x00\x00\x10this is not JSON" * 8)


def _huge_progress(_job: dict[str, Any], child: Child) -> None:
    """Announce a header of 4 GB."""
    os.write(child.progress_fd, b"\xff\xff\xff\xff{")


def _deep_progress(_job: dict[str, Any], child: Child) -> None:
    text = b"[" * 30_000 + b"]" * 30_000
    os.write(child.progress_fd, len(text).to_bytes(4, "big") + text)


def _foreign_checkpoint(_job: dict[str, Any], child: Child) -> None:
    """Name somebody else's object as its checkpoint."""
    child.report(checkpoint={"path": "s3://datasets/secret.zip", "sha256": "0" * 64, "epoch": 1})


def _link_checkpoint(job: dict[str, Any], child: Child) -> None:
    """Put a link where its newest checkpoint belongs, and crash."""
    path = child.directory / "checkpoint-999.tar"
    path.symlink_to(str(job.get("target", "/etc/passwd")))
    child.report(checkpoint={"epoch": 999})
    os._exit(3)


def _flood_progress(job: dict[str, Any], child: Child) -> None:
    for number in range(int(job.get("messages", 1_000_000))):
        child.report(phase="train", message=f"line {number}")


def _flood_log(job: dict[str, Any], _child: Child) -> None:
    line = b"\x1b[31m<0>a line that goes on and on " + b"x" * 200 + b"\n"
    block = line * 256
    for _ in range(_at_most_bytes(job) // len(block)):
        os.write(1, block)


def _eat_memory(job: dict[str, Any], child: Child) -> None:
    eaten = []
    for _ in range(_at_most_bytes(job) // _CHUNK_BYTES):
        eaten.append(b"\x01" * _CHUNK_BYTES)  # not zeros: those would cost no memory
        child.check_stop()


def _fill_disk(job: dict[str, Any], child: Child) -> None:
    with (child.directory / "fill.bin").open("wb", buffering=0) as stream:
        for _ in range(_at_most_bytes(job) // _CHUNK_BYTES):
            stream.write(b"\x01" * _CHUNK_BYTES)
            child.check_stop()
    if job.get("stay"):
        _hang(job, child)


def _fill_inodes(job: dict[str, Any], child: Child) -> None:
    """Make `files` empty files, a thousand to a directory."""
    for number in range(int(job.get("files", 1_000_000))):
        directory = child.directory / f"many-{number // 1000}"
        if number % 1000 == 0:
            directory.mkdir()
            child.check_stop()
        (directory / str(number)).touch()


def _sparse_file(job: dict[str, Any], child: Child) -> None:
    """Write a byte far beyond the end of a file."""
    with (child.directory / "sparse.bin").open("wb") as stream:
        stream.truncate(_at_most_bytes(job))


def _no_result(_job: dict[str, Any], _child: Child) -> None:
    os._exit(0)


def _write_result_and_exit(text: bytes) -> Callable[[dict[str, Any], Child], None]:
    def ending(_job: dict[str, Any], child: Child) -> None:
        (child.directory / "result.json").write_bytes(text)
        os._exit(0)

    return ending


def _replace_with(
    make: Callable[[str, Path], None], name: str | None = None
) -> Callable[[dict[str, Any], Child], None]:
    """Return an ending that puts something else where the model (or the file `name`) is expected.

    ``job["target"]`` is what links point to.
    """

    def ending(job: dict[str, Any], child: Child) -> None:
        path = child.directory / (name or job.get("model", "model.bin"))
        path.unlink(missing_ok=True)
        make(str(job.get("target", "/etc/passwd")), path)
        if name == "result.json":
            os._exit(0)

    return ending


def _at_most_bytes(job: dict[str, Any]) -> int:
    return int(job.get("at_most_bytes", 4 * 1024**3))


#: What a stub can do after its steps.
ENDINGS: dict[str, Callable[[dict[str, Any], Child], None]] = {
    "complete": _complete,
    "fail": _fail,
    "bug": _bug,
    "bug_when_stopped": _bug_when_stopped,
    "exit": _exit,
    "segfault": _segfault,
    "hang": _hang,
    "ignore_sigterm": _ignore_sigterm,
    "setsid_grandchild": _setsid_grandchild,
    "garbage_progress": _garbage_progress,
    "huge_progress": _huge_progress,
    "deep_progress": _deep_progress,
    "foreign_checkpoint": _foreign_checkpoint,
    "link_checkpoint": _link_checkpoint,
    "flood_progress": _flood_progress,
    "flood_log": _flood_log,
    "eat_memory": _eat_memory,
    "fill_disk": _fill_disk,
    "fill_inodes": _fill_inodes,
    "sparse_file": _sparse_file,
    "no_result": _no_result,
    "garbage_result": _write_result_and_exit(b"\x00 this is not JSON"),
    "deep_result": _write_result_and_exit(b"[" * 100_000 + b"]" * 100_000),
    "link_result": _replace_with(lambda target, path: path.symlink_to(target)),
    "hard_link_result": _replace_with(os.link),
    "fifo_result": _replace_with(lambda _target, path: os.mkfifo(path)),
    "directory_result": _replace_with(lambda _target, path: path.mkdir()),
    "missing_result": _replace_with(lambda _target, _path: None),
    "link_result_json": _replace_with(lambda target, path: path.symlink_to(target), name="result.json"),
    "fifo_result_json": _replace_with(lambda _target, path: os.mkfifo(path), name="result.json"),
}
