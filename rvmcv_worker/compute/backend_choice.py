"""Which backend runs a model fastest here, among those that say the same as torch in fp32.

Call `ultralytics_env.isolate` first: this module imports Ultralytics.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
_ROUNDS = 5
#: No further round begins after so long: a large model's times lie far apart, and the machine has other work.
_MEASURE_S = 60.0


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

        opened = [reference]
        self._compare(reference, pictures, told)
        for name in names:
            for precision in PRECISIONS[name]:
                self.check_stop()
                if _name(Backend(name, precision)) in self.measured:
                    break
                detector = self._try(Backend(name, precision), reference, pictures, told)
                if detector is not None:
                    opened.append(detector)
                    if self.measured[_name(detector.runs_on)]["parity"]:
                        break
        self._time(opened, pictures)

        passed = [detector.runs_on for detector in opened if self.measured[_name(detector.runs_on)]["parity"]]
        wanted = [backend for backend in passed if backend.name in names] or [reference.runs_on]
        chosen = min(wanted, key=lambda backend: float(self.measured[_name(backend)]["ms"]))
        return {
            "chosen": {"backend": chosen.name, "precision": chosen.precision},
            "files": [_told(Path(chosen.path))] if chosen.path else [],
            "measured": self.measured,
            "imgsz": reference.imgsz,
        }

    def _try(
        self,
        backend: Backend,
        reference: Detector,
        pictures: list[warmup.Picture],
        told: list[backends.Raw],
    ) -> Detector | None:
        """Return the backend's detector, compared; None where it does not run, and `measured` says why."""
        try:
            if (backend.name in _GPU) != (self.device != "cpu"):
                raise UnsupportedJobError(f"{backend.name} does not run on the device {self.device!r}")
            if (backend.name, backend.precision) == ("openvino", "bf16") and not backends.openvino_has_bf16():
                raise UnsupportedJobError("this CPU does not compute in bf16")
            detector = self._open(replace(backend, path=self._export(backend, reference)))
            self._compare(detector, pictures, told)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, the others are still there
            self.measured[_name(backend)] = {"ms": None, "parity": False, "error": str(error)[:500]}
            return None
        return detector

    def _open(self, backend: Backend) -> Detector:
        return open_detector(self.model, backend, imgsz=self.imgsz, device=self.device)

    def _export(self, backend: Backend, reference: Detector) -> str | None:
        """Return the file that the backend runs, written if it is not there; None for torch."""
        if backend.name.startswith("torch"):
            return None
        onnx = self.directory / "model.onnx"
        if not onnx.exists():
            yolo, _, _ = checkpoint.open_yolo11_of_any_task(self.model)
            onnx_export.write_onnx(yolo.model, onnx)
        if backend.name != "tensorrt":
            return str(onnx)
        engine = self.directory / "model.engine"
        onnx_export.write_engine(
            onnx,
            engine,
            precision=backend.precision,
            imgsz=reference.imgsz,
            names=reference.names,
            task=reference.label_task,
        )
        return str(engine)

    def _compare(self, detector: Detector, pictures: list[warmup.Picture], told: list[backends.Raw]) -> None:
        compared = parity.Comparison()
        for picture, expected in zip(pictures, told, strict=True):
            compared += parity.compare(expected, detector.raw(picture), classes=len(detector.names))
        worst = asdict(compared)
        passed = worst.pop("passed")
        worst = {key: round(value, 5) for key, value in worst.items()}
        self.measured[_name(detector.runs_on)] = {"ms": None, "parity": passed, "worst": worst}

    def _time(self, detectors: list[Detector], pictures: list[warmup.Picture]) -> None:
        """Take turns, so that what else the machine does meanwhile slows all of them down."""
        quickest_ms = {_name(detector.runs_on): [float("inf")] * len(pictures) for detector in detectors}
        end_s = time.monotonic() + _MEASURE_S
        for done in range(_ROUNDS):
            if done and time.monotonic() > end_s:
                break
            for detector in detectors:
                self.check_stop()
                times_ms = quickest_ms[_name(detector.runs_on)]
                for number, picture in enumerate(pictures):
                    times_ms[number] = min(times_ms[number], _detect_ms(detector, picture))
        for name, times_ms in quickest_ms.items():
            self.measured[name]["ms"] = round(sum(times_ms) / len(times_ms), 3)


def _name(backend: Backend) -> str:
    return f"{backend.name} {backend.precision}"


def _best_score(detector: Detector, picture: warmup.Picture) -> float:
    scores = detector.raw(picture).predictions[0, 4 : 4 + len(detector.names)]
    return float(scores.max())


def _detect_ms(detector: Detector, picture: warmup.Picture) -> float:
    """Return how long one picture takes, from pixels to boxes."""
    start_s = time.perf_counter()
    detector.detect([picture], confidence=parity.CONFIDENCE, iou=parity.IOU, max_detections=300, masks=False)
    return (time.perf_counter() - start_s) * 1000


def _told(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "name": path.name,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
