"""Descriptions from a vision-language model that is asked for them, wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from labelling.parts import Describer
from labelling.vision_language import NoAnswer, Question, VisionLanguage, text_hash

PROMPT = (
    "Describe what this picture shows{tag} in one sentence: what it is, its colours, material and parts, and what it is doing. "
    "Say only what can be seen. Answer with the sentence alone."
)


class AskingDescriber(Describer):
    """Ask a model for a sentence about each picture.

    Args:
        model: Whom to ask.
        prompt: What to ask; `{tag}` becomes ", a TAG," where there is a tag, and nothing where there is none.
    """

    def __init__(self, *, model: VisionLanguage, prompt: str = PROMPT) -> None:
        self.model, self.prompt = model, prompt

    def settings(self) -> dict[str, Any]:
        """The model and the prompt."""
        return {"asked": self.model.settings(), "prompt_sha256": text_hash(self.prompt)}

    def to(self, device: Any) -> Self:
        """The describer with its model on a device; as `Part.to`."""
        self.model.to(device)
        return self

    def __call__(self, pictures: Sequence[np.ndarray], tags: Sequence[str]) -> list[str]:
        """Describe B pictures.

        Args:
            pictures: B pictures (H, W, 3) uint8 RGB.
            tags: A word for each, or "".

        Returns:
            B sentences of one line; "" where the model gave none, which its account counts.

        Raises:
            PartMissing: The model cannot be asked anything here.
            TooManyFailures: The model could not be asked too often.
        """
        questions = [
            Question(picture=picture, prompt=self.prompt.replace("{tag}", f", a {tag}," if tag else ""))
            for picture, tag in zip(pictures, tags, strict=True)
        ]
        answers = self.model.ask_all(questions)
        return ["" if isinstance(answer, NoAnswer) else " ".join(answer.text.split()) for answer in answers]
