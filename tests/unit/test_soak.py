"""What the soak calls flat."""

from __future__ import annotations

import pytest

from tests.soak import Growth, Sample


def _samples(**grown: float) -> list[Sample]:
    """Forty samples, in which each named figure has grown by so much at the end, after a warm-up."""
    warm = {"memory_mb": 60.0, "open_files": 10.0, "threads": 7.0}
    cold = [Sample(number, number, 20.0, 3, 2) for number in range(5)]
    return cold + [
        Sample(
            number, number, **{name: value + grown.get(name, 0) * number / 40 for name, value in warm.items()}
        )
        for number in range(5, 40)
    ]


def test_a_warm_up_is_no_growth() -> None:
    assert Growth.of(_samples()).is_flat
    assert Growth.of(_samples(memory_mb=3, open_files=1, threads=1)).is_flat


@pytest.mark.parametrize("grown", [{"memory_mb": 12}, {"open_files": 6}, {"threads": 6}])
def test_a_leak_is(grown: dict[str, float]) -> None:
    assert not Growth.of(_samples(**grown)).is_flat
