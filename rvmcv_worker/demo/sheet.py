"""The contact sheet: pictures with what the model found drawn in, and what is really there dashed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

#: Left, top, right, bottom in pixels of the picture as it is stored.
Box = tuple[float, float, float, float]

TILE_PX = 320
#: How much of a mask's colour covers the picture, 0 to 255.
MASK_OPACITY = 110
COLUMNS = 4
GAP_PX = 16
CAPTION_PX = 26
HEADER_PX = 104

PAPER, TEXT, FAINT, WARNING = "#f4f5f7", "#1d2530", "#6b7684", "#c4281b"
#: Told apart by people with colour-blindness too (Okabe and Ito), brightest contrast first.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")


@dataclass(frozen=True)
class Detection:
    """What the model says; `confidence` from 0 to 1."""

    name: str
    confidence: float
    bbox: Box
    #: Of the whole picture, white where the object is; None without masks.
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Truth:
    """What the label says."""

    name: str
    bbox: Box


@dataclass(frozen=True)
class Row:
    """One picture of the sheet."""

    image: Path
    detections: tuple[Detection, ...]
    truths: tuple[Truth, ...]

    def found(self) -> int:
        """How many truths have a detection of their class on them (IoU of at least 0.5), each used once."""
        free = sorted(self.detections, key=lambda detection: -detection.confidence)
        count = 0
        for truth in self.truths:
            hits = [d for d in free if d.name == truth.name and overlap(d.bbox, truth.bbox) >= 0.5]
            if hits:
                free.remove(hits[0])
                count += 1
        return count


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow carries: the same sheet on every machine."""
    return ImageFont.load_default(size_px)


def dashed_box(draw: ImageDraw.ImageDraw, box: Box) -> None:
    """A thin dashed rectangle, white with black between the dashes, so that it shows on any ground."""
    left, top, right, bottom = (round(edge) for edge in box)
    for x in range(left, right + 1):
        tone = "white" if (x - left) // 5 % 2 == 0 else "black"
        draw.point([(x, top), (x, bottom)], tone)
    for y in range(top, bottom + 1):
        tone = "white" if (y - top) // 5 % 2 == 0 else "black"
        draw.point([(left, y), (right, y)], tone)


def tag(draw: ImageDraw.ImageDraw, box: Box, text: str, colour: str) -> None:
    """A filled label at the box's upper left corner, moved so that it stays on the tile."""
    lettering = font(13)
    width, height = draw.textlength(text, lettering) + 8, 17
    x = min(max(box[0] - 1, 0), TILE_PX - width)
    y = box[1] - height if box[1] >= height else min(box[1], TILE_PX - height)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = ImageColor.getrgb(colour)[:3]
    ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 125 else "white"
    draw.text((x + 4, y + height / 2), text, ink, lettering, anchor="lm")


def tile(row: Row, colours: dict[str, str]) -> Image.Image:
    """One picture, fitted into a square of `TILE_PX`, with its boxes."""
    square = Image.new("RGB", (TILE_PX, TILE_PX), "#d9dce1")
    with Image.open(row.image) as stored:
        # Detectors turn a photograph as its EXIF says; boxes are in those coordinates.
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    scale = TILE_PX / max(upright.size)
    fitted = upright.resize((max(1, round(upright.width * scale)), max(1, round(upright.height * scale))))
    shift_x, shift_y = (TILE_PX - fitted.width) // 2, (TILE_PX - fitted.height) // 2
    for detection in row.detections:
        if detection.mask is not None:
            veil = detection.mask.convert("L").resize(fitted.size).point(lambda on: on * MASK_OPACITY // 255)
            fitted.paste(colours[detection.name], mask=veil)
    square.paste(fitted, (shift_x, shift_y))
    draw = ImageDraw.Draw(square)

    def placed(box: Box) -> Box:
        left, top, right, bottom = (edge * scale for edge in box)
        return left + shift_x, top + shift_y, right + shift_x - 1, bottom + shift_y - 1

    for detection in row.detections:
        draw.rectangle(placed(detection.bbox), outline=colours[detection.name], width=3)
    for truth in row.truths:
        dashed_box(draw, placed(truth.bbox))
    for detection in sorted(row.detections, key=lambda detection: detection.confidence):
        text = f"{detection.name} {detection.confidence:.2f}"
        tag(draw, placed(detection.bbox), text, colours[detection.name])
    return square


def caption(row: Row) -> tuple[str, str]:
    """What is below a picture, and its colour."""
    found = row.found()
    extra = len(row.detections) - found
    if not row.truths and not extra:
        return "nothing there, nothing found", FAINT
    text = f"{found} of {len(row.truths)} found" + (f", {extra} too many" if extra else "")
    return text, FAINT if found == len(row.truths) and not extra else WARNING


def _end_of(name: str, room: float) -> str:
    """Return so much of the end of a name as has room."""
    while name and font(14).getlength(name) > room:
        name = name[1:]
    return name


def legend(draw: ImageDraw.ImageDraw, x: float, y: float, colours: dict[str, str]) -> None:
    """What the boxes' colours and dashes mean."""
    for name, colour in colours.items():
        draw.rectangle((x, y - 8, x + 22, y + 8), outline=colour, width=3)
        draw.text((x + 30, y), name, TEXT, font(15), anchor="lm")
        x += 30 + draw.textlength(name, font(15)) + 24
    dashed_box(draw, (x, y - 8, x + 22, y + 8))
    draw.text((x + 30, y), "label (what is really there)", TEXT, font(15), anchor="lm")


def draw_sheet(
    rows: Sequence[Row], path: Path, *, names: Sequence[str], title: str, subtitle: str = ""
) -> Path:
    """Draw the sheet to `path` (its ending names the format); `names` are the classes, in their order."""
    seen = {detection.name for row in rows for detection in row.detections}
    seen |= {truth.name for row in rows for truth in row.truths}
    known = [*names, *sorted(seen - set(names))]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(known) if name in seen}
    columns = max(1, min(COLUMNS, len(rows)))
    lines = -(-len(rows) // columns)
    width = max(2, columns) * (TILE_PX + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (width, HEADER_PX + lines * (TILE_PX + CAPTION_PX + GAP_PX)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, 28), title, TEXT, font(24), anchor="lm")
    draw.text((GAP_PX, 56), subtitle, FAINT, font(15), anchor="lm")
    legend(draw, GAP_PX, 84, colours)
    for i, row in enumerate(rows):
        x = GAP_PX + i % columns * (TILE_PX + GAP_PX)
        y = HEADER_PX + i // columns * (TILE_PX + CAPTION_PX + GAP_PX)
        sheet.paste(tile(row, colours), (x, y))
        text, tone = caption(row)
        draw.text((x, y + TILE_PX + CAPTION_PX / 2), text, tone, font(14), anchor="lm")
        end = x + TILE_PX, y + TILE_PX + CAPTION_PX / 2
        room = TILE_PX - GAP_PX - draw.textlength(text, font(14))
        draw.text(end, _end_of(row.image.name, room), FAINT, font(14), anchor="rm")
    sheet.save(path)
    return path
