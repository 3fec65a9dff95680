"""What was told of a job, line by line for a person; and where the rest of it lies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rvmcv_worker.logs import escape
from rvmcv_worker.terminal import console, plain

if TYPE_CHECKING:
    from rvmcv_worker.config import Settings
    from rvmcv_worker.control_client import ControlClient

#: Seconds between two looks for more.
_LOOK_S = 0.5
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red", "SUCCESS": "green"}


def tell(client: ControlClient, job_id: str, *, follow: bool) -> None:
    """Print what is kept of a job, and go on until it is over where that is wished for.

    Raises `ControlError`.
    """
    out, look, offset = console(), threading.Event(), 0
    while True:
        page = client.log(job_id, offset)
        if page["lost"]:
            out.print(Text(f"… {page['lost']} earlier lines are not kept here", "dim"), soft_wrap=True)
        for line in page["lines"]:
            out.print(drawn(line), soft_wrap=True)
        offset = page["next_offset"]
        if page["lines"]:
            continue  # there may be more already
        if not (follow and page["running"]):
            if offset == 0:
                out.print(plain(f"nothing was said of it yet; it is {_standing(client.job(job_id))}"))
            return
        look.wait(_LOOK_S)


def _standing(job: dict[str, Any]) -> str:
    ended = ": ".join(str(job[name]) for name in ("status", "error_code") if job[name])
    return f"{job['state']}{f', {ended}' if ended else ''}"


def drawn(line: dict[str, Any]) -> Text:
    """Return a line as the journal has it; what a child printed is set off from it."""
    at = datetime.fromisoformat(line["at"]).astimezone().strftime("%H:%M:%S")
    if line["by"] == "child":
        return Text.assemble((f"{at}   | ", "dim"), escape(str(line["text"])))
    return Text.assemble((f"{at} ", "dim"), (escape(str(line["text"])), _STYLES.get(line["level"], "bold")))


def elsewhere(job_id: str, settings: Settings) -> Iterator[str]:
    """Yield where to look for a job of which the worker has nothing any more."""
    yield f"what the worker said of it:   journalctl -u rvmcv-worker RVMCV_JOB_ID={job_id}"
    yield (
        f"what its children printed:    s3://{settings.storage.s3_bucket}/cv/{job_id}/attempt-<N>/, where"
        " it was brought to an end"
    )
