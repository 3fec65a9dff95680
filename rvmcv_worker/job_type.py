"""What a job type is to the daemon: a name, a lane, a validated config, and the way it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rvmcv_worker.state import Lane

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.protocol import JobOffer


class JobType(Protocol):
    """One file in `jobs/` and one in `compute/`."""

    @property
    def name(self) -> str:
        """The protocol's `job_type`."""

    @property
    def lane(self) -> Lane:
        """The lane that claims it."""

    def parse(self, config: Mapping[str, Any]) -> Any:
        """Return the validated config; raises `InvalidJobError` that names the field."""

    def gpus(self, config: Mapping[str, Any]) -> int:
        """Return how many GPUs a job asks for; 1 where its config does not say it validly."""

    def run(self, attempt: Attempt, config: Any) -> dict[str, Any]:
        """Run one attempt to its end and return the report's `result`; raises `JobError` otherwise."""

    def courtesy(self, offer: JobOffer, report: Mapping[str, Any], /) -> dict[str, Any] | None:
        """Return the fields of the `training-complete` call that follows a final report, if one does."""
