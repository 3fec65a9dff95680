"""`stub`: a job that does in its child what its config says, and nothing else.

For trying a worker out, and the server's side of the protocol, without a training. It is claimed
only where `[worker] job_types` names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rvmcv_worker.checkpoints import CHILD
from rvmcv_worker.errors import InvalidJobError
from rvmcv_worker.jobs.training_config import gpus_wanted
from rvmcv_worker.ledger import ClaimState
from rvmcv_worker.protocol import explain
from rvmcv_worker.state import Lane

if TYPE_CHECKING:
    from rvmcv_worker.attempt import Attempt
    from rvmcv_worker.protocol import JobOffer


#: Largest file that is published, in bytes.
_MAX_MODEL_BYTES = 4 * 1024**3


class StubConfig(BaseModel):
    """What the child does."""

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    steps: int = Field(1, ge=0, le=1_000_000)
    step_s: float = Field(0.0, ge=0, le=3600)
    then: str = "complete"
    timeout_s: float = Field(3600.0, gt=0)
    gpus: int = Field(1, ge=1)


class Stub:
    """The job type; stateless, one for the daemon's life."""

    name = "stub"
    lane = Lane.TRAIN

    def parse(self, config: Mapping[str, Any]) -> StubConfig:
        """Return the validated config; raises `InvalidJobError`."""
        try:
            return StubConfig.model_validate(dict(config))
        except ValidationError as error:
            raise InvalidJobError(f"config: {explain(error)}") from None

    def gpus(self, config: Mapping[str, Any]) -> int:
        """Return how many GPUs the job asks for, as a training does."""
        return gpus_wanted(config)

    def run(self, attempt: Attempt, config: StubConfig) -> dict[str, Any]:
        """Run the child and publish the file that it made, as a training publishes its model."""
        with attempt.phase("download"):
            resume = attempt.fetch_checkpoint()
        attempt.enter(ClaimState.RUNNING)
        with attempt.phase("train"):
            given = config.model_dump(exclude={"timeout_s"})
            job = {"task": "stub", **given, "attempt": attempt.claim.attempt, "resume": resume}
            end = attempt.run_child(CHILD, job, timeout_s=config.timeout_s)
        model = attempt.workspace.read_back(CHILD, "model.bin", max_bytes=_MAX_MODEL_BYTES)
        attempt.progress.confirm("upload")
        attempt.enter(ClaimState.PUBLISHING)
        if model is None or not attempt.services.storage.can_store:
            return {"stub": end.result}
        with attempt.phase("upload"):
            stored = attempt.store(model, "model.bin")
        return {"stub": end.result, "artifacts": {"model.bin": stored.path}}

    def courtesy(self, _offer: JobOffer, _report: Mapping[str, Any], /) -> None:
        """No call follows."""
