"""The demo's second act: what the trained model sees in pictures, asked through RVM-Server's API."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from rvmcv_worker.demo import fraud, inference_tables
from rvmcv_worker.demo.admin import Admin
from rvmcv_worker.demo.questions import Answer, Questions
from rvmcv_worker.demo.sheet import Detection, Row, draw_sheet
from rvmcv_worker.demo.subject import Subject
from rvmcv_worker.terminal import say

CONFIDENCE = 0.4
#: A sheet for people: of two boxes of a class that overlap so much, the likelier one is drawn.
IOU = 0.5
#: SAM2 takes seconds for a picture on a CPU, the model itself next to nothing.
PICTURES_FOR_SAM2, PICTURES_FOR_MODEL = 4, 12
#: What this act leaves in the output folder beside masks.
DETECTIONS, ANNOTATED = "detections.png", "annotated.jpg"


@dataclass(frozen=True)
class MaskMaker:
    """Whom masks are asked of."""

    #: As an inference names it.
    segmenter: str
    #: As people call it.
    called: str
    #: The sheet, in the output folder.
    file: str
    #: How many pictures it is asked about.
    pictures: int = PICTURES_FOR_SAM2


OWN_MASKS = MaskMaker("yolo", "the model itself", "masks.png", PICTURES_FOR_MODEL)


class Inferences:
    """All of it; `faults` holds what did not come out as it should."""

    def __init__(self, console: Console, admin: Admin, questions: Questions, out_dir: Path) -> None:
        self.faults: list[str] = []
        self._console = console
        self._admin = admin
        self._questions = questions
        self._out_dir = out_dir

    def perform(self, subject: Subject, makers: Sequence[MaskMaker]) -> None:
        """Ask about single pictures, suspicious ones, a batch, a drawn one, and for masks.

        `makers` are the SAM2s that RVM-Server has.
        """
        options = {"confidence_threshold": CONFIDENCE, "iou_threshold": IOU, "img_size": subject.img_size}
        answers = self._look_at_each(subject, options)
        self._check_for_fraud(subject, options, answers)
        self._look_at_all(subject, options)
        self._have_one_drawn(subject, options, answers)
        if subject.label_task == "segment":
            self._have_masks(subject, options, OWN_MASKS, answers)
        for maker in makers:
            self._have_masks(subject, options, maker, answers)
        if not makers:
            self._say(
                "\nNo masks by SAM2: no weights come without a network. "
                "Give some, make demo SAM2=path, or train some, make demo SEGMENT=1."
            )

    def _look_at_each(self, subject: Subject, options: dict[str, Any]) -> list[Answer]:
        """Have the single pictures looked at, one after the other, and draw the sheet."""
        self._say(
            f"\nOne by one, {subject.single.gallery.described}; the first waits for the engine's start:"
        )
        asked = {**options, "purpose": "reanalysis"}
        answers = [self._ask({**asked, "image_url": url}, "a picture") for url in subject.single.urls]
        inference_tables.print_answers(self._console, subject.single.names, answers)
        self._draw(subject, range(len(answers)), answers, DETECTIONS, "What the model finds")
        return answers

    def _check_for_fraud(self, subject: Subject, options: dict[str, Any], answers: Sequence[Answer]) -> None:
        """Have what a machine says compared with the picture of which the server is surest."""
        index = max(range(len(answers)), key=lambda i: fraud.certainty(answers[i].detections))
        result, url = answers[index].result, subject.single.urls[index]
        if result is None:
            return  # each has failed, and is noted
        self._say(f"\nFraud checks of {subject.single.names[index]}, with what a machine says that it saw:")
        verdicts = []
        for claim in fraud.claims(result, subject.classes, CONFIDENCE):
            what = f"the fraud check {claim.what!r}"
            asked = {**options, "purpose": "fraud_check", "edge_result": claim.edge_result}
            answer = self._ask({**asked, "image_url": url}, what)
            comparison = (answer.result or {}).get("comparison")
            verdicts.append((claim, comparison))
            if comparison is not None and comparison["mismatch"] != claim.is_false:
                self.faults.append(f"{what}: mismatch is {comparison['mismatch']}")
        inference_tables.print_verdicts(self._console, verdicts)

    def _look_at_all(self, subject: Subject, options: dict[str, Any]) -> None:
        """Have a batch looked at."""
        self._say(f"\nAs a batch, {subject.batch.gallery.described}:")
        names, urls = subject.batch.names, subject.batch.urls
        images = [{"id": name, "url": url} for name, url in zip(names, urls, strict=True)]
        with self._console.status("waiting for the batch"):
            batch = self._questions.ask_all(images, options)
        inference_tables.print_batch(self._console, batch)
        failed = (batch["summary"] or {}).get("images_failed")
        if batch["status"] != "completed" or failed:
            self.faults.append(f"the batch is {batch['status']}, {failed} of its pictures failed")

    def _have_one_drawn(self, subject: Subject, options: dict[str, Any], answers: Sequence[Answer]) -> None:
        """Have the worker itself draw into the picture in which it found most."""
        index = max(range(len(answers)), key=lambda i: len(answers[i].detections))
        masks = (
            {"segmentation": True, "segmenter": OWN_MASKS.segmenter}
            if subject.label_task == "segment"
            else {}
        )
        asked = {**options, **masks, "image_url": subject.single.urls[index], "annotated": True}
        answer = self._ask(asked, "the annotated picture")
        if path := (answer.result or {}).get("annotated_path"):
            self._admin.fetch(path, self._out_dir / ANNOTATED)
        elif answer.result is not None:
            self.faults.append("no annotated picture is named in the result")

    def _have_masks(
        self, subject: Subject, options: dict[str, Any], maker: MaskMaker, seen: Sequence[Answer]
    ) -> None:
        """Have masks made of those single pictures in which most was seen, and draw a sheet of them."""
        chosen = _richest(seen, maker.pictures)
        by = f"Masks by {maker.called}"
        self._say(f"\n{by}, of {len(chosen)} of the single pictures:")
        asked = {**options, "segmentation": True, "segmenter": maker.segmenter}
        urls = [subject.single.urls[index] for index in chosen]
        answers = [self._ask({**asked, "image_url": url}, by) for url in urls]
        names = [subject.single.names[index] for index in chosen]
        inference_tables.print_answers(self._console, names, answers)
        self._draw(subject, chosen, answers, maker.file, by)

    def _ask(self, fields: dict[str, Any], what: str) -> Answer:
        answer = self._questions.ask(fields)
        if answer.result is None:
            error = answer.error or {}
            self.faults.append(f"{what}: {error.get('code', 'cancelled')}: {error.get('message', '')}")
        return answer

    def _draw(
        self, subject: Subject, chosen: Sequence[int], answers: Sequence[Answer], file: str, title: str
    ) -> None:
        """Draw a sheet of the chosen pictures, as far as they were answered for."""
        seen = [subject.single.gallery.pictures[index] for index in chosen]
        pairs = zip(seen, answers, strict=True)
        rows = [Row(one.file, detections_of(answer), one.truths) for one, answer in pairs if answer.result]
        shown = subject.single.gallery.describe(len(rows))
        if rows:
            draw_sheet(
                rows,
                self._out_dir / file,
                names=subject.classes,
                title=title,
                subtitle=f"{shown}, confidence of at least {CONFIDENCE}; mAP50 {subject.map50:.3f}",
            )

    def _say(self, text: str) -> None:
        say(self._console, text)


def _richest(answers: Sequence[Answer], count: int) -> list[int]:
    """Return which pictures have most in them, in their order."""
    by_most = sorted(range(len(answers)), key=lambda index: -len(answers[index].detections))
    return sorted(by_most[:count])


def detections_of(answer: Answer) -> tuple[Detection, ...]:
    """What was found, for a sheet; masks are PNGs of the whole picture, as the protocol has them."""
    found = []
    for told in answer.detections:
        left, top, right, bottom = told["bbox"]
        png = told.get("segmentation")
        mask = Image.open(io.BytesIO(base64.b64decode(png))) if png else None
        found.append(Detection(told["class"], told["confidence"], (left, top, right, bottom), mask))
    return tuple(found)
