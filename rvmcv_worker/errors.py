"""One tree of errors: each class knows its protocol code and whether the job is handed back.

The docstring of a class is its default message. Both sides of the wall raise these; a child
carries them over as ``{"code": …, "message": …}`` and `from_code` makes them whole again.
"""

from __future__ import annotations

from typing import Any, ClassVar


class JobError(Exception):
    """A fault of the worker's own; the log has the traceback."""

    code: ClassVar[str] = "internal"
    #: Whether the job goes back to the queue (status ``queued``) instead of ending ``failed``.
    handed_back: ClassVar[bool] = True
    #: What the operator does about it, where that is not what the class of the outcome says already.
    remedy: ClassVar[str] = ""

    def __init__(
        self,
        message: str = "",
        *,
        retry_after_s: float | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message or type(self).__doc__ or self.code)
        #: What a child had found when it failed (a data set's report, a training's metrics so far).
        self.detail = detail
        #: What is delivered all the same: the artifacts of a failed training.
        self.result: dict[str, Any] | None = None
        #: Seconds before RVM-Server should offer the job again; only for a job that is handed back.
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        """What happened, where, and what to do, as shown to people."""
        return str(self.args[0])

    def to_wire(self) -> dict[str, str]:
        """Return ``{"code", "message"}`` as protocol, files and frames carry it."""
        return {"code": self.code, "message": self.message}


class InternalError(JobError):
    """A fault of the worker's own; the log has the traceback."""


class InvalidJobError(JobError):
    """The job's config does not validate."""

    code = "invalid_job"
    handed_back = False


class UnsupportedJobError(JobError):
    """This worker does not have the job type or option that was asked for."""

    code = "unsupported_job"
    handed_back = False
    remedy = "it is not run again: update the worker, or [worker] job_types"


class DatasetUnavailableError(JobError):
    """The data set could not be fetched."""

    code = "dataset_unavailable"


class DatasetInvalidError(JobError):
    """The data set is not an archive, hostile, or unusable."""

    code = "dataset_invalid"
    handed_back = False


class ChecksumMismatchError(JobError):
    """The bytes received do not have the sha256 that was promised."""

    code = "checksum_mismatch"


class ModelUnavailableError(JobError):
    """The base model or model version could not be had."""

    code = "model_unavailable"


class ModelInvalidError(JobError):
    """Not a checkpoint, or one that would run code."""

    code = "model_invalid"
    handed_back = False


class ImageUnavailableError(JobError):
    """The image could not be fetched."""

    code = "image_unavailable"


class ImageInvalidError(JobError):
    """Not an image, or over the pixel limit."""

    code = "image_invalid"
    handed_back = False


class UrlForbiddenError(JobError):
    """The host or scheme of a URL is not allowed."""

    code = "url_forbidden"
    handed_back = False
    remedy = "it is not run again: add the host to [storage] allowed_hosts if it is trusted"


class OutOfGpuMemoryError(JobError):
    """Too large for the GPU even at the smallest batch."""

    code = "out_of_gpu_memory"
    handed_back = False
    remedy = "it is not run again: ask for less, or raise the limit in [limits]"


class OutOfMemoryError(JobError):
    """The job went over its memory limit."""

    code = "out_of_memory"
    handed_back = False
    remedy = "it is not run again: ask for less, or raise the limit in [limits]"


class DiskQuotaError(JobError):
    """The job went over its disk limit."""

    code = "disk_quota"
    handed_back = False
    remedy = "it is not run again: ask for less, or raise the limit in [limits]"


class TimedOutError(JobError):
    """The job took longer than it may."""

    code = "timed_out"
    handed_back = False
    remedy = "it is not run again: ask for less, or raise the limit in [limits]"


class UploadFailedError(JobError):
    """Storage could not be reached to take the result."""

    code = "upload_failed"
    remedy = "it is run again: see whether storage answers from here"


class UploadRejectedError(JobError):
    """Storage or RVM-Server would not take the result."""

    code = "upload_rejected"
    handed_back = False
    remedy = "it is not run again: see what RVM-Server or storage has against the result"


class JobCrashedError(JobError):
    """The job's process died, or wrote what is not ours to read."""

    code = "job_crashed"


class WorkerStoppedError(JobError):
    """The worker was stopped while the job ran."""

    code = "worker_stopped"


class WorkerDiedError(JobError):
    """The worker was killed while the job ran."""

    code = "worker_died"


class WorkerUnfitError(JobError):
    """The machine under the job failed: its disk was filled by others, or its GPU was lost."""

    code = "worker_unfit"
    remedy = "it is run again, here once the machine is fit: rvmcv-worker doctor"


class CancelledHereError(JobError):
    """The operator of the worker cancelled the job."""

    code = "cancelled_by_operator"
    handed_back = False


class JobCancelledError(Exception):
    """The job was cancelled: it stops, reports `cancelled` and publishes nothing."""

    def __init__(self, by_operator: str = "") -> None:
        super().__init__(by_operator or "cancelled by RVM-Server")
        #: What RVM-Server is told where it was the operator; "" where it knows, since it was its own wish.
        self.by_operator = by_operator


class FencedError(Exception):
    """Another attempt owns the job or it is over: stop, publish and report nothing, wipe."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"fenced: {reason}")
        self.reason = reason


_BY_CODE: dict[str, type[JobError]] = {cls.code: cls for cls in JobError.__subclasses__()}

#: Every code of the protocol's table.
CODES = frozenset(_BY_CODE)


def from_code(code: str, message: str) -> JobError:
    """Return the error of `code`; an unknown code, which only a broken child sends, is a crash."""
    if cls := _BY_CODE.get(code):
        return cls(message)
    return JobCrashedError(f"the job's process reported an unknown error code: {message}")
