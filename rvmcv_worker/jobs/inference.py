"""`inference`: one image through a detector, and a segmenter where masks are wanted."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rvmcv_worker import comparison
from rvmcv_worker.comparison import Seen, Thresholds
from rvmcv_worker.engine_wire import MaskFormat, Queue
from rvmcv_worker.errors import ImageInvalidError, ImageUnavailableError
from rvmcv_worker.jobs import inference_config, model_choice
from rvmcv_worker.jobs.inference_config import InferenceOptions, Url
from rvmcv_worker.jobs.job_config import ClassName, Fraction
from rvmcv_worker.ledger import ClaimState
from rvmcv_worker.protocol import MAX_RESULT_BYTES, Sha256, encode
from rvmcv_worker.state import Lane

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.engine_client import Ask, InferResult
    from rvmcv_worker.protocol import JobOffer

_MB = 1024**2
_Pixels = Annotated[float, Field(allow_inf_nan=False)]
_Side = Annotated[int, Field(ge=1, le=1_000_000)]


def _upright(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if box[2] < box[0] or box[3] < box[1]:
        raise ValueError("must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return box


class _Told(BaseModel):
    """A part of a config; a server may send what it stores, so other keys are left aside."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", strict=True, hide_input_in_errors=True, protected_namespaces=()
    )


class EdgeDetection(_Told):
    """What the reverse vending machine saw."""

    class_name: Annotated[ClassName, Field(alias="class")]
    confidence: Fraction
    bbox: Annotated[
        tuple[_Pixels, _Pixels, _Pixels, _Pixels] | None,
        Field(strict=False),
        AfterValidator(lambda box: box and _upright(box)),
    ] = None


class EdgeResult(_Told):
    """The machine's own answer, to be compared with the server's."""

    detections: Annotated[list[EdgeDetection], Field(max_length=1000)]
    model_version: Annotated[str | None, Field(max_length=200)] = None
    #: Of the image that its boxes are in, where that is not the image of the job.
    image_size: Annotated[tuple[_Side, _Side] | None, Field(strict=False)] = None


class InferenceConfig(InferenceOptions):
    """Everything that an inference job's config can say."""

    image_url: Url
    image_sha256: Sha256 | None = None
    edge_result: EdgeResult | None = None


class Inference:
    """The job type; stateless, one for the daemon's life."""

    name = "inference"
    lane = Lane.INFER

    def parse(self, config: Mapping[str, Any]) -> InferenceConfig:
        """Return the validated config; raises `InvalidJobError`."""
        return inference_config.parse(InferenceConfig, config)

    def gpus(self, _config: Mapping[str, Any]) -> int:
        """Return 1: its place has no GPU, the engine has."""
        return 1

    def run(self, attempt: Attempt, config: InferenceConfig) -> dict[str, Any]:
        """Fetch, ask the engine, compare; masks and picture too large for a report go to storage."""
        start_s = time.monotonic()
        with attempt.phase("download"):
            image = _fetch(attempt, config)
            chosen = model_choice.choose(attempt, config)
        attempt.enter(ClaimState.RUNNING)
        notes: list[str] = []
        ask = chosen.ask(config, Queue.INTERACTIVE)
        with attempt.phase("infer"), _naming(config.image_url):
            answer = attempt.services.engines.infer(ask, image, interrupt=attempt.interrupt)
            if _is_too_large(answer.result) and not attempt.services.storage.can_store:
                answer = _ask_for_less(attempt, ask, image, answer, notes)
        result = {
            **answer.result,
            **chosen.told(),
            "timings": {"download": attempt.timings["download"], **answer.result["timings"]},
            "processing_time_ms": round((time.monotonic() - start_s) * 1000),
        }
        if config.edge_result:
            result["comparison"] = _compare(config.edge_result, config, attempt, result)
        result = _publish(attempt, result, answer.picture, notes)
        return {**result, "notes": notes} if notes else result

    def courtesy(self, _offer: JobOffer, _report: Mapping[str, Any], /) -> None:
        """No call follows."""


