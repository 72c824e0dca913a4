"""What metrics share that look with labelling's parts: opening them, what to ask a detector for, and what it answers.

Which answers are right is each metric's own to say.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from labelling.opening import Pretrained
from labelling.parts import Detections, Detector, Part, PartMissing
from metrics.base import NotAvailable
from scenes.scene import SceneObject

PartKind = TypeVar("PartKind", bound=Part)

TEXTS = ("label", "phrase")


def on_device(part: PartKind, device: Any, *, where: str) -> PartKind:
    """A part with its model opened and on a device.

    Args:
        part: The part.
        device: Where it is to work.
        where: The metric's node in the configuration, for the message.

    Returns:
        The part.

    Raises:
        NotAvailable: What it needs is not there.
    """
    try:
        part = part.to(device)
        if isinstance(part, Pretrained):
            _ = part.model  # opened now, so that what is missing is said before pictures are drawn
    except PartMissing as error:
        raise NotAvailable(f"{where}.{error}") from error
    return part


def check_text(text: str, *, where: str) -> None:
    """Refuses what is no text of an object.

    Args:
        text: "label" or "phrase".
        where: The metric's node in the configuration.

    Raises:
        ValueError: It is neither.
    """
    if text not in TEXTS:
        raise ValueError(f"{where}.text={text}: no such text; choose {' or '.join(TEXTS)}")


def word_of(item: SceneObject, text: str) -> str:
    """What an object is called, in small letters: its label, or its phrase where there is none or phrases are wanted."""
    word = item.label if text == "label" and item.label else item.phrase
    return " ".join(word.lower().split())


def find_words(
    detector: Detector, images: Sequence[np.ndarray], words: Sequence[Sequence[str]], *, singly: bool = False
) -> list[Detections]:
    """What a detector finds in pictures, asked for words where it has no list of its own.

    Args:
        detector: The detector.
        images: B pictures (H, W, 3) uint8 RGB.
        words: For each picture what to look for; a picture without any is not shown to a detector that has to be asked.
        singly: Each word is asked for by itself, and not all of a picture at once.

    Returns:
        B detections with labels in small letters; of a detector with a list of its own everything that it finds.
    """
    if detector.names is not None:
        return [_small(one) for one in detector(images)]
    questions = []
    for place, one in enumerate(words):
        asked = sorted(set(one))
        questions += [(place, [word]) for word in asked] if singly else [(place, asked)] * bool(asked)
    answers = (
        detector([images[place] for place, _ in questions], [asked for _, asked in questions]) if questions else []
    )
    found: list[list[Detections]] = [[] for _ in images]
    for (place, _), answer in zip(questions, answers, strict=True):
        found[place].append(answer)
    return [_joined(parts) for parts in found]


def _joined(parts: Sequence[Detections]) -> Detections:
    """Answers to several questions about a picture as one, the most certain first."""
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(one.boxes for one in parts)])
    scores = np.concatenate([np.zeros(0, np.float32), *(one.scores for one in parts)])
    labels = [label for one in parts for label in one.labels]
    order = np.argsort(-scores, kind="stable")
    return _small(Detections(boxes=boxes[order], scores=scores[order], labels=tuple(labels[place] for place in order)))


def _small(found: Detections) -> Detections:
    return Detections(boxes=found.boxes, scores=found.scores, labels=tuple(label.lower() for label in found.labels))
