"""What inferences came to, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rvmcv_worker.demo.fraud import Claim
from rvmcv_worker.demo.questions import Answer
from rvmcv_worker.demo.report import print_facts
from rvmcv_worker.terminal import plain


def print_answers(console: Console, names: Sequence[str], answers: Sequence[Answer]) -> None:
    """Print one line a picture: how long it took, and what was found."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("picture", no_wrap=True, max_width=28)
    for name in ("answer ms", "worker ms", "model ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("found", overflow="fold")
    for name, answer in zip(names, answers, strict=True):
        table.add_row(plain(name), f"{1000 * answer.seconds:.0f}", *_times(answer), plain(_found(answer)))
    console.print()
    console.print(table)


def print_verdicts(console: Console, verdicts: Sequence[tuple[Claim, dict[str, Any] | None]]) -> None:
    """Print what each machine said, the verdict, and its reasons."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("the machine saw", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("because", overflow="fold")
    for claim, comparison in verdicts:
        if comparison is None:
            table.add_row(claim.what, "none", "the job failed")
            continue
        reasons = [f"{reason['code']}: {reason['message']}" for reason in comparison["reasons"]]
        agreed = f"objects that both saw alike: {len(comparison['matches'])}"
        verdict = "MISMATCH" if comparison["mismatch"] else "agrees"
        table.add_row(claim.what, verdict, plain("; ".join(reasons) or agreed))
    console.print()
    console.print(table)


def print_batch(console: Console, batch: dict[str, Any]) -> None:
    """Print a batch and its summary."""
    facts = {"batch": batch["batch_id"], "status": batch["status"]}
    if summary := batch["summary"]:
        latency = summary["latency_ms"]
        facts |= {
            "pictures": f"{summary['images_ok']} done, {summary['images_failed']} failed{_errors(summary)}",
            "found": _counts(summary["classes"]) or "nothing",
            "images/s": _number(summary["images_per_s"]),
            "ms an image": f"p50 {_number(latency['p50'])}, p95 {_number(latency['p95'])}",
            "backend": _counts(summary["backends"]) or "-",
            "results": ", ".join(part["path"] for part in summary["parts"]),
        }
    print_facts(console, facts)


def _times(answer: Answer) -> tuple[str, str]:
    if answer.result is None:
        return "-", "-"
    timings = answer.result["timings"]
    seconds = sum(timings[step] for step in ("decode", "detect", "segment", "encode"))
    return str(answer.result["processing_time_ms"]), f"{1000 * seconds:.0f}"


def _found(answer: Answer) -> str:
    if answer.result is None:
        return str((answer.error or {}).get("code", "cancelled"))
    counted = Counter(found["class"] for found in answer.detections)
    best = dict.fromkeys(counted, 0.0)
    for found in answer.detections:
        best[found["class"]] = max(best[found["class"]], found["confidence"])
    return ", ".join(f"{count} {name} ({best[name]:.2f})" for name, count in counted.items()) or "nothing"


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))


def _errors(summary: dict[str, Any]) -> str:
    return f" ({_counts(summary['errors'])})" if summary["errors"] else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