@contextlib.contextmanager
def _naming(image_url: str) -> Iterator[None]:
    """Have a fault of the image say which image it is: an engine does not know where one comes from."""
    try:
        yield
    except ImageInvalidError as error:
        raise ImageInvalidError(f"{image_url}: {error.message}") from error


def _fetch(attempt: Attempt, config: InferenceConfig) -> bytes:
    services = attempt.services
    path = attempt.workspace.in_dir / "image"
    services.storage.fetch(
        config.image_url,
        path,
        max_bytes=int(services.settings.inference.max_image_mb * _MB),
        sha256=config.image_sha256,
        interrupt=attempt.interrupt,
        unavailable=ImageUnavailableError,
    )
    return path.read_bytes()


def _compare(
    edge: EdgeResult, config: InferenceConfig, attempt: Attempt, result: dict[str, Any]
) -> dict[str, Any]:
    """Compare what the machine saw with what the engine did, both in pixels of the engine's image."""
    settings = attempt.services.settings.inference
    width, height = result["image_size"]
    seen = []
    for told in edge.detections:
        box = told.bbox
        if box and edge.image_size:
            box = comparison.scaled(box, edge.image_size, (width, height))
        seen.append(Seen(told.class_name, told.confidence, box))
    found = [Seen(one["class"], one["confidence"], tuple(one["bbox"])) for one in result["detections"]]
    thresholds = Thresholds(settings.compare_iou, settings.compare_confidence, config.confidence_threshold)
    return comparison.compare(seen, found, thresholds)


def _is_too_large(result: dict[str, Any]) -> bool:
    return len(encode(result)) > MAX_RESULT_BYTES


def _ask_for_less(
    attempt: Attempt, ask: Ask, image: bytes, answer: InferResult, notes: list[str]
) -> InferResult:
    """Return an answer whose masks fit into a final report, where there is no storage for larger ones."""
    if ask.options.mask_format is not MaskFormat.RLE:
        options = dataclasses.replace(ask.options, mask_format=MaskFormat.RLE)
        answer = attempt.services.engines.infer(
            dataclasses.replace(ask, options=options), image, interrupt=attempt.interrupt
        )
        notes.append(
            f"no storage for masks as large as these: {MaskFormat.RLE.value} instead of what was asked"
        )
    if _is_too_large(answer.result):
        notes.append("no storage for masks as large as these: they are left out")
        answer = dataclasses.replace(answer, result=_without_masks(answer.result))
    return answer


def _without_masks(result: dict[str, Any]) -> dict[str, Any]:
    bare = [{key: found[key] for key in found if key != "segmentation"} for found in result["detections"]]
    return {**result, "detections": bare}


def _publish(
    attempt: Attempt, result: dict[str, Any], picture: bytes | None, notes: list[str]
) -> dict[str, Any]:
    """Bring to storage what a final report cannot hold; returns the result as the report has it."""
    files: dict[str, bytes] = {}
    if _is_too_large(result):
        files["result.json"] = encode(result)
    if picture is not None:
        if attempt.services.storage.can_store:
            files["annotated.jpg"] = picture
        else:
            notes.append("no storage for the annotated picture: set storage.s3_endpoint, or have job-uploads")
    if not files:
        return result
    attempt.progress.confirm("upload")
    attempt.enter(ClaimState.PUBLISHING)
    stored = {}
    with attempt.phase("upload"):
        for name, content in files.items():
            path = attempt.workspace.out_dir / name
            path.write_bytes(content)
            stored[name] = attempt.store(path, name)
    if whole := stored.get("result.json"):
        result = {**_without_masks(result), "result_path": whole.path, "sha256": whole.sha256}
    if drawn := stored.get("annotated.jpg"):
        result = {**result, "annotated_path": drawn.path}
    return result
