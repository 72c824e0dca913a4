"""What metrics and arms are called on a page, and how numbers and the verdict are put.

An arm is one way of having pictures to score: made with the scene, made without it, given ready made (the scenes' own
real pictures, or those of a folder), and the two that frame them (ceiling and floor). Only words live here, no HTML.
"""

import math
from collections.abc import Iterable
from typing import Any

ARMS = {
    "with_scene": "with the scene",
    "without_scene": "without",
    "real": "real pictures",
    "pictures": "given pictures",
    "ceiling": "ceiling",
    "floor": "floor",
}
SCORED = {"with_scene": "with the scene", "real": "of the real pictures", "pictures": "of the given pictures"}
"""The arms of which an evaluation has one, the one that it is about, as said after a number."""
PRIMARY = "layout_iou"
ACRONYMS = {"ap", "ap50", "ap75", "ar", "clip", "cmmd", "fid", "iou", "kid", "lpips", "psnr", "ssim", "yolo"}
LOWER_IS_BETTER = {"cmmd", "fid", "kid", "loss", "lpips"}
NOTHING = "–"

# {arm: {metric: {"mean", "low", "high", "count"}}}, as write_metrics leaves them
Values = dict[str, dict[str, dict[str, Any]]]


def words(name: str) -> list[str]:
    """The words of a metric's name: `val/layout_iou` gives val, layout, iou."""
    return name.replace("/", " ").replace("_", " ").replace(".", " ").split()


def title(name: str) -> str:
    """A metric's name for people: `layout_iou` gives "Layout IoU"."""
    said = ["IoU" if word == "iou" else word.upper() if word in ACRONYMS else word for word in words(name)]
    text = " ".join(said)
    return text[:1].upper() + text[1:]


def lower_is_better(name: str) -> bool:
    """Whether a small value of this metric is the good one."""
    return not LOWER_IS_BETTER.isdisjoint(words(name.lower()))


def number(value: float | None, *, digits: int = 3) -> str:
    """A value with `digits` decimals; a whole number has none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.{digits}f}"


def digits(values: Iterable[float | None], *, most: int = 3) -> int:
    """How many decimals suit values read together: `most` below ten, fewer above, more for tiny ones."""
    size = max((abs(value) for value in values if value is not None), default=0.0)
    if 0 < size < 0.01:
        return most + 2
    return most if size < 10 else min(most, 2) if size < 100 else 1


def short(value: float) -> str:
    """A value of any size in few characters: 12000 gives "12k"."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def two_digits(value: float) -> str:
    """As said in a sentence; a value just beside nought or one gets more digits rather than becoming it."""
    beside = round(value, 2) in (0.0, 1.0) and round(value, 2) != value
    return number(float(value), digits=3 if beside else digits([value, 1.0], most=2))


def ends(values: Values, name: str) -> list[float]:
    """All means and ends of intervals that the arms have for one metric."""
    found = [arm[name].get(end) for arm in values.values() if name in arm for end in ("mean", "low", "high")]
    return [value for value in found if value is not None]


def in_order(values: Values) -> list[str]:
    """The names of all metrics, the primary one first."""
    first = primary_metric(values)
    return sorted({name for arm in values.values() for name in arm}, key=lambda name: (name != first, name))


def primary_metric(values: Values) -> str | None:
    """The metric that the verdict speaks of: the layout's where there is one, else the first."""
    names = [name for arm in ARMS for name in values.get(arm, {})]
    return PRIMARY if PRIMARY in names else names[0] if names else None


def verdict(values: Values) -> str:
    """The result in one line: "Layout IoU 0.86 with the scene, 0.10 without; ceiling 0.99, floor 0.09"."""
    name = primary_metric(values)
    means = _means(values, name)
    if name is None or not means:
        return "No metric gave a value."
    said = {"with_scene": SCORED["with_scene"], "without_scene": ARMS["without_scene"], **SCORED}
    made = [f"{two_digits(means[arm])} {words}" for arm, words in said.items() if arm in means]
    frame = [f"{ARMS[arm]} {two_digits(means[arm])}" for arm in ("ceiling", "floor") if arm in means]
    return f"{title(name)} {'; '.join(', '.join(part) for part in (made, frame) if part)}"


def reading(values: Values) -> str:
    """What the verdict means: how far from floor to ceiling, and whether the scene made any difference."""
    name = primary_metric(values)
    means = _means(values, name)
    said = []
    scored = next((arm for arm in ("with_scene", "pictures") if arm in means), None)
    if scored and {"ceiling", "floor"} <= means.keys() and means["ceiling"] != means["floor"]:
        share = (means[scored] - means["floor"]) / (means["ceiling"] - means["floor"])
        said.append(f"That is {100 * share:.0f} % of the way from floor to ceiling.")
    if {"with_scene", "without_scene"} <= means.keys() and _overlap(values, name):
        said.append("The intervals with and without the scene overlap: it makes no difference that shows.")
    return " ".join(said)


def _means(values: Values, name: str | None) -> dict[str, float]:
    """The arms that have a mean for this metric."""
    found = {arm: values[arm][name]["mean"] for arm in ARMS if name is not None and name in values.get(arm, {})}
    return {arm: mean for arm, mean in found.items() if mean is not None}


def _overlap(values: Values, name: str | None) -> bool:
    """Whether the intervals with and without the scene overlap; unknown ends are no sign of it."""
    arms = [values[arm][name] for arm in ("with_scene", "without_scene") if name is not None]
    if any(value[end] is None for value in arms for end in ("low", "high")):
        return False
    return max(value["low"] for value in arms) <= min(value["high"] for value in arms)
