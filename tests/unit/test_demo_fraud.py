"""What the demo's machines claim to have seen is judged as the claim says."""

from __future__ import annotations

import pytest

from rvmcv_worker.comparison import Seen, Thresholds, compare
from rvmcv_worker.demo import fraud

CLASSES = ("bottle", "can")
LEAST = 0.4


def detection(name, confidence, *box):
    return {"class": name, "confidence": confidence, "bbox": list(box)}


RESULTS = {
    "nothing": [],
    "one": [detection("can", 0.41, 10, 10, 100, 200)],
    "all corners": [
        detection("can", 0.99, 0, 0, 320, 240),
        detection("bottle", 0.9, 320, 0, 640, 240),
        detection("can", 0.8, 0, 240, 320, 480),
        detection("bottle", 0.7, 400, 300, 600, 400),
    ],
}


@pytest.mark.parametrize("found", RESULTS.values(), ids=RESULTS)
def test_only_what_is_made_up_is_a_mismatch(found):
    claims = fraud.claims({"image_size": [640, 480], "detections": found}, CLASSES, LEAST)

    assert [claim.is_false for claim in claims] == [False] + [True] * (len(claims) - 1)
    assert [claim.what for claim in claims] == (
        ["the same", "another class", "one object more"] if found else ["the same", "one object more"]
    )
    server = [Seen(each["class"], each["confidence"], tuple(each["bbox"])) for each in found]
    for claim in claims:
        told = claim.edge_result["detections"]
        edge = [Seen(each["class"], each["confidence"], tuple(each["bbox"])) for each in told]
        verdict = compare(edge, server, Thresholds(0.5, 0.3, LEAST))
        assert verdict["mismatch"] is claim.is_false, (claim, verdict)


def test_a_data_set_of_one_class_has_no_other_to_claim():
    result = {"image_size": [640, 480], "detections": RESULTS["one"]}
    claims = fraud.claims(result, ("can",), LEAST)
    assert [claim.what for claim in claims] == ["the same", "one object more"]
