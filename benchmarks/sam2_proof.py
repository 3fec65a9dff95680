"""`python -m benchmarks.sam2_proof BASE DATASET`: what fine-tuning a pretrained SAM2 is worth, and its cost.

Through the prepare child and the train child, as the daemon starts them but without the wall: nothing of
the training is the benchmark's own. It needs weights, which do not come by themselves: it is none of `ALL`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import figures
from benchmarks.figures import Figure
from rvmcv_worker.config import DatasetSettings, LimitSettings
from rvmcv_worker.demo import material
from rvmcv_worker.sam2_options import Sam2Options
from tests.compute_child import ComputeChild

FIGURES = "figures.json"
#: What says which GPU is the first, and where its libraries are.
_OF_GPU = {"CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"}
_GB = 1024**3
_MB = 1024**2
#: Where the encoder's output may be kept; the daemon goes by its quota.
_CACHE_SHARE = 0.5


class ProofError(Exception):
    """It cannot be measured; the message says why."""


@dataclass(frozen=True)
class Measured:
    """What came of one training."""

    result: dict[str, Any]
    #: Seconds of each epoch, with its measuring on val.
    epochs_s: list[float]
    #: Largest resident memory of the train child.
    peak_bytes: int
    #: Largest use of the GPU's memory beyond what was used before; looked at with each message.
    peak_gpu_bytes: int | None


def main(arguments: list[str]) -> int:
    """Measure, print a table and the verdict; returns the exit status."""
    wishes = _parser().parse_args(arguments)
    given = {"epochs": wishes.epochs, "imgsz": wishes.img_size, "train": wishes.train}
    options = {key: value for key, value in given.items() if value is not None}
    try:
        wishes.out.mkdir(parents=True, exist_ok=True)
        # Not where temporary files are, which may be memory: the encoder's output takes gigabytes.
        with tempfile.TemporaryDirectory(prefix="at-work-", dir=wishes.out) as folder:
            measured = measure(wishes.base, wishes.dataset, options, Path(folder).resolve(), wishes.out)
    except (ProofError, material.MaterialError, OSError, ValueError) as error:
        print(f"It could not be measured: {error}", file=sys.stderr)
        return 1
    table, effective = list(as_figures(measured)), measured.result["effective"]
    how = f"{effective['train']} at {effective['imgsz']} px, {measured.result['epochs']} epochs"
    trained = f"{wishes.base.name} fine-tuned on {wishes.dataset.name} ({how}; {effective['device_name']})"
    figures.show(trained, table)
    (wishes.out / FIGURES).unlink(missing_ok=True)  # of an earlier training
    figures.save(table, wishes.out / FIGURES)
    print(f"\nVerdict: {measured.result['metrics']['verdict']}.")
    print(f"In {wishes.out}: {', '.join((*measured.result['files'], FIGURES))}")
    return 0


def measure(base: Path, dataset: Path, options: dict[str, Any], root: Path, out_dir: Path) -> Measured:
    """Check the data set and train on it in `root`; what the training delivers goes into `out_dir`."""
    wanted = Sam2Options(**options)
    (root / "in").mkdir()
    shutil.copyfile(base, root / "in" / "base.pt")
    archive = root / "in" / "dataset.archive"
    archive.symlink_to(material.own(dataset, root).archive)
    report = _run(root, "prepare", _prepare_job(wanted))
    archive.unlink()
    print(_of_data(report), flush=True)
    on_gpu = torch.cuda.is_available()
    job = {
        "task": "train_sam2",
        "attempt": 1,
        "model": "in/base.pt",
        "model_name": base.name,
        "architecture": None,
        "names": report["names"],
        "data": "prepare/data",
        "options": wanted.model_dump(mode="json"),
        "active_model": None,
        "device": "0" if on_gpu else "cpu",
        "time_limit_h": None,
        "resume": None,
        "cache_bytes": int(_CACHE_SHARE * shutil.disk_usage(root).free),
    }
    before_bytes = _gpu_bytes() if on_gpu else 0
    child = ComputeChild(root, "train", job, env={key: os.environ[key] for key in _OF_GPU & set(os.environ)})
    process = psutil.Process(child.process.pid)
    epochs_s, peak_bytes, peak_gpu_bytes, told = [], 0, 0, None
    for message in child.messages():
        if message.get("message") not in (None, told):
            told = message["message"]
            print(f"  {told}", flush=True)
        epochs_s += [entry["epoch_s"] for entry in message.get("history", [])]
        with suppress(psutil.Error, OSError):
            peak_bytes = max(peak_bytes, _peak_bytes(process))
        if on_gpu:
            peak_gpu_bytes = max(peak_gpu_bytes, _gpu_bytes() - before_bytes)
    result = _accepted("train", child.result())
    for name in result["files"]:
        shutil.copyfile(root / "train" / name, out_dir / name)
    return Measured(result, epochs_s, peak_bytes, peak_gpu_bytes if on_gpu else None)


def as_figures(measured: Measured) -> Iterator[Figure]:
    """Yield what was measured, each value beside the base model's or the box's."""
    metrics = measured.result["metrics"]
    yield from _beside("val", metrics, metrics["base"], metrics["box_as_mask"])
    if metrics["test"]:
        yield from _beside("test", metrics["test"], metrics["test"]["base"], None)
    seconds = statistics.median(measured.epochs_s)
    yield Figure("an epoch, measuring included", seconds, "s")
    yield Figure("peak memory of the training", measured.peak_bytes / _MB, "MB")
    if measured.peak_gpu_bytes is not None:
        yield Figure("peak memory of the GPU", measured.peak_gpu_bytes / _MB, "MB")


def _beside(
    split: str, tuned: dict[str, Any], base: dict[str, Any], box: dict[str, Any] | None
) -> Iterator[Figure]:
    zero_shot, better = "the base model, zero-shot", "above"
    for key, name in (
        ("miou", "mIoU with boxes"),
        ("miou_click", "mIoU with a click"),
        ("boundary_f", "boundary F"),
    ):
        yield Figure(f"{name}, {split}", tuned[key], "", better, zero_shot, base[key])
        if box is not None and box[key] is not None:
            yield Figure(
                f"{name}, {split}, beside the box", tuned[key], "", better, "the box itself", box[key]
            )
    for name, found in tuned["per_class"].items():
        if found["miou"] is not None:
            of_class = f"mIoU with boxes, {split}, {name} ({found['instances']} objects)"
            yield Figure(of_class, found["miou"], "", better, zero_shot, base["per_class"][name]["miou"])


def _prepare_job(options: Sam2Options) -> dict[str, Any]:
    """Return the prepare child's job with the limits of an untouched config."""
    limits, dataset = LimitSettings(), DatasetSettings()
    return {
        "task": "prepare",
        "archive": "in/dataset.archive",
        "job_type": "sam2",
        "label_task": "segment",
        "names": None,
        "seed": options.seed,
        "val_fraction": dataset.val_fraction,
        "max_bad_fraction": dataset.max_bad_fraction,
        "limits": {
            "max_unpacked_bytes": int(limits.max_workspace_gb * _GB / 2),
            "max_entries": limits.max_archive_entries,
            "max_ratio": limits.max_archive_ratio,
            "max_image_pixels": int(limits.max_image_megapixels * 1_000_000),
        },
    }


