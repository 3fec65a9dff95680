"""Is this checkpoint what it should be? Asked in a fresh child before a model is published.

Whoever receives the file may open it without protection, so the bar is higher than for loading: only the
types that a training of ours writes, and no trace of the machine it was made on.
"""

from __future__ import annotations

import importlib
from typing import Any

from rvmcv_worker.compute import file_hash, pickle_scan, telltale
from rvmcv_worker.compute.child import Child
from rvmcv_worker.errors import ModelInvalidError

#: Type of model -> module that has ``facts(path, job, child) -> dict``, all that its training names in a
#: pickle, and what to call it. The list is closed: a job cannot name a module.
_KINDS = {
    "yolo11": ("rvmcv_worker.compute.yolo11_check", pickle_scan.YOLO11_TYPES, "YOLO11"),
    "sam2": ("rvmcv_worker.compute.sam2_check", pickle_scan.SAM2_TYPES, "SAM2"),
}


def run(job: dict[str, Any], child: Child) -> dict[str, Any]:
    """Return facts about ``job["model"]``; raise `ModelInvalidError` for the first that is not right.

    ``model_type``: ``yolo11`` (default) or ``sam2``. ``origin``: ``trained`` (default: by us, to be
    published) or ``base`` (fetched: other types and paths may occur). ``label_task``, and ``expect``
    ``{"task", "names"}``, of SAM2 ``{"names", "architecture"}``, where given, must hold. ``safetensors``,
    where given, is a file that must hold the same weights. ``base_model`` is what the training was told to
    begin with: its name stands in the file, and may look like anything.
    """
    path = child.root / job["model"]
    module, types, kind = _KINDS[job.get("model_type", "yolo11")]

    # What the pickle names, before anything is loaded.
    pickle_scan.refuse_dangerous(path)
    if job.get("origin", "trained") == "trained":
        found = pickle_scan.scan(path)
        if strange := found.beyond(types):
            raise ModelInvalidError(
                f"{path.name} names {', '.join(strange[:5])}: no {kind} training writes that"
            )
        # A class may be called "/pet": that is the data set's word, not this machine's.
        names = (job.get("expect") or {}).get("names") or ()
        if paths := [text for text in found.local_paths if text not in names]:
            raise ModelInvalidError(f"{path.name} holds paths of the machine it was made on: {paths[0]!r}")
        telltale.refuse_secrets(path.name, found.strings, {*names, job.get("base_model", "")})
    child.check_stop()

    return {
        "ok_types": True,
        **importlib.import_module(module).facts(path, job, child),
        "size_bytes": path.stat().st_size,
        "sha256": file_hash.sha256(path),
    }
