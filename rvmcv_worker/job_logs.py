"""What was told of a job lately: the worker's own lines about it, and what its children print.

In memory alone, and bounded: of running jobs and of the last that are over, the last lines. The journal has
all of the worker's lines, storage the logs of the children of a job that was brought to an end.
"""

from __future__ import annotations

import collections
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal

from loguru import logger

from rvmcv_worker import log_line
from rvmcv_worker.logs import escape, redact
from rvmcv_worker.state import Lane

if TYPE_CHECKING:
    from loguru import Message

#: Most lines, and most characters, that are kept of a job.
_MAX_LINES, _MAX_CHARS = 2000, 200_000
#: Jobs of a lane that are over and still have their lines: inferences push no training's out.
_ENDED_KEPT = 10
#: Most lines, and most characters, that are read at once.
_PAGE_LINES, _PAGE_CHARS = 500, 64_000
#: Longest line, in characters: a longer one is cut.
_MAX_LINE = 2000


@dataclass(frozen=True)
class JobLine:
    """One line, harmless wherever it is shown."""

    at: datetime
    by: Literal["worker", "child"]
    text: str
    #: Of the worker's lines.
    level: str | None = None


@dataclass(frozen=True)
class LogPage:
    """Some lines of a job in their order; `next_offset` is where those go on that follow."""

    lines: list[JobLine]
    next_offset: int
    #: How many lines between the offset that was asked for and the first of these are not kept any more.
    lost: int
    #: Whether the job runs, and more lines may come.
    running: bool


class _Kept:
    """The last lines of one job."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.lines: collections.deque[JobLine] = collections.deque()
        self.chars = 0
        #: How many lines there were before the first that is kept.
        self.dropped = 0

    def add(self, line: JobLine) -> None:
        self.lines.append(line)
        self.chars += len(line.text)
        while len(self.lines) > _MAX_LINES or self.chars > _MAX_CHARS:
            self.chars -= len(self.lines.popleft().text)
            self.dropped += 1


class JobLogs:
    """Safe for several threads; none of them waits for anything but another's few lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, _Kept] = {}
        self._ended: collections.OrderedDict[str, _Kept] = collections.OrderedDict()

    def listen(self) -> int:
        """Hear of the worker's lines from now on; returns loguru's number of the sink."""
        return logger.add(self.hear, level="INFO", format="{message}", diagnose=False, backtrace=False)

    def open(self, job_id: str, lane: Lane) -> None:
        """Keep the lines of a job from now on; one that comes back goes on where it was."""
        with self._lock:
            self._running[job_id] = self._running.get(job_id) or self._ended.get(job_id) or _Kept(lane)
            self._ended.pop(job_id, None)

    def close(self, job_id: str) -> None:
        """Note that the job is over: its lines stay until enough others of its lane are over after it."""
        with self._lock:
            if kept := self._running.pop(job_id, None):
                self._ended[job_id] = kept
                of_lane = [other for other, its in self._ended.items() if its.lane is kept.lane]
                for other in of_lane[:-_ENDED_KEPT]:
                    del self._ended[other]

    def print(self, job_id: str, line: str) -> None:
        """Take a line that a child has printed, which its log has made harmless."""
        self._add(job_id, JobLine(datetime.now(timezone.utc), "child", _cut(line)))

    def hear(self, message: Message) -> None:
        """Take what the worker logs of a job: a sink of loguru's, which must not log itself."""
        record = message.record
        if (job_id := record["extra"].get("job_id")) is None:
            return
        said = f"{record['extra'].get('event', '')} {record['message']}".lstrip()
        for text in (escape(redact(said)), *(f"  {line}" for line in log_line.trace(record))):
            self._add(str(job_id), JobLine(record["time"], "worker", _cut(text), record["level"].name))

    def _add(self, job_id: str, line: JobLine) -> None:
        with self._lock:
            if kept := self._running.get(job_id) or self._ended.get(job_id):
                kept.add(line)

    def read(self, job_id: str, offset: int) -> LogPage | None:
        """Return lines from `offset` on, counted from the job's first; None for a job that is not kept."""
        with self._lock:
            kept = self._running.get(job_id) or self._ended.get(job_id)
            if kept is None:
                return None
            first = max(offset, kept.dropped)
            page: list[JobLine] = []
            chars = 0
            for index in range(first - kept.dropped, len(kept.lines)):
                chars += len(kept.lines[index].text)
                if page and (len(page) == _PAGE_LINES or chars > _PAGE_CHARS):
                    break
                page.append(kept.lines[index])
            return LogPage(page, first + len(page), first - offset, job_id in self._running)


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} … (cut)"