def _run(root: Path, name: str, job: dict[str, Any]) -> dict[str, Any]:
    return _accepted(name, ComputeChild(root, name, job).finish())


def _accepted(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        error = answer.get("error", {})
        raise ProofError(f"the {name} child says {error.get('code')}: {error.get('message')}")
    result: dict[str, Any] = answer["result"]
    return result


def _of_data(report: dict[str, Any]) -> str:
    counts = (f"{found['images']} images of {split}" for split, found in report["splits"].items())
    return f"{', '.join(counts)}; classes {', '.join(report['names'])}"


def _peak_bytes(process: psutil.Process) -> int:
    """Return the most that a process has had resident so far, mapped files included (VmHWM)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _gpu_bytes() -> int:
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sam2_proof", description=__doc__)
    parser.add_argument("base", type=Path, help="a checkpoint of SAM 2.1, as sam2.1_hiera_tiny.pt")
    parser.add_argument("dataset", type=Path, help="a data set of polygons or COCO JSON, folder or zip")
    parser.add_argument("--epochs", type=int, help="epochs to train")
    parser.add_argument("--img-size", type=int, help="edge that images are stretched to, in pixels")
    parser.add_argument("--train", choices=("decoder", "decoder+neck", "all"), help="what is trained")
    parser.add_argument("--out", type=Path, default=Path("sam2-proof"), help="where what it delivers goes")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
