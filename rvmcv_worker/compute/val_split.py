"""A val split for a data set that came without one."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence


def choose_val(
    classes: Sequence[tuple[int, ...]], groups: Sequence[int], fraction: float, seed: int
) -> frozenset[int]:
    """Return the indices of the images that go to val: about `fraction` of them, the same for the same seed.

    `classes` holds the classes of each image's instances. Each class keeps its share where it can, the
    rarest decided first; images of one group (copies of one picture) stay together, unless nothing could be
    split then. Both sides get an image with instances when there are two such images. Empty for fewer than
    two images.
    """
    if len(classes) < 2:
        return frozenset()
    chosen = _choose(classes, groups, fraction, seed)
    if _serves(chosen, classes):
        return chosen
    ungrouped = _choose(classes, range(len(classes)), fraction, seed)
    return ungrouped if _serves(ungrouped, classes) else _swapped_in(ungrouped, classes)


def _choose(
    classes: Sequence[tuple[int, ...]], groups: Sequence[int], fraction: float, seed: int
) -> frozenset[int]:
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    frequency = Counter(class_id for image in classes for class_id in set(image))

    def stratum(group: int) -> int:
        """The rarest class in a group, or -1 for background."""
        found = {class_id for index in members[group] for class_id in classes[index]}
        return min(found, key=lambda class_id: (frequency[class_id], class_id), default=-1)

    strata: dict[int, list[int]] = defaultdict(list)
    for group in sorted(members):
        strata[stratum(group)].append(group)
    order = sorted(strata, key=lambda class_id: (class_id < 0, frequency[class_id], class_id))
    rng = random.Random(seed)  # noqa: S311 repeatable, not secret
    chosen: set[int] = set()
    rest: list[int] = []
    for class_id in order:
        candidates = strata[class_id]
        rng.shuffle(candidates)
        room = round(fraction * sum(len(members[group]) for group in candidates))
        for group in candidates:
            if len(members[group]) <= room:
                chosen.update(members[group])
                room -= len(members[group])
            else:
                rest.append(group)
    target = min(len(classes) - 1, max(1, round(fraction * len(classes))))
    for group in rest:
        if len(chosen) + len(members[group]) <= target:
            chosen.update(members[group])
    return frozenset(chosen)


def _serves(chosen: frozenset[int], classes: Sequence[tuple[int, ...]]) -> bool:
    """Whether both sides have an image with instances."""
    return any(classes[index] for index in chosen) and any(
        image for index, image in enumerate(classes) if index not in chosen
    )


def _swapped_in(chosen: frozenset[int], classes: Sequence[tuple[int, ...]]) -> frozenset[int]:
    """Return `chosen` with one image exchanged so that both sides have instances, if two images have any."""
    with_instances = [index for index, image in enumerate(classes) if image]
    if len(with_instances) < 2:
        return chosen
    return (chosen - set(with_instances[1:])) | {with_instances[0]}
