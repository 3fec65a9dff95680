"""How the worker is, in lines for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rvmcv_worker.logs import escape


def lines(status: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a whole status; ids and messages of strangers are in them."""
    yield from map(escape, _lines(status))


def _lines(status: dict[str, Any]) -> Iterator[str]:
    desired = status["desired"]
    yield f"{status['worker_id']}: {status['state']}{', stopping' if status['stopping'] else ''}"
    yield f"rvmcv-worker {status['version']}, up {_duration(status['uptime_s'])}, wall: {status['sandbox']}"
    yield f"server: {status['server']}"
    yield f"wished for: {desired['server']} by the server, {desired['operator']} by the operator"
    claims = ", ".join(lane for lane, claiming in status["claims"].items() if claiming)
    yield f"claims jobs of: {claims or 'no lane'}"
    for reason in status["reasons"]:
        yield f"note: {reason}"
    for engine in status["engines"]:
        yield engine_line(engine)
    yield waiting(status)
    for job in status["running"]:
        yield f"  {job_line(job)}"
    if status["last_ends"]:
        yield "last ends:"
    for end in status["last_ends"]:
        code = f" ({end['error_code']})" if end["error_code"] else ""
        took, ago = _duration(end["took_s"]), _duration(end["ended_ago_s"])
        ended = "handed back" if end["status"] == "queued" else end["status"]
        yield f"  {end['job_id']} {end['job_type']}: {ended}{code} after {took}, {ago} ago"


def waiting(status: dict[str, Any]) -> str:
    """Return what is not over yet, in one line."""
    parts = [f"{len(status['running'])} running"]
    if status["claiming"]:
        parts.append(f"{status['claiming']} being claimed or settled")
    parts.append(f"{status['outbox']} final reports to deliver")
    return "jobs: " + ", ".join(parts)


def engine_line(engine: dict[str, Any]) -> str:
    """Return how an inference engine is, in one line."""
    parts = [engine["state"] + (f" on {engine['device']}" if engine["device"] else "")]
    if engine["in_flight"]:
        parts.append(f"{engine['in_flight']} images in it")
    parts.append(f"{engine['answered']} answered")
    if engine["replaced"]:
        parts.append(f"replaced {engine['replaced']} times")
    if engine["memory_mb"]:
        parts.append(f"{engine['memory_mb']} MB")
    return f"engine for {engine['trust']} models: {', '.join(parts)}"


def job_line(job: dict[str, Any]) -> str:
    """Return how far a job is, in one line."""
    parts = [f"attempt {job['attempt']}"]
    if job["phase"]:
        parts.append(job["phase"])
    if job["fraction"] is not None:
        parts.append(f"{100 * job['fraction']:.0f} %")
    if job["epoch"] is not None:
        parts.append(f"epoch {job['epoch']}/{job['epochs'] or '?'}")
    if job["images_done"] is not None:
        parts.append(f"{job['images_done']} of {job['images_total'] or '?'} images")
    if job["eta_s"] is not None:
        parts.append(f"{_duration(job['eta_s'])} to go")
    if job["ending"]:
        parts.append(f"ending: {job['ending']}")
    message = f" · {job['message']}" if job["message"] else ""
    return (
        f"{job['job_id']} {job['job_type']}: {', '.join(parts)}, since {_duration(job['running_s'])}{message}"
    )


def _duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
