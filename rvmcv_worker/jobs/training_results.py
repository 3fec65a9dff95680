"""What the children of a training say at their end, which may be anything: held against what is used."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rvmcv_worker.errors import JobCrashedError

#: Mistakes of a result that its error names.
_MOST_EXPLAINED = 3

_Count = Annotated[int, Field(ge=0)]
#: A sentence for people.
_Sentence = Annotated[str, Field(max_length=2000)]


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class _Leak(_Said):
    equal: _Count
    near: _Count


class Prepared(_Said):
    """Of the prepare child: the data set's report."""

    names: Annotated[list[str], Field(min_length=1)]
    leaks: dict[str, _Leak]


class _Metrics(_Said):
    fitness: float | None = None
    active: dict[str, Any] | None = None
    improved: bool | None = None
    verdict: _Sentence | None = None


class Trained(_Said):
    """Of the train child."""

    metrics: _Metrics
    effective: dict[str, Any]
    versions: dict[str, Any]
    attempts: list[dict[str, Any]]


def require(kind: type[_Said], child: str, result: dict[str, Any], metrics: Collection[str] = ()) -> None:
    """Raise `JobCrashedError` unless `result`, a child's, is of a kind, and has these `metrics`."""
    try:
        kind.model_validate(result)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(str(part)[:40] for part in item['loc'])}: {item['msg']}"
            for item in error.errors(include_url=False, include_context=False)[:_MOST_EXPLAINED]
        ]
    else:
        wrong = [f"metrics.{name} is missing" for name in metrics if result["metrics"].get(name) is None]
    if wrong:
        raise JobCrashedError(f"{child}/result.json is no result of a training: {'; '.join(wrong)}")
