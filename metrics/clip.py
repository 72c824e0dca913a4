"""CLIP as metrics take it: unit embeddings of pictures and of texts, with OpenAI's own resizing by PIL.

What is compared with what lives in `metrics.clip_score` (text with picture) and `metrics.clip_image` (picture with picture).
Torch and transformers are imported with the model, not before.

Legend: B pictures or texts; D width of the space that both share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from PIL import Image

from metrics.weights import model_identity, pretrained


class Clip:
    """A CLIP model.

    Args:
        model: A hub name or a local folder in transformers' layout.
        setting: What `model` is called in the configuration.
        revision: Of the hub's repository.
        batch_size: Pictures or texts that go through at once.
        processor: Hub name or local folder of tokenizer and preprocessing, where they do not lie with the model.

    Raises:
        ValueError: A batch size below 1.
    """

    def __init__(
        self,
        model: str,
        *,
        setting: str,
        revision: str | None = None,
        batch_size: int = 32,
        processor: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is too few; give 1 or more")
        self.name, self.setting, self.revision, self.batch_size = model, setting, revision, batch_size
        self.processor_name = processor
        self.model: Any = None
        self.device: Any = "cpu"

    def settings(self) -> dict[str, Any]:
        """The model by name and revision or hash, as JSON values."""
        return model_identity(self.name, self.revision)

    def to(self, device: Any) -> Self:
        """The model on a torch device, in float32, loaded where it was not yet.

        Args:
            device: Where it is to work.

        Returns:
            The same.

        Raises:
            NotAvailable: The model is not there.
        """
        if self.model is None:
            from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

            given = {"setting": self.setting, "revision": self.revision}
            beside = given
            if self.processor_name is not None:
                beside = {"setting": f"{self.setting.rpartition('.')[0]}.processor"}
            source = self.processor_name or self.name
            self.processor = pretrained(CLIPImageProcessorPil.from_pretrained, source, **beside)
            self.tokenizer = pretrained(CLIPTokenizer.from_pretrained, source, **beside)
            self.model = pretrained(CLIPModel.from_pretrained, self.name, **given).float().eval()
        self.model.to(device)
        self.device = device
        return self

    @property
    def longest(self) -> int:
        """The longest text, in tokens, start and end counted: 77 for OpenAI's models."""
        return self._loaded().config.text_config.max_position_embeddings

    def pictures(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings of pictures.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.

        Returns:
            (B, D) float32, of length 1.
        """
        import torch

        model, found = self._loaded(), []
        for batch in _batches(images, self.batch_size):
            pixels = self.processor(images=[Image.fromarray(image) for image in batch], return_tensors="pt")
            with torch.inference_mode():
                found.append(
                    model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device)).pooler_output
                )
        return _unit(found, model.config.projection_dim)

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, however many, without start and end."""
        self._loaded()
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def texts(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeddings of texts.

        Args:
            tokens: B lists of up to `longest` - 2 tokens, without start and end.

        Returns:
            (B, D) float32, of length 1.
        """
        import torch

        model, found = self._loaded(), []
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for batch in _batches(tokens, self.batch_size):
            # Padded to the full length, as published: texts of one length give one row whatever the batch.
            ids = torch.full((len(batch), self.longest), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for place, text in enumerate(batch):
                ids[place, : len(text) + 2] = torch.tensor([start, *text, end])
                mask[place, : len(text) + 2] = 1
            with torch.inference_mode():
                out = model.get_text_features(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            found.append(out.pooler_output)
        return _unit(found, model.config.projection_dim)

    def _loaded(self) -> Any:
        return self.to("cpu").model if self.model is None else self.model


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _unit(found: list[Any], width: int) -> np.ndarray:
    """Embeddings brought to length 1, (B, D) float32."""
    if not found:
        return np.empty((0, width), dtype=np.float32)
    rows = np.concatenate([part.float().cpu().numpy() for part in found])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
