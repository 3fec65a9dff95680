"""What came out: the tables at the end, and the summary for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rvmcv_worker.demo.mask_table import print_masks
from rvmcv_worker.terminal import plain


@dataclass(frozen=True)
class JobReport:
    """One job as it ended."""

    job_id: str
    job_type: str
    status: str
    attempt: int
    #: From queued to ended, as an admin sees it.
    seconds: float
    #: Without masks, which are large.
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @classmethod
    def of(cls, job: dict[str, Any], seconds: float) -> JobReport:
        """Take over a job as `GET /job/{id}` shows it."""
        result = job["result"]
        if result and "detections" in result:
            bare = [{k: v for k, v in found.items() if k != "segmentation"} for found in result["detections"]]
            result = {**result, "detections": bare}
        return cls(
            job_id=job["job_id"],
            job_type=job["job_type"],
            status=job["status"],
            attempt=job["attempt"],
            seconds=round(seconds, 3),
            result=result,
            error=job["error"],
        )


@dataclass(frozen=True)
class Summary:
    """The content of `summary.json`."""

    jobs: tuple[JobReport, ...] = ()
    workspace_files_left: int | None = None
    daemon_peak_rss_mb: float | None = None
    listening_sockets: int | None = None
    sandbox: str | None = None

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Delivery:
    """What was fetched of a completed job, and whether it is what RVM-Server says it is."""

    version: str
    row_sha256: str | None
    stored_sha256: str
    #: What now lies in the output folder, relative to it.
    files: tuple[str, ...] = field(default=())

    @property
    def is_equal(self) -> bool:
        """Whether the row of ``ai_model_versions`` tells the sha256 of the stored bytes."""
        return self.row_sha256 == self.stored_sha256


def print_job(console: Console, job: JobReport, delivery: Delivery | None) -> None:
    """Print what happened to the job, and how good its model is."""
    facts = {"job": job.job_id, "type": job.job_type, "status": job.status, "attempt": str(job.attempt)}
    facts["seconds"] = f"{job.seconds:.1f}"
    if delivery is not None:
        facts["model version"] = delivery.version
        facts["sha256 of the row"] = str(delivery.row_sha256)
        facts["sha256 of the bytes"] = (
            f"{delivery.stored_sha256} ({'equal' if delivery.is_equal else 'DIFFERENT'})"
        )
    print_facts(console, facts)
    metrics = (job.result or {}).get("metrics")
    if metrics and job.job_type == "sam2":
        print_masks(console, metrics)
    elif metrics:
        _print_metrics(console, metrics)


def print_facts(console: Console, facts: dict[str, str]) -> None:
    """Print names and values, one pair a line."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, plain(value))
    console.print()
    console.print(table)


def _print_metrics(console: Console, metrics: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("split", no_wrap=True)
    table.add_column("class", overflow="fold")
    for name in ("instances", "precision", "recall", "mAP50", "mAP50-95"):
        table.add_column(name, justify="right", no_wrap=True)
    for split, measured in (("val", metrics), ("test", metrics.get("test"))):
        if not measured:
            continue
        table.add_row(split, "all", "", *_cells(measured), style="bold")
        for name, figures in measured.get("per_class", {}).items():
            table.add_row(split, plain(name), str(figures.get("instances", "")), *_cells(figures))
    console.print()
    console.print(table)


def _cells(figures: dict[str, Any]) -> list[str]:
    values = [figures.get(name) for name in ("precision", "recall", "mAP50", "mAP50-95")]
    return ["-" if value is None else f"{value:.3f}" for value in values]
