"""Where a SAM2 training left off: kept while it trains, gone on from by the child of a later attempt.

What a checkpoint holds beside its state: `last.pt`, all that the next step depends on and that the base model
and the job do not say already; `best.pt`, the trained parameters of the best epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvmcv_worker.compute import checkpoint_file, pickle_scan, tensor_file
from rvmcv_worker.compute.checkpoint_file import CheckpointError, Run, State
from rvmcv_worker.compute.checkpoint_keeper import CheckpointKeeper
from rvmcv_worker.compute.child import Child
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.sam2_network import Network
from rvmcv_worker.compute.sam2_progress import Sam2Progress
from rvmcv_worker.compute.sam2_score import Score

_FILES = frozenset({"last.pt", "best.pt"})


@dataclass(frozen=True)
class Course:
    """What was measured in a training, over all its attempts."""

    base: Score
    box_as_mask: Score
    best: Score | None = None
    #: 0 before the first epoch.
    best_epoch: int = 0
    #: An entry for each epoch, as progress tells it.
    history: tuple[dict[str, Any], ...] = ()

    @property
    def epochs_without_better(self) -> int:
        """How many epochs there were since the best."""
        return len(self.history) - self.best_epoch

    @property
    def beside(self) -> dict[str, float]:
        """The metrics that stand beside those of each epoch."""
        return {**self.base.flat("base/"), **self.box_as_mask.flat("box_as_mask/")}

    def is_better(self, score: Score) -> bool:
        """Tell whether an epoch's score is the best so far; the base model's own does not count."""
        return self.best is None or score.miou > self.best.miou

    def after(self, entry: dict[str, Any], score: Score) -> Course:
        """Return the course after one more epoch."""
        history = (*self.history, entry)
        if self.is_better(score):
            return replace(self, best=score, best_epoch=len(history), history=history)
        return replace(self, history=history)

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Course:
        """Return the course that `found`, a checkpoint's, holds; raises `CheckpointError`."""
        try:
            scores = {key: Score(**found[key]) for key in ("base", "box_as_mask", "best")}
            return cls(**{**found, **scores, "history": tuple(found["history"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"its course cannot be read: {error}") from None


def setup(network: Network, **of_job: Any) -> dict[str, Any]:
    """Return what must be the same where a training goes on: the model before it is trained, and `of_job`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"base model": digest.hexdigest(), **of_job}


class Sam2Checkpoints(CheckpointKeeper):
    """Saves each epoch in the folder `output`, and keeps it."""

    def __init__(
        self,
        child: Child,
        output: Path,
        progress: Sam2Progress,
        earlier: State,
        network: Network,
        optimizer: torch.optim.Optimizer,
        setup: dict[str, Any],
        run: Run,
    ) -> None:
        """`run` is this child's, with no epoch yet."""
        super().__init__(child, progress, earlier)
        self._output = output
        self._network = network
        self._optimizer = optimizer
        self._setup = setup
        self._run = run
        #: An entry for each epoch, of earlier attempts too.
        self.history: tuple[dict[str, Any], ...] = ()

    def after_epoch(self, course: Course, *, ended_by: str | None) -> None:
        """Save what the epoch that progress has told left, and keep it when it is time to."""
        self.history, epoch = course.history, len(course.history)
        trained = {name: tensor.detach() for name, tensor in self._network.trained_parameters().items()}
        contents = {"last.pt": self._last(trained, course)}
        if course.best_epoch == epoch:
            contents["best.pt"] = {"trained": trained, "epoch": epoch}
        for name, content in contents.items():
            tensor_file.write(content, self._output / f"{name}.new")
        for name in contents:  # together: one does not go without the other
            (self._output / f"{name}.new").replace(self._output / name)
        self._note(replace(self._run, epochs=epoch - self._earlier.epochs), ended_by=ended_by)

    def _last(self, trained: Mapping[str, Tensor], course: Course) -> dict[str, Any]:
        return {
            "trained": trained,
            "optimizer": self._optimizer.state_dict()["state"],
            "course": asdict(course),
            "setup": self._setup,
        }

    def _gather(self, parts: Path) -> dict[str, Path]:  # noqa: ARG002  nothing has to be made anew
        return {name: self._output / name for name in sorted(_FILES)}


@dataclass(frozen=True)
class LeftOff:
    """Where a training goes on; nothing of it is in force yet."""

    state: State
    course: Course
    _trained: dict[str, Tensor]
    _optimizer: dict[int, dict[str, Tensor]]

    def apply(self, network: Network, optimizer: torch.optim.Optimizer) -> None:
        """Make both what they were, once: the checkpoint's own tensors, three models' worth, go with it."""
        load(network, self._trained)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": self._optimizer, "param_groups": groups})
        self._trained.clear()
        self._optimizer.clear()


def restore(
    path: Path,
    output: Path,
    network: Network,
    optimizer: torch.optim.Optimizer,
    setup: dict[str, Any],
    epochs: int,
) -> LeftOff:
    """Return where the run at `path` left off, and lay its files into the folder `output`.

    Nothing in the file runs. Raises `CheckpointError` or `ModelInvalidError` for one that cannot be used;
    `network` and `optimizer`, which it must fit, are as they were.
    """
    state = checkpoint_file.unpack(path, output, _FILES)
    last, best = _open(output / "last.pt"), _open(output / "best.pt")
    if not isinstance(found := last.get("setup"), dict):
        raise CheckpointError("its last.pt does not say what was trained")
    for key, wanted in setup.items():
        if found.get(key) != wanted:
            was, now = (printable(str(value), 80) for value in (found.get(key), wanted))
            raise CheckpointError(f"it is of another {key}: {was}, not {now}")
    course = Course.parse(last["course"])
    done = len(course.history)
    if not 0 < done == state.epochs or (done >= epochs and state.ended_by is None):
        raise CheckpointError(f"it is of epoch {done} (it says {state.epochs}) of {epochs}")
    if best.get("epoch") != course.best_epoch:
        raise CheckpointError(f"its best.pt is of epoch {best.get('epoch')}, not {course.best_epoch}")

    parameters = network.trained_parameters()
    for file in (last, best):
        _require_like(file.get("trained"), {name: (each,) for name, each in parameters.items()})
    empty = optimizer.state_dict()["state"]
    _require_like(last.get("optimizer"), {key: tuple(values.values()) for key, values in empty.items()})
    return LeftOff(state, course, last["trained"], last["optimizer"])


def copy(network: Network) -> dict[str, Tensor]:
    """Return the trained parameters as they are now."""
    return {name: each.detach().clone() for name, each in network.trained_parameters().items()}


def load(network: Network, trained: Mapping[str, Tensor]) -> None:
    """Make the trained parameters what they were."""
    with torch.no_grad():
        for name, parameter in network.trained_parameters().items():
            parameter.copy_(trained[name])


def load_best(network: Network, output: Path) -> None:
    """Make the trained parameters those of the best epoch that was saved in `output`."""
    load(network, _open(output / "best.pt")["trained"])


def _open(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"it has no {path.name}")
    pickle_scan.refuse_dangerous(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a stranger's file makes the loader raise is a fault of the file
        raise CheckpointError(f"its {path.name} does not load: {printable(str(error))}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"its {path.name} holds a {type(content).__name__}")
    return content


def _require_like(found: Any, wanted: Mapping[Any, tuple[Tensor, ...]]) -> None:
    """Raise `CheckpointError` unless `found` has tensors for the same names, of the same shapes, finite."""
    if not isinstance(found, dict) or set(found) != set(wanted):
        raise CheckpointError("it does not hold the parameters that are trained, and no others")
    for name, tensors in wanted.items():
        held = tuple(found[name].values()) if isinstance(found[name], dict) else (found[name],)
        if not all(isinstance(each, Tensor) for each in held) or [each.shape for each in held] != [
            each.shape for each in tensors
        ]:
            raise CheckpointError(f"what it holds for {printable(str(name))} has another shape")
        if not all(bool(torch.isfinite(each).all()) for each in held):
            raise CheckpointError(f"what it holds for {printable(str(name))} is not finite")
