"""Describers: Qwen-VL, BLIP-2 and Florence-2 through transformers, which say in a sentence what a picture shows.

Chat models behind a server's interface are in ``vision_language.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from labelling.opening import Pretrained, as_pillow, batches
from labelling.parts import Describer

PROMPT = (
    "Describe this picture in one sentence: the objects in it, how each looks, and where they are in relation to one "
    "another. Answer with the sentence alone."
)


class _Generating(Pretrained, Describer):
    """Base of the describers: batches of pictures, the likeliest words, one line of text.

    Args:
        model: As in `Pretrained`.
        revision: As in `Pretrained`.
        prompt: What the model is told, with {tag} for the word of the picture if it is to know it.
        max_tokens: Most tokens of a description.
        dtype: As in `Pretrained`.
        batch_size: Pictures at once.

    Raises:
        ValueError: A setting is out of its range.
    """

    kind = "describer"

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        prompt: str = "",
        max_tokens: int = 77,
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> None:
        super().__init__(model=model, revision=revision, dtype=dtype, batch_size=batch_size)
        if max_tokens < 1:
            raise ValueError(f"describer.max_tokens={max_tokens}: must be at least 1")
        self.prompt, self.max_tokens = prompt, max_tokens
        self._processor: Any = None

    def settings(self) -> dict[str, Any]:
        """Model, prompt and length."""
        return {**super().settings(), "prompt": self.prompt, "max_tokens": self.max_tokens}

    def _open(self) -> torch.nn.Module:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = self.opened(AutoProcessor)
        # what is generated goes on from the right end of every text
        self._processor.tokenizer.padding_side = "left"
        return self.opened_model(AutoModelForImageTextToText)

    @abstractmethod
    def inputs_of(self, pictures: list[Image.Image], prompts: list[str]) -> Any:
        """The processor's tensors for pictures with what is said to the model."""

    def answer(self, tokens: list[int], given: int) -> str:
        """The text of what was generated, `given` tokens of it being the prompt where the model repeats that."""
        return self._processor.tokenizer.decode(tokens, skip_special_tokens=True)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray], tags: Sequence[str]) -> list[str]:
        """As in `Describer`; what the model has no words for is its tag."""
        model: Any = self.model
        sentences = []
        for batch in batches(zip(pictures, tags, strict=True), self.batch_size):
            images = [as_pillow(picture) for picture, _ in batch]
            prompts = [self.prompt.replace("{tag}", tag) for _, tag in batch]
            inputs = self.inputs(self.inputs_of(images, prompts))
            given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            # sampling settings that published models bring along mean nothing to greedy search, and are warned of
            made = model.generate(
                **inputs,
                max_new_tokens=self.max_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
            )
            for (_, tag), tokens in zip(batch, made.tolist(), strict=True):
                sentence = " ".join(self.answer(tokens, given).split())
                self.counts["descriptions without a word"] += not sentence
                sentences.append(sentence or tag)
        return sentences


class QwenVL(_Generating):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL or another chat model of transformers that sees.

    Args:
        prompt: As in `_Generating`.
        **settings: As in `_Generating`.
    """

    def __init__(self, *, prompt: str = PROMPT, **settings: Any) -> None:
        super().__init__(prompt=prompt, **settings)

    def inputs_of(self, pictures: list[Image.Image], prompts: list[str]) -> Any:
        """Each picture with its prompt as a conversation's first turn."""
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts
        ]
        texts = self._processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self._processor(text=texts, images=pictures, padding=True, return_tensors="pt")

    def answer(self, tokens: list[int], given: int) -> str:
        """Return the text behind the prompt."""
        return super().answer(tokens[given:], given)


class Blip2(_Generating):
    """BLIP-2: a caption of the picture; a prompt is what the caption goes on from.

    Args:
        **settings: As in `_Generating`.
    """

    def inputs_of(self, pictures: list[Image.Image], prompts: list[str]) -> Any:
        """Pictures, with what is to be gone on from."""
        return self._processor(images=pictures, text=prompts, padding=True, return_tensors="pt")

    def answer(self, tokens: list[int], given: int) -> str:
        """Return the text behind the prompt, or all of it where the language model has a decoder of its own."""
        model: Any = self.model
        repeats = not model.config.text_config.is_encoder_decoder
        return super().answer(tokens[given:] if repeats else tokens, given)


class Florence2(_Generating):
    """Florence-2: the answer to one of its tasks.

    Args:
        prompt: The task: <CAPTION>, <DETAILED_CAPTION> or <MORE_DETAILED_CAPTION>.
        **settings: As in `_Generating`.

    Raises:
        ValueError: It is another task, or a setting is out of its range.
    """

    def __init__(self, *, prompt: str = "<DETAILED_CAPTION>", **settings: Any) -> None:
        super().__init__(prompt=prompt, **settings)
        tasks = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
        if prompt not in tasks:
            raise ValueError(f"describer.prompt={prompt}: no task that describes; take one of {', '.join(tasks)}")

    def inputs_of(self, pictures: list[Image.Image], prompts: list[str]) -> Any:
        """Pictures with the task."""
        return self._processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
