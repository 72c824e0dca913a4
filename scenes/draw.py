"""Pictures of scenes for people: boxes over a picture, the scene graph as a diagram, pictures in a grid.

The n-th object has the same colour in every drawing. Nothing here is read back by a program, and nothing
loads a font from the machine: the text is in Pillow's own.
"""

import colorsys
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scenes.scene import Scene

SMALLEST = 256  # pixels of the shorter side that boxes are drawn at, at least
INK = (28, 30, 36)
PAPER = (255, 255, 255)
LEGIBLE = 60
"""Objects whose phrases a picture has room for; placing them costs the square of their number."""
_PALETTE = (
    (230, 57, 70),
    (29, 110, 216),
    (38, 153, 74),
    (245, 140, 20),
    (138, 63, 192),
    (0, 158, 170),
    (222, 62, 152),
    (150, 106, 40),
    (110, 120, 20),
    (84, 84, 200),
)
_GOLDEN = 0.61803398875  # turns of the colour circle that keep any number of hues apart
_SHARP = 3  # diagrams are drawn this much larger and scaled down, since Pillow's lines are jagged

Rectangle = tuple[float, float, float, float]  # xyxy in pixels
Colour = tuple[int, int, int]


def colour_of(index: int) -> Colour:
    """The colour (R, G, B) in 0…255 of the n-th object: ten chosen ones, then hues far from one another."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    turn = (index * _GOLDEN) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(turn, 0.75, 0.62 + 0.2 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(picture: Image.Image, scene: Scene, *, scale: int | None = None) -> Image.Image:
    """Draw the boxes of a scene with their phrases over a picture, the phrases of the largest `LEGIBLE` boxes.

    Args:
        picture: The picture that the scene's frame describes, of any size.
        scene: Objects without a box are left out.
        scale: Whole factor to enlarge the picture by (nearest neighbour) before drawing; by default as much
            as brings its shorter side to at least 256 pixels.

    Returns:
        A new picture in RGB.

    Raises:
        ValueError: ``scale`` is less than 1.
    """
    canvas = enlarged(picture, scale=scale)
    width, height = canvas.size
    draw = ImageDraw.Draw(canvas, "RGBA")
    line = max(2, round(min(canvas.size) / 160))
    crowded = len(scene.objects) > 10
    font = _font(max(12, round(min(canvas.size) / (34 if crowded else 26))))
    placed = [(i, _pixels(item.box, width, height)) for i, item in enumerate(scene.objects) if item.box]
    # The large ones first, so that a box inside another stays in sight.
    placed.sort(key=lambda pair: -(pair[1][2] - pair[1][0]) * (pair[1][3] - pair[1][1]))
    for index, box in placed:
        draw.rectangle(_grown(box, 1), outline=(255, 255, 255, 150), width=line + 2)
        draw.rectangle(box, outline=colour_of(index), width=line)
    taken: list[Rectangle] = []
    for index, box in placed[:LEGIBLE]:
        room = min(max(0.4 * width, box[2] - box[0]), 0.7 * width)
        text = _wrapped(scene.objects[index].phrase, font, max_width=room, max_lines=1 if crowded else 2)
        taken.append(_box_label(draw, text, font, box, colour_of(index), canvas.size, taken))
    return canvas


def enlarged(picture: Image.Image, *, scale: int | None = None) -> Image.Image:
    """A picture in RGB, enlarged by a whole factor (nearest neighbour).

    Args:
        picture: Of any size.
        scale: The factor; by default as much as brings its shorter side to at least 256 pixels.

    Returns:
        A new picture.

    Raises:
        ValueError: ``scale`` is less than 1.
    """
    if scale is None:
        scale = max(1, math.ceil(SMALLEST / min(picture.size)))
    if scale < 1:
        raise ValueError(f"scale={scale} is not a whole factor of at least 1; leave it out to fit the picture")
    size = picture.width * scale, picture.height * scale
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def draw_layout(scene: Scene, *, size: tuple[int, int] = (512, 512)) -> Image.Image:
    """Draw a scene by itself: its boxes with their phrases on white, or its graph where an object has no box.

    Args:
        scene: The scene.
        size: (width, height) in pixels.

    Returns:
        A picture in RGB.
    """
    if any(item.box is None for item in scene.objects):
        return draw_graph(scene, size=size)
    return draw_boxes(Image.new("RGB", size, PAPER), scene, scale=1)


def draw_graph(scene: Scene, *, size: tuple[int, int] = (512, 512)) -> Image.Image:
    """Draw a scene graph: a node for each object, an arrow from subject to object for each relation.

    Nodes stand at the centres of their boxes if every object has one, pushed apart where they would overlap,
    and on an ellipse otherwise. Of more than `LEGIBLE` objects the first are drawn, and the others are counted.

    Args:
        scene: The scene; without objects the diagram says so.
        size: (width, height) in pixels.

    Returns:
        A picture in RGB on white.

    Raises:
        ValueError: ``size`` is smaller than 64 pixels.
    """
    if min(size) < 64:
        raise ValueError(f"size={size} is too small to draw in; give (width, height) of at least 64 pixels each")
    width, height = size[0] * _SHARP, size[1] * _SHARP
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    large = _font(_SHARP * max(11, round(min(size) / 32)))
    small = _font(_SHARP * max(9, round(min(size) / 38)))
    if (more := len(scene.objects) - LEGIBLE) > 0:
        scene = scene.only(range(LEGIBLE))
        draw.text((width / 2, height), f"and {more} more objects", fill=(120, 120, 128), font=small, anchor="md")
    texts = [_wrapped(item.phrase, large, max_width=0.26 * width, max_lines=3) for item in scene.objects]
    if not texts:
        draw.text((width / 2, height / 2), "no objects", fill=(120, 120, 128), font=large, anchor="mm")
    nodes = _node_rectangles(scene, [_text_size(draw, text, large) for text in texts], (width, height))
    taken = list(nodes)
    labels = []
    for (subject, target), predicates in _edges(scene).items():
        curve = _curve(nodes[subject], nodes[target])
        _arrow(draw, curve, colour_of(subject))
        text = _wrapped(" / ".join(predicates), small, max_width=0.3 * width, max_lines=3)
        labels.append((text, _edge_label(draw, text, small, curve, taken), colour_of(subject)))
        taken.append(labels[-1][1])
    for text, rectangle, colour in labels:
        draw.rounded_rectangle(rectangle, radius=2 * _SHARP, fill=PAPER)
        _centred(draw, text, small, rectangle, _darker(colour))
    for index, (text, rectangle) in enumerate(zip(texts, nodes, strict=True)):
        colour = colour_of(index)
        draw.rounded_rectangle(rectangle, radius=5 * _SHARP, fill=colour, outline=_darker(colour), width=_SHARP)
        _centred(draw, text, large, rectangle, _readable_on(colour))
    return canvas.resize(size, Image.Resampling.LANCZOS)


def grid(
    pictures: Sequence[Sequence[Image.Image]],
    *,
    titles: Sequence[str] | None = None,
    sides: Sequence[str] | None = None,
    padding: int = 8,
) -> Image.Image:
    """Set pictures out in rows, each centred in its cell, on white.

    Args:
        pictures: Rows of pictures, of any sizes; a row may be shorter than the others.
        titles: One title for each column.
        sides: One title for each row, on its left.
        padding: Pixels around and between the cells.

    Returns:
        A picture in RGB.

    Raises:
        ValueError: There are no pictures, or not as many titles as columns or rows.
    """
    columns = max((len(row) for row in pictures), default=0)
    if columns == 0:
        raise ValueError("pictures=[] has nothing to show; give at least one row with one picture")
    if titles is not None and len(titles) != columns:
        raise ValueError(f"titles={list(titles)} are {len(titles)} for {columns} columns; give one for each")
    if sides is not None and len(sides) != len(pictures):
        raise ValueError(f"sides={list(sides)} are {len(sides)} for {len(pictures)} rows; give one for each")
    widths = [max((row[c].width for row in pictures if c < len(row)), default=0) for c in range(columns)]
    heights = [max((picture.height for picture in row), default=0) for row in pictures]
    font = _font(min(24, max(12, round(max(widths) / 18))))
    if titles is not None:  # a column is as wide as the longest word above it
        words = [max(map(font.getlength, title.split()), default=0) for title in titles]
        widths = [max(width, math.ceil(word)) for width, word in zip(widths, words, strict=True)]
    lines = [
        _wrapped(title, font, max_width=width, max_lines=3) for title, width in zip(titles or [], widths, strict=False)
    ]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    head = max((_text_size(measure, line, font)[1] + padding for line in lines), default=0)
    side = max((math.ceil(font.getlength(text)) + padding for text in sides or []), default=0)
    size = (side + sum(widths) + padding * (columns + 1), head + sum(heights) + padding * (len(heights) + 1))
    canvas = Image.new("RGB", (round(size[0]), round(size[1])), PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = np.cumsum([side + padding] + [w + padding for w in widths])
    tops = np.cumsum([head + padding] + [h + padding for h in heights])
    for left, width, line in zip(lefts, widths, lines, strict=False):
        _centred(draw, line, font, (left, padding, left + width, padding + head - padding), INK)
    for text, top, height in zip(sides or [], tops, heights, strict=False):
        _centred(draw, text, font, (padding, top, side, top + height), INK)
    for row, top, height in zip(pictures, tops, heights, strict=False):
        for picture, left, width in zip(row, lefts, widths, strict=False):
            corner = int(left) + (width - picture.width) // 2, int(top) + (height - picture.height) // 2
            canvas.paste(picture.convert("RGB"), corner)
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("Pillow was built without FreeType, so text has no size; install one of its wheels")
    return font


def _pixels(box: Rectangle, width: int, height: int) -> Rectangle:
    x0, y0, x1, y1 = box
    return x0 * (width - 1), y0 * (height - 1), x1 * (width - 1), y1 * (height - 1)


def _grown(box: Rectangle, by: float) -> Rectangle:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _luminance(colour: Colour) -> float:
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def _readable_on(colour: Colour) -> Colour:
    return INK if _luminance(colour) > 0.62 else PAPER


def _darker(colour: Colour) -> Colour:
    return tuple(round(0.7 * part) for part in colour)  # pyright: ignore[reportReturnType]


def _wrapped(text: str, font: ImageFont.FreeTypeFont, *, max_width: float, max_lines: int) -> str:
    """``text`` in lines of at most ``max_width`` pixels, the rest of it as an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= max_width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += "…"
    for place, line in enumerate(lines):
        while font.getlength(line) > max_width and len(line) > 2:
            line = line.rstrip("…")[:-1] + "…"
        lines[place] = line
    return "\n".join(lines)


