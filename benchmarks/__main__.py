"""`python -m benchmarks [NAME …]`: run all benchmarks, or those that are named."""

from __future__ import annotations

import importlib
import sys

from benchmarks import figures

ALL = (
    "claim_latency",
    "idle",
    "queue",
    "cancel",
    "recovery",
    "transfer",
    "many_workers",
    "training_parity",
    "inference",
    "batch",
    "masks",
    "sam2_training",
)


def main(names: list[str]) -> int:
    """Run benchmarks one after the other; each prints its table."""
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names or ALL:
        measured = importlib.import_module(f"benchmarks.{name}").measure()
        figures.show(name, measured)
        figures.save(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
