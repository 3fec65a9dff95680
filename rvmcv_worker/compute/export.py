"""The child that exports one model and says which backend runs it fastest.

A model of a stranger's goes through compilers of several makers here: it has this process for itself.
"""

from __future__ import annotations

import os
from typing import Any

from rvmcv_worker.compute import ultralytics_env
from rvmcv_worker.compute.child import Child

#: Nobody waits for an export, while fraud checks are answered beside it.
_NICENESS = 10


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Try ``job["candidates"]`` on ``job["model"]``, at ``imgsz`` or the model's own, on ``device``.

    Returns what is ``chosen`` (``backend``, ``precision``), the ``files`` of the child's directory that it
    needs (``name``, ``size_bytes``, ``sha256``), the ``imgsz``, and under ``name precision`` what was
    ``measured``: ``ms`` an image, ``parity`` with torch in fp32, and ``worst``, the largest differences, or
    the ``error``.
    """
    os.nice(_NICENESS)
    ultralytics_env.isolate(child.directory)
    from rvmcv_worker.compute.backend_choice import Choice

    ultralytics_env.require_safe_load()
    choice = Choice(
        model=child.root / job["model"],
        directory=child.directory,
        imgsz=job.get("imgsz"),
        device=str(job.get("device", "cpu")),
        check_stop=child.check_stop,
    )
    return choice.among(job["candidates"])
