"""Which backend runs a model fastest here, among those that say the same as torch in fp32.

Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rvmcv_worker.compute import backends, checkpoint, onnx_export, parity, warmup
from rvmcv_worker.compute.detector import Detector, open_detector
from rvmcv_worker.engine_wire import Backend
from rvmcv_worker.errors import UnsupportedJobError

#: Backend -> its precisions, the fastest first; a slower one is tried only where the faster does not pass.
PRECISIONS = {
    "openvino": ("bf16", "fp32"),
    "onnxruntime": ("fp32",),
    "torch-cpu": ("fp32",),
    "tensorrt": ("fp16", "fp32"),
    "torch-cuda": ("fp16", "fp32"),
}
_GPU = frozenset({"tensorrt", "torch-cuda"})
#: Times that each picture goes through; the quickest counts, for others use the machine meanwhile.
_ROUNDS = 3


@dataclass(frozen=True)
class _Trial:
    """A backend that passed."""

    backend: Backend
    ms: float


@dataclass
class Choice:
    """The trials of one model on one device."""

    model: Path
    #: Where exports are written.
    directory: Path
    imgsz: int | None
    device: str
    check_stop: Callable[[], None]
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    def among(self, candidates: Iterable[str]) -> dict[str, Any]:
        """Try `candidates` and return what is chosen, its files and what was measured.

        The reference is chosen where none of them passes, whether it is a candidate or not.
        Raises `ModelInvalidError`, `UnsupportedJobError` for a candidate that there is not.
        """
        names = list(candidates)
        if unknown := sorted(set(names) - set(PRECISIONS)):
            raise UnsupportedJobError(f"this worker has no backend {', '.join(unknown)}")
        reference = self._open(Backend("torch-cpu" if self.device == "cpu" else "torch-cuda", "fp32"))
        pictures = warmup.pictures(reference.imgsz, lambda picture: _best_score(reference, picture))
        told = [reference.raw(picture) for picture in pictures]

        passed = [self._measure(reference, pictures, told)]
        for name in names:
            for precision in PRECISIONS[name]:
                self.check_stop()
                if f"{name} {precision}" in self.measured:
                    continue
                trial = self._try(name, precision, reference, pictures, told)
                if trial is not None:
                    passed.append(trial)
                    break
        wanted = [trial for trial in passed if trial.backend.name in names] or passed
        chosen = min(wanted, key=lambda trial: trial.ms).backend
        return {
            "chosen": {"backend": chosen.name, "precision": chosen.precision},
            "files": [_told(Path(chosen.path))] if chosen.path else [],
            "measured": self.measured,
            "imgsz": reference.imgsz,
        }

    def _try(
        self,
        name: str,
        precision: str,
        reference: Detector,
        pictures: list[warmup.Picture],
        told: list[backends.Raw],
    ) -> _Trial | None:
        """Return the trial of a backend, or None where it is not to be used; `measured` says why."""
        try:
            if (name in _GPU) != (self.device != "cpu"):
                raise UnsupportedJobError(f"{name} does not run on the device {self.device!r}")
            if (name, precision) == ("openvino", "bf16") and not backends.openvino_has_bf16():
                raise UnsupportedJobError("this CPU does not compute in bf16")
            detector = self._open(Backend(name, precision, self._export(name, precision, reference)))
            trial = self._measure(detector, pictures, told)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, the others are still there
            self.measured[f"{name} {precision}"] = {"ms": None, "parity": False, "error": str(error)[:500]}
            return None
        return trial if self.measured[f"{name} {precision}"]["parity"] else None

    def _open(self, backend: Backend) -> Detector:
        return open_detector(self.model, backend, imgsz=self.imgsz, device=self.device)

    def _export(self, name: str, precision: str, reference: Detector) -> str | None:
        """Return the file that the backend runs, written if it is not there; None for torch."""
        if name.startswith("torch"):
            return None
        onnx = self.directory / "model.onnx"
        if not onnx.exists():
            yolo, _, _ = checkpoint.open_yolo11_of_any_task(self.model)
            onnx_export.write_onnx(yolo.model, onnx)
        if name != "tensorrt":
            return str(onnx)
        engine = self.directory / "model.engine"
        onnx_export.write_engine(
            onnx,
            engine,
            precision=precision,
            imgsz=reference.imgsz,
            names=reference.names,
            task=reference.label_task,
        )
        return str(engine)

    def _measure(
        self, detector: Detector, pictures: list[warmup.Picture], told: list[backends.Raw]
    ) -> _Trial:
        compared = parity.Comparison()
        for picture, expected in zip(pictures, told, strict=True):
            compared += parity.compare(expected, detector.raw(picture), classes=len(detector.names))
        ms = sum(_quickest_ms(detector, picture) for picture in pictures) / len(pictures)
        worst = asdict(compared)
        self.measured[f"{detector.backend} {detector.precision}"] = {
            "ms": round(ms, 2),
            "parity": worst.pop("passed"),
            "worst": {key: round(value, 5) for key, value in worst.items()},
        }
        return _Trial(detector.session_backend, ms)


def _best_score(detector: Detector, picture: warmup.Picture) -> float:
    scores = detector.raw(picture).predictions[0, 4 : 4 + len(detector.names)]
    return float(scores.max())


def _quickest_ms(detector: Detector, picture: warmup.Picture) -> float:
    """Return how long the picture takes, in and out, when its shape is known already."""
    times_ms = []
    for _ in range(_ROUNDS):
        start_s = time.perf_counter()
        detector.detect(
            [picture],
            confidence=parity.CONFIDENCE,
            iou=parity.IOU,
            max_detections=300,
            masks=False,
        )
        if detector.device != "cpu":
            torch.cuda.synchronize()
        times_ms.append((time.perf_counter() - start_s) * 1000)
    return min(times_ms)


def _told(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "name": path.name,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