def _text_size(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont) -> tuple[float, float]:
    left, _, right, _ = draw.multiline_textbbox((0, 0), text, font=font)
    ascent, descent = font.getmetrics()
    lines = text.count("\n") + 1
    return right - left, lines * (ascent + descent) + (lines - 1) * font.size * 0.15


def _centred(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, into: Rectangle, fill: Colour) -> None:
    centre = (into[0] + into[2]) / 2, (into[1] + into[3]) / 2
    draw.multiline_text(centre, text, fill=fill, font=font, anchor="mm", align="center", spacing=font.size * 0.15)


def _overlap(rectangle: Rectangle, others: Iterable[Rectangle]) -> float:
    x0, y0, x1, y1 = rectangle
    return sum(max(0.0, min(x1, b[2]) - max(x0, b[0])) * max(0.0, min(y1, b[3]) - max(y0, b[1])) for b in others)


def _box_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont,
    box: Rectangle,
    colour: Colour,
    canvas: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Write a label on the edge of its box, where it hides the fewest others; gives back where it is."""
    pad = font.size * 0.3
    width, height = _text_size(draw, text, font)
    width, height = width + 2 * pad, height + pad
    x0, y0, x1, y1 = box
    tops = (y0 - height, y0, y1 - height, y1, y0 + height, y0 - 2 * height, (y0 + y1 - height) / 2)
    spots = []
    for top in tops:  # the first of equally good ones is taken
        for left in (x0, x1 - width, (x0 + x1 - width) / 2, x0 - width, x1):
            left = min(max(left, 0), max(canvas[0] - width, 0))
            down = min(max(top, 0), max(canvas[1] - height, 0))
            spots.append((left, down, left + width, down + height))
    own = width * height / max((x1 - x0) * (y1 - y0), 1)  # so that a label does not hide a small thing itself
    best = min(spots, key=lambda spot: _overlap(spot, taken) + own * _overlap(spot, [box]))
    draw.rounded_rectangle(best, radius=pad * 0.7, fill=(*colour, 225))
    _centred(draw, text, font, best, _readable_on(colour))
    return best


def _edges(scene: Scene) -> dict[tuple[int, int], list[str]]:
    """The predicates of each ordered pair of objects."""
    edges: dict[tuple[int, int], list[str]] = {}
    for relation in scene.relations:
        edges.setdefault((relation.subject, relation.object), []).append(relation.predicate)
    return edges


def _node_rectangles(scene: Scene, texts: Sequence[tuple[float, float]], canvas: tuple[int, int]) -> list[Rectangle]:
    """Where the nodes stand: rectangles around their texts, inside the canvas, apart from one another."""
    if not texts:
        return []
    half = np.array(texts) / 2 + 6 * _SHARP
    boxes = [item.box for item in scene.objects]
    if all(box is not None for box in boxes):
        corners = np.array(boxes)
        centres = (corners[:, :2] + corners[:, 2:]) / 2
    else:
        angle = 2 * np.pi * np.arange(len(texts)) / len(texts) - np.pi / 2
        centres = 0.5 + 0.5 * np.stack([np.cos(angle), np.sin(angle)], -1) * (len(texts) > 1)
    low, high = half + 8 * _SHARP, np.array(canvas) - half - 8 * _SHARP
    spread = np.ptp(centres, axis=0)
    centres = np.where(spread > 0, (centres - centres.min(0)) / np.where(spread > 0, spread, 1), 0.5)
    centres = low + centres * (high - low)
    gap = np.full((len(texts), len(texts), 2), 12.0 * _SHARP)
    for pair in _edges(scene):
        gap[pair] = gap[pair[::-1]] = (70 * _SHARP, 40 * _SHARP)  # room for an arrow and its label
    for _ in range(300):
        offset = centres[:, None] - centres[None]
        # Equal centres have no direction to part in: lean them apart by their order.
        offset += 1e-3 * (np.arange(len(texts))[:, None] - np.arange(len(texts)))[..., None]
        depth = half[:, None] + half[None] + gap - np.abs(offset)
        inside = (depth > 0).all(-1) & ~np.eye(len(texts), dtype=bool)
        if not inside.any():
            break
        axis = depth.argmin(-1)[..., None] == np.arange(2)
        push = np.where(inside[..., None] & axis, np.sign(offset) * depth, 0).sum(1)
        centres = np.clip(centres + 0.2 * push, np.minimum(low, high), np.maximum(low, high))
    return [tuple(row) for row in np.concatenate([centres - half, centres + half], -1).tolist()]


def _curve(start: Rectangle, end: Rectangle) -> np.ndarray:
    """Points (P, 2) of a slightly bent line between the borders of two rectangles."""
    a = np.array([start[0] + start[2], start[1] + start[3]]) / 2
    b = np.array([end[0] + end[2], end[1] + end[3]]) / 2
    along = b - a
    # Always bent to the same hand, so the two directions of a pair lie on different sides.
    control = (a + b) / 2 + 0.12 * np.array([-along[1], along[0]])
    t = np.linspace(0, 1, 160)[:, None]
    points = (1 - t) ** 2 * a + 2 * t * (1 - t) * control + t**2 * b
    outside = ~(_within(points, start) | _within(points, _grown(end, 2 * _SHARP)))
    return points[outside] if outside.sum() > 3 else points


def _within(points: np.ndarray, box: Rectangle) -> np.ndarray:
    return np.all((points >= box[:2]) & (points <= box[2:]), axis=-1)


def _arrow(draw: ImageDraw.ImageDraw, curve: np.ndarray, colour: Colour) -> None:
    head = 9 * _SHARP
    tip = curve[-1]
    back = curve[np.abs(np.linalg.norm(curve - tip, axis=1) - head).argmin()]
    shaft = [tuple(p) for p in curve if np.linalg.norm(p - tip) >= head * 0.7]
    if len(shaft) > 1:
        draw.line(shaft, fill=colour, width=2 * _SHARP, joint="curve")
    along = (tip - back) / max(float(np.linalg.norm(tip - back)), 1e-6)
    side = np.array([-along[1], along[0]]) * head * 0.45
    draw.polygon([tuple(tip), tuple(tip - along * head + side), tuple(tip - along * head - side)], fill=colour)


def _edge_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont,
    curve: np.ndarray,
    taken: Sequence[Rectangle],
) -> Rectangle:
    """The place along an arrow where its label hides the least, near the middle if it can."""
    width, height = _text_size(draw, text, font)
    half = np.array([width / 2 + 2 * _SHARP, height / 2])
    spots = []
    for t in (0.5, 0.42, 0.58, 0.34, 0.66, 0.25, 0.75):
        centre = curve[round(t * (len(curve) - 1))]
        spots.append((*(centre - half), *(centre + half)))
    return min(spots, key=lambda spot: _overlap(spot, taken))
