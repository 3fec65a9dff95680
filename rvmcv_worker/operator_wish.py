"""What the operator wants of this worker, kept on disk so that a restart does not undo it."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from rvmcv_worker.events import Event, event
from rvmcv_worker.protocol import DesiredState
from rvmcv_worker.state import Condition

#: One word of `DesiredState`; no file means `run`.
FILE_NAME = "operator-wish"
_SAID = {
    DesiredState.RUN: "resumed: the worker claims again, unless RVM-Server wishes otherwise",
    DesiredState.PAUSE: "paused: nothing is claimed until it is resumed, running jobs go on",
    DesiredState.DRAIN: "drained: nothing is claimed until it is resumed, running jobs are handed back",
}
#: How the log calls what is wished for.
WISHES = {
    DesiredState.RUN: Event.WORKER_RESUMED,
    DesiredState.PAUSE: Event.WORKER_PAUSED,
    DesiredState.DRAIN: Event.WORKER_DRAINED,
}


class OperatorWish:
    """Follows the operator's wish and writes it down; safe for several threads."""

    def __init__(self, state_dir: Path, condition: Condition) -> None:
        self._file = state_dir / FILE_NAME
        self._condition = condition
        self._lock = threading.Lock()

    def restore(self) -> None:
        """Follow the wish of before this start."""
        try:
            text = self._file.read_text(encoding="utf-8").strip()
            wish = DesiredState(text)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            # Somebody wished for something: claiming could be the very thing that they wanted to end.
            event(Event.WORKER_WISH_LOST).error(
                "{} cannot be read ({}): the worker starts paused; rvmcv-worker resume ends that",
                self._file,
                error,
            )
            wish = DesiredState.PAUSE
        if wish is not DesiredState.RUN:
            event(WISHES[wish]).warning(
                "as before the restart, by the operator's wish, {}; rvmcv-worker resume ends that",
                _SAID[wish],
            )
        self._condition.wish(wish)

    def set(self, wish: DesiredState, *, by: str) -> None:
        """Follow a new wish; raises `OSError` when it is followed but could not be written down."""
        with self._lock:
            self._condition.wish(wish)
            event(WISHES[wish]).info("{} ({})", _SAID[wish], by)
            try:
                self._write(wish)
            except OSError as error:
                event(Event.WORKER_WISH_LOST).error(
                    "{} cannot be written ({}): a restart forgets the wish; make room on the disk, "
                    "then say it again",
                    self._file,
                    error,
                )
                raise

    def toggle_pause(self, *, by: str) -> None:
        """Pause a worker that the operator lets run, resume any other."""
        runs = self._condition.wishes().operator is DesiredState.RUN
        self.set(DesiredState.PAUSE if runs else DesiredState.RUN, by=by)

    def _write(self, wish: DesiredState) -> None:
        """Put the wish in the old one's place; after a power cut it is the one or the other."""
        if wish is DesiredState.RUN:
            self._file.unlink(missing_ok=True)
        else:
            part = self._file.with_name(f"{FILE_NAME}.part")
            try:
                with part.open("w", encoding="utf-8") as file:
                    file.write(f"{wish.value}\n")
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self._file)
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise
        directory = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
