"""The picture of a sheet: images, each beside its ground truth and what two models make of it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rvmcv_worker.compute.annotate import COLORS, TEXT_COLORS, draw_mask, resized
from rvmcv_worker.compute.mask_metrics import deepest
from rvmcv_worker.compute.printable import printable
from rvmcv_worker.compute.ultralytics_env import any_font

MAX_BYTES = 2_000_000
#: Tried in turn until the picture is small enough: pure noise needs the last.
_JPEG_QUALITIES = (90, 80, 60, 30, 10)
_CELL_PX, _GAP_PX, _CAPTION_PX, _HEADER_PX = 360, 14, 26, 96
_COLUMNS = ("image", "ground truth", "before training", "after training")
_PAPER, _BLANK, _TEXT, _FAINT = "#f4f5f7", "#d9dce1", "#1d2530", "#6b7684"
_BETTER, _WORSE = "#00734f", "#c4281b"
_MAX_NAME_CHARS = 18


@dataclass(frozen=True)
class Found:
    """What a model makes of an image: the masks in the order of its objects, any size, and each one's IoU."""

    masks: Iterable[NDArray[np.bool_]]
    ious: Sequence[float]


@dataclass(frozen=True)
class Row:
    """One image."""

    name: str
    #: (height, width, 3) BGR.
    image: NDArray[np.uint8]
    #: The class of each object.
    classes: Sequence[int]
    #: The mask of each object, of any size.
    truth: Iterable[NDArray[np.bool_]]
    #: None where nothing is known: a blank cell.
    before: Found | None
    after: Found | None


def draw(rows: Iterable[Row], names: Sequence[str], title: str, subtitle: str) -> bytes:
    """Return a JPEG of at most `MAX_BYTES`; of the rows one is in memory at a time."""
    strips = [_strip(row, names) for row in rows]
    width = len(_COLUMNS) * (_CELL_PX + _GAP_PX) + _GAP_PX
    height = _HEADER_PX + sum(strip.height + _GAP_PX for strip in strips)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP_PX, 26), title, _TEXT, _font(22), anchor="lm")
    pen.text((_GAP_PX, 52), subtitle, _FAINT, _font(14), anchor="lm")
    for column, heading in enumerate(_COLUMNS):
        pen.text((_left(column), _HEADER_PX - 14), heading, _TEXT, _font(15), anchor="lm")
    top = _HEADER_PX
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + _GAP_PX
    for quality in _JPEG_QUALITIES:
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality)
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()


def _strip(row: Row, names: Sequence[str]) -> Image.Image:
    """Return a row's four cells with their captions."""
    picture = resized(row.image, _CELL_PX / max(row.image.shape[:2]))
    height, width = picture.shape[:2]
    truth = [_fitted(mask, height, width) for mask in row.truth]
    anchors = _anchors(truth)
    strip = Image.new("RGB", (len(_COLUMNS) * (_CELL_PX + _GAP_PX) + _GAP_PX, height + _CAPTION_PX), _PAPER)
    pen = ImageDraw.Draw(strip)

    def place(column: int, masks: Iterable[NDArray[np.bool_]], tags: Sequence[str]) -> None:
        cell = _cell(picture, masks, row.classes, anchors, tags)
        strip.paste(cell, (_left(column) + (_CELL_PX - width) // 2, 0))

    def caption(column: int, text: str, colour: str = _FAINT) -> None:
        pen.text((_left(column), height + _CAPTION_PX / 2), text, colour, _font(14), anchor="lm")

    place(0, (), ())
    caption(0, printable(row.name, 40))
    place(1, truth, [printable(names[class_id], _MAX_NAME_CHARS) for class_id in row.classes])
    caption(1, f"{len(truth)} object" + ("s" if len(truth) != 1 else ""))
    base = fmean(row.before.ious) if row.before and row.before.ious else None
    for column, found in ((2, row.before), (3, row.after)):
        if found is None:
            pen.rectangle((_left(column), 0, _left(column) + _CELL_PX, height), fill=_BLANK)
            caption(column, "not known")
            continue
        place(column, found.masks, [f"{iou:.2f}" for iou in found.ious])
        mean = fmean(found.ious) if found.ious else 0.0
        caption(column, f"mean IoU {mean:.3f}", _TEXT)
        if column == 3 and base is not None:
            gain = round(mean, 3) - round(base, 3)
            colour = _BETTER if gain > 0 else _WORSE if gain < 0 else _FAINT
            x = _left(column) + pen.textlength(f"mean IoU {mean:.3f}  ", _font(14))
            pen.text((x, height + _CAPTION_PX / 2), f"{gain:+.3f}", colour, _font(14), anchor="lm")
    return strip


def _cell(
    picture: NDArray[np.uint8],
    masks: Iterable[NDArray[np.bool_]],
    classes: Sequence[int],
    anchors: Sequence[tuple[int, int, int]],
    tags: Sequence[str],
) -> Image.Image:
    """Return the picture with masks, and of their tags those that are not in the way of a larger object's."""
    canvas = picture.copy()
    height, width = canvas.shape[:2]
    for class_id, mask in zip(classes, masks, strict=False):
        small = _fitted(mask, height, width)
        if small.any():
            draw_mask(canvas, class_id, small)
            outlines, _ = cv2.findContours(small.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            # Dark below its colour: a yellow line shows on yellow things too.
            cv2.drawContours(canvas, outlines, -1, (0, 0, 0), 4, cv2.LINE_AA)
            cv2.drawContours(canvas, outlines, -1, COLORS.by_idx(class_id).as_bgr(), 2, cv2.LINE_AA)
    cell = Image.fromarray(cv2.cvtColor(canvas, cv2.COLOR_BGR2RGB))
    pen = ImageDraw.Draw(cell)
    taken: list[tuple[float, float, float, float]] = []
    order = sorted(range(len(tags)), key=lambda number: -anchors[number][2])
    for number in order:
        x, y, _ = anchors[number]
        half_width, half_height = pen.textlength(tags[number], _font(13)) / 2 + 4, 9
        x = min(max(x, half_width), width - half_width)
        y = min(max(y, half_height), height - half_height)
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        class_id = classes[number]
        pen.rounded_rectangle(box, 4, fill=COLORS.by_idx(class_id).as_rgb())
        pen.text((x, y), tags[number], TEXT_COLORS.by_idx(class_id).as_rgb(), _font(13), anchor="mm")
    return cell


def _anchors(truth: Sequence[NDArray[np.bool_]]) -> list[tuple[int, int, int]]:
    """Return x, y of each object's middle, well inside of it, and its area; (0, 0, 0) of none."""
    return [(*deepest(mask), int(np.count_nonzero(mask))) if mask.any() else (0, 0, 0) for mask in truth]


def _fitted(mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    if mask.shape == (height, width):
        return mask
    small: NDArray[np.bool_] = cv2.resize(
        mask.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST
    ).view(np.bool_)
    return small


def _left(column: int) -> int:
    return _GAP_PX + column * (_CELL_PX + _GAP_PX)


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(any_font()), size_px)
