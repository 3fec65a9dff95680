"""A checkpoint of a training as one file: a plain tar of `state.json` and what goes with it.

Written by a job's child into its own directory, whole or not at all and each under a name of its own
(`checkpoint-<epoch>.tar`), so that the daemon can take one while the child goes on with the next. Opened by
the child of a later attempt, which trusts none of it: only the daemon's sha256 says that it is the same file.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rvmcv_worker import framing

#: Why a training can be over.
ENDS = ("epochs", "patience", "time_limit")

#: The names that the daemon looks for; the number is how many epochs are done.
NAME = re.compile(r"checkpoint-(\d{1,9})\.tar")
#: How many are kept: the newest, and the one that the daemon may be reading.
_KEPT = 2
_STATE = "state.json"
_MAX_STATE_BYTES = 1024 * 1024
#: Epochs whose progress a checkpoint tells again, and how many of them in one message.
HISTORY_EPOCHS = 100
_EPOCHS_A_MESSAGE = 25


class CheckpointError(Exception):
    """A file that is no checkpoint to go on from; the message says why."""


@dataclass(frozen=True)
class Run:
    """What one child trained."""

    attempt: int
    epochs: int
    batch_size: int | None = None
    img_size: int | None = None


@dataclass(frozen=True)
class State:
    """How far a training is, over all its attempts."""

    epochs: int = 0
    #: One of `ENDS` when the training is over; None while there are epochs left.
    ended_by: str | None = None
    runs: tuple[Run, ...] = ()
    trained_s: float = 0.0
    #: What progress told of the last epochs: RVM-Server may not have heard of them when their attempt ended.
    history: tuple[dict[str, Any], ...] = ()

    @classmethod
    def parse(cls, found: dict[str, Any]) -> State:
        """Return the state that `found`, a stranger's JSON, holds; raises `CheckpointError`."""
        try:
            state = cls(
                **{
                    **found,
                    "runs": tuple(Run(**run) for run in found["runs"]),
                    "history": tuple(found["history"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"its {_STATE} cannot be read: {error}") from None
        numbers = [number for run in state.runs for number in vars(run).values() if number is not None]
        if not (
            all(type(number) is int and 0 <= number < 10**9 for number in (state.epochs, *numbers))
            and state.ended_by in (None, *ENDS)
            and isinstance(state.trained_s, (int, float))
            and state.trained_s >= 0
            and len(state.history) <= HISTORY_EPOCHS
            and all(isinstance(entry, dict) for entry in state.history)
        ):
            raise CheckpointError(f"its {_STATE} holds what no training says")
        return state

    def after(
        self, run: Run, history: Iterable[dict[str, Any]], *, trained_s: float, ended_by: str | None
    ) -> State:
        """Return the state after one more run, which began at this one and told `history`."""
        return State(
            epochs=self.epochs + run.epochs,
            ended_by=ended_by,
            runs=(*self.runs, run),
            trained_s=self.trained_s + trained_s,
            history=(*self.history, *history)[-HISTORY_EPOCHS:],
        )

    def history_again(self) -> Iterator[tuple[dict[str, Any], ...]]:
        """Yield the history in pieces that fit into a message each."""
        for start in range(0, len(self.history), _EPOCHS_A_MESSAGE):
            yield self.history[start : start + _EPOCHS_A_MESSAGE]

    def attempts(self) -> list[dict[str, Any]]:
        """Return the runs as a result lists them."""
        return [{key: value for key, value in asdict(run).items() if value is not None} for run in self.runs]


def write(directory: Path, state: State, files: Mapping[str, Path]) -> None:
    """Write `checkpoint-<epochs>.tar` of `state` and `files` (name in the tar -> where it lies now)."""
    part = directory / "checkpoint.part"
    text = json.dumps(framing.finite(asdict(state)), allow_nan=False).encode()
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(_entry(_STATE, len(text)), io.BytesIO(text))
        for name, path in files.items():
            with path.open("rb") as file:
                archive.addfile(_entry(name, path.stat().st_size), file)
    part.replace(directory / f"checkpoint-{state.epochs}.tar")
    for number in sorted(found(directory))[:-_KEPT]:
        (directory / f"checkpoint-{number}.tar").unlink()


def found(directory: Path) -> list[int]:
    """Return the epochs of the checkpoints in `directory`."""
    matches = (NAME.fullmatch(path.name) for path in directory.iterdir())
    return [int(match[1]) for match in matches if match]


def discard(directory: Path) -> None:
    """Remove the checkpoints in `directory`: the training starts from the beginning."""
    for number in found(directory):
        (directory / f"checkpoint-{number}.tar").unlink()


def unpack(path: Path, into: Path, names: frozenset[str]) -> State:
    """Write those of the files `names` that the checkpoint holds to `into`, and return its state.

    Raises `CheckpointError` for anything else in it: a link, a hole, a name twice or not in `names`.
    """
    state: State | None = None
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                if entry.name in seen or entry.name not in {*names, _STATE}:
                    raise CheckpointError(f"it holds {entry.name[:100]!r}, or holds it twice")
                if not entry.isreg() or entry.issparse():
                    raise CheckpointError(f"its {entry.name} is not a plain file")
                seen.add(entry.name)
                source = archive.extractfile(entry)
                assert source is not None  # a regular file has content
                if entry.name == _STATE:
                    state = State.parse(framing.parse_object(source.read(_MAX_STATE_BYTES)))
                else:
                    with (into / entry.name).open("xb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
    except (tarfile.TarError, framing.FramingError, EOFError, OSError) as error:
        raise CheckpointError(f"it cannot be read: {error}") from None
    if state is None:
        raise CheckpointError(f"it has no {_STATE}")
    return state


def _entry(name: str, size_bytes: int) -> tarfile.TarInfo:
    """Return an entry without anything about the place: no owner, no time."""
    entry = tarfile.TarInfo(name)
    entry.size = size_bytes
    return entry
