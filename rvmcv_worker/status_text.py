"""The words in which a worker's status is told to a person."""

from __future__ import annotations

from typing import Any

from rvmcv_worker.disk_room import SILENT_S

#: What takes a wish back, by whose it is.
_TAKE_BACK = {
    "operator": "the operator's wish: `rvmcv-worker resume` takes it back",
    "server": "RVM-Server's wish: an admin takes it back there",
}
_LEDGER_SILENT = "what waits for RVM-Server is not known: the ledger does not answer, see its disk"


def wish(desired: dict[str, str]) -> str | None:
    """Return whose wish keeps the worker from claiming, and what takes it back; None without one."""
    held = [who for who in ("operator", "server") if desired[who] != "run"]
    if not held:
        return None
    said = "; ".join(f"{desired[who]}: {_TAKE_BACK[who]}" for who in held)
    return said[0].upper() + said[1:]


def waiting(status: dict[str, Any]) -> str:
    """Return what is not over yet, in one line."""
    parts = [f"{len(status['running'])} running"]
    if status["claiming"] is None or status["outbox"] is None:
        return f"jobs: {parts[0]}; {_LEDGER_SILENT}"
    if status["claiming"]:
        parts.append(f"{status['claiming']} being claimed or settled")
    parts.append(f"{status['outbox']} final reports to deliver")
    return "jobs: " + ", ".join(parts)


def outbox(status: dict[str, Any]) -> str:
    """Return what is still to be told to RVM-Server, or settled with it."""
    reports, claiming = status["outbox"], status["claiming"]
    if reports is None or claiming is None:
        return _LEDGER_SILENT
    settling = f", {claiming} jobs being claimed or settled" if claiming else ""
    if reports == 0:
        return f"empty{settling}"
    return f"{reports} final {'report waits' if reports == 1 else 'reports wait'} for RVM-Server{settling}"


def disk(found: dict[str, float | None]) -> str:
    """Return what is free and what the worker holds of the disk."""
    ago_s = found["looked_ago_s"] or 0.0
    if found["free_gb"] is None:
        return "not known: the directory of the workspaces cannot be asked"
    parts = [f"{size(found['free_gb'])} free (floor {size(found['floor_gb'])})"]
    if found["workspace_gb"] is not None:
        parts.append(f"workspaces {size(found['workspace_gb'])}")
    if found["model_store_gb"] is not None:
        parts.append(f"model store {size(found['model_store_gb'])}")
    if ago_s > SILENT_S:
        parts.append(f"as of {duration(ago_s)} ago: the disk does not answer since, see `dmesg`")
    return ", ".join(parts)


def disk_is_short(found: dict[str, float | None]) -> bool:
    """Whether the disk is why nothing is claimed, or does not answer."""
    free_gb, floor_gb = found["free_gb"], found["floor_gb"]
    silent = (found["looked_ago_s"] or 0.0) > SILENT_S
    return silent or free_gb is None or (floor_gb is not None and free_gb < floor_gb)


def engine(found: dict[str, Any]) -> str:
    """Return how an inference engine is."""
    parts = [found["state"] + (f" on {found['device']}" if found["device"] else "")]
    if found["in_flight"]:
        parts.append(f"{found['in_flight']} images in it")
    parts.append(f"{found['answered']} answered")
    if found["replaced"]:
        parts.append(f"replaced {found['replaced']} times")
    if found["memory_mb"]:
        parts.append(f"{found['memory_mb']} MB")
    return f"{found['trust']} models: {', '.join(parts)}"


def progress(job: dict[str, Any]) -> str:
    """Return how far a job is, but for its fraction."""
    parts = [job["phase"] or "starts"]
    if job["epoch"] is not None:
        parts.append(f"epoch {job['epoch']}/{job['epochs'] or '?'}")
    if job["images_done"] is not None:
        parts.append(f"{job['images_done']} of {job['images_total'] or '?'} images")
    if job["eta_s"] is not None:
        parts.append(f"{duration(job['eta_s'])} to go")
    if job["ending"]:
        parts.append(f"ending: {job['ending']}")
    return ", ".join(parts)


def ended_as(end: dict[str, Any]) -> str:
    """Return a word for how an attempt ended."""
    return "handed back" if end["status"] == "queued" else str(end["status"])


def size(gigabytes: float | None) -> str:
    """Return a size of the disk as a person would say it."""
    if gigabytes is None:
        return "?"
    return f"{gigabytes:.0f} GB" if gigabytes >= 100 else f"{gigabytes:.3g} GB"


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def brief(seconds: float) -> str:
    """Return a duration for a column."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} d"
