"""Vision-language models of transformers on this machine: image-text-to-text, asked through their own chat template.

What is asked, and the cache of answers, are in `vision_language.py`.
"""

from __future__ import annotations

import threading
from typing import Any, Self

import torch
from PIL import Image

from files.quiet import quiet_libraries
from labelling.parts import PartMissing
from labelling.vision_language import Answer, NoAnswer, Question, VisionLanguage, picture_hash, text_hash


class LocalModel(VisionLanguage):
    """A model that transformers opens as image-text-to-text.

    An answer depends on its question alone: at a temperature above 0 its random numbers are drawn from the question and the seed.

    Args:
        model: Name on the hub, or folder.
        revision: Of a name on the hub.
        dtype: Of the weights: float32, bfloat16, float16.
        max_tokens: Longest answer; one that is cut is a failure.
        temperature: 0 for the most likely words.
        seed: Of answers at a temperature above 0.
        cache: As in `VisionLanguage`.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "bfloat16",
        max_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__(cache=cache)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype}: no such type; choose float32, bfloat16 or float16")
        if max_tokens < 1 or temperature < 0:
            wrong = f"max_tokens={max_tokens}" if max_tokens < 1 else f"temperature={temperature}"
            raise ValueError(f"{wrong}: give max_tokens of 1 or more and a temperature of 0 or more")
        self._model, self.revision, self.dtype = model, revision, dtype
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self._network: Any = None
        self._processor: Any = None

    @property
    def model(self) -> str:
        """Name or folder of the model."""
        return self._model

    def settings(self) -> dict[str, Any]:
        """The model and how its answers are drawn."""
        drawn = {"temperature": self.temperature, "seed": self.seed} if self.temperature else {"temperature": 0.0}
        weights = {"model": self.model, "revision": self.revision, "dtype": self.dtype}
        return {"kind": "local", **weights, "max_tokens": self.max_tokens, **drawn}

    def to(self, device: Any) -> Self:
        """The same with its weights on a device, read where they were not yet.

        Args:
            device: Where it is to work.

        Returns:
            The part.

        Raises:
            PartMissing: The weights are not there, or are of another kind of model.
        """
        if self._network is None:
            from transformers import AutoModelForImageTextToText, AutoProcessor  # here: slow to import

            given = {"revision": self.revision} if self.revision else {}
            dtype = getattr(torch, self.dtype)
            try:
                with quiet_libraries():
                    self._processor = AutoProcessor.from_pretrained(self.model, **given)
                    network = AutoModelForImageTextToText.from_pretrained(self.model, dtype=dtype, **given)
            except (OSError, ValueError, ImportError) as error:
                told = " ".join(str(error).split())[:200]
                raise PartMissing(
                    f"model={self.model}: cannot be opened as image-text-to-text ({told}); give a folder that holds such a model "
                    "with its processor, or a name on the hub"
                ) from None
            if not getattr(self._processor, "chat_template", None):
                raise PartMissing(f"model={self.model}: has no chat template; give a model that was taught to answer")
            self._network = network.eval()
        self._network.to(device)
        return self

    @torch.inference_mode()
    def answer(self, question: Question, stop: threading.Event) -> Answer:
        """Generate the model's answer.

        Args:
            question: The question.
            stop: Not read: one answer at a time.

        Returns:
            The answer.

        Raises:
            NoAnswer: It is empty, or longer than max_tokens.
            PartMissing: As `to`.
        """
        if self._network is None:
            self.to("cpu")
        network: Any = self._network
        content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
        if question.picture is not None:
            content.insert(0, {"type": "image", "image": Image.fromarray(question.picture)})
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(network.device, dtype=network.dtype)
        length = inputs["input_ids"].shape[1]
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with _seeded(question, self.seed, network.device):
            tokens = network.generate(**inputs, max_new_tokens=self.max_tokens, **drawn)[0, length:]
        spent = {"tokens_in": length, "tokens_out": len(tokens)}
        ends = network.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        if len(tokens) >= self.max_tokens and int(tokens[-1]) not in ends:
            told = f"{self.model}: the answer is cut at max_tokens={self.max_tokens}; allow more"
            raise NoAnswer(told, reason="cut answer", is_fault=False, **spent)
        text = self._processor.decode(tokens, skip_special_tokens=True)
        if not text.strip():
            raise NoAnswer(f"{self.model}: the answer is empty", reason="empty answer", is_fault=False, **spent)
        return Answer(text=text, model=self.model, **spent)


class _seeded:
    """Random numbers of a question, on one device; those of the program go on as if nothing had been drawn."""

    def __init__(self, question: Question, seed: int, device: torch.device) -> None:
        self.state = int(text_hash(f"{seed} {picture_hash(question.picture)} {question.prompt}")[:15], 16)
        self.fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.state)

    def __exit__(self, *raised: Any) -> None:
        self.fork.__exit__(*raised)
