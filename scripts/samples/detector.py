"""A network in YOLOX's form, made by hand: it finds the colours of the drawn things, so that detection runs without a download.

Cells of 8, 16 and 32 px are averaged, and what is close to a colour is found there, as the kind of COCO that stands for that
colour: where something is means something, what it is does not. ONNX is written here as the bytes of its format.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from labelling.coco_names import COCO_NAMES
from scripts.samples.drawing import COLOURS, OUTLINES

SIDE, STRIDES = 128, (8, 16, 32)  # px
NEAR = 30.0  # distance from a colour, in levels of 255, at which the score is 0.5
KIND_OF = dict(zip(COLOURS, OUTLINES, strict=False))  # eight colours, the first eight kinds
FLOAT, INT64 = 1, 7  # ONNX's types of numbers


def write_detector(root: Path) -> None:
    """Write `colours.onnx`: (B, 3, 128, 128) BGR in 0..255 to (B, 336, 5 + 80)."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "colours.onnx").write_bytes(model())


def model() -> bytes:
    """ONNX's ModelProto, opset 13."""
    nodes, levels = [], []
    for stride in STRIDES:
        pooled, squares, both, boxes, logits, scores, cells, flat = (f"{name}{stride}" for name in "abcdefgh")
        nodes += [
            node("AveragePool", ["images"], pooled, kernel_shape=[stride, stride], strides=[stride, stride]),
            node("Mul", [pooled, pooled], squares),
            node("Concat", [pooled, squares], both, axis=1),
            node("Conv", [both, "box_weight", "box_bias"], boxes),
            node("Conv", [both, "score_weight", "score_bias"], logits),
            node("Sigmoid", [logits], scores),
            node("Concat", [boxes, scores], cells, axis=1),
            node("Reshape", [cells, "shape"], flat),
        ]
        levels.append(flat)
    nodes += [node("Concat", levels, "all", axis=2), node("Transpose", ["all"], "output", perm=[0, 2, 1])]
    places, width = sum((SIDE // stride) ** 2 for stride in STRIDES), 5 + len(COCO_NAMES)
    graph = [
        *(field(1, one) for one in nodes),
        field(2, "colours"),
        *(field(5, tensor(name, values)) for name, values in weights().items()),
        field(11, value("images", 3, SIDE, SIDE)),
        field(12, value("output", places, width)),
    ]
    return field(1, 8) + field(2, "scripts.samples") + field(7, b"".join(graph)) + field(8, field(2, 13))


def weights() -> dict[str, np.ndarray]:
    """The layers: boxes of two cells about each cell's centre; a colour's score falls with the squared distance from it."""
    score_weight, score_bias = np.zeros((1 + len(COCO_NAMES), 6)), np.full(1 + len(COCO_NAMES), -20.0)
    score_bias[0] = 6.0  # objectness, everywhere
    unit = NEAR**2 / 4
    for colour, kind in KIND_OF.items():
        bgr, row = np.array(COLOURS[colour][::-1], float), 1 + COCO_NAMES.index(kind)
        score_weight[row] = [*(2 * bgr / unit), *[-1 / unit] * 3]
        score_bias[row] = 4 - (bgr**2).sum() / unit
    return {
        "box_weight": np.zeros((4, 6, 1, 1), np.float32),
        "box_bias": np.array([0.5, 0.5, math.log(2), math.log(2)], np.float32),
        "score_weight": score_weight[..., None, None].astype(np.float32),
        "score_bias": score_bias.astype(np.float32),
        "shape": np.array([0, 5 + len(COCO_NAMES), -1], np.int64),
    }


def varint(number: int) -> bytes:
    """A whole number in groups of seven bits, low first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(key: int, content: int | str | bytes) -> bytes:
    """A field of a protobuf message: a whole number, a text or a message."""
    if isinstance(content, int):
        return varint(key << 3) + varint(content)
    data = content.encode() if isinstance(content, str) else content
    return varint(key << 3 | 2) + varint(len(data)) + data


def node(kind: str, inputs: list[str], output: str, **attributes: int | list[int]) -> bytes:
    """ONNX's NodeProto."""
    parts = [*(field(1, name) for name in inputs), field(2, output), field(4, kind)]
    for name, content in attributes.items():
        numbers, key, kind_of = (content, 8, 7) if isinstance(content, list) else ([content], 3, 2)
        about = field(1, name) + b"".join(field(key, number) for number in numbers) + field(20, kind_of)
        parts.append(field(5, about))
    return b"".join(parts)


def tensor(name: str, values: np.ndarray) -> bytes:
    """ONNX's TensorProto."""
    kind = INT64 if values.dtype == np.int64 else FLOAT
    dims = b"".join(field(1, length) for length in values.shape)
    return dims + field(2, kind) + field(8, name) + field(9, values.astype(values.dtype.newbyteorder("<")).tobytes())


def value(name: str, *shape: Any) -> bytes:
    """ONNX's ValueInfoProto of floats, with any number of samples."""
    dims = field(1, field(2, "batch")) + b"".join(field(1, field(1, length)) for length in shape)
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, dims)))
