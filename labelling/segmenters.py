"""Segmenters: SAM, SAM-HQ and SAM 2 through transformers, which outline what lies in boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from labelling.opening import Pretrained, as_pillow
from labelling.parts import Segmenter


class Sam(Pretrained, Segmenter):
    """A model of transformers' mask generation, prompted with boxes: one mask for each.

    A picture is looked at once, whatever the number of its boxes.

    Args:
        model: As in `Pretrained`: SAM, SAM-HQ or SAM 2.
        revision: As in `Pretrained`.
        mask_threshold: Logit above which a pixel belongs to the mask.
        dtype: As in `Pretrained`.
        batch_size: Boxes whose masks are brought to the picture's size at once.

    Raises:
        ValueError: A setting is out of its range.
    """

    kind = "segmenter"

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        mask_threshold: float = 0.0,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(model=model, revision=revision, dtype=dtype, batch_size=batch_size)
        self.mask_threshold = mask_threshold
        self._processor: Any = None

    def settings(self) -> dict[str, Any]:
        """Model and threshold."""
        return {**super().settings(), "mask_threshold": self.mask_threshold}

    def _open(self) -> torch.nn.Module:
        from transformers import AutoModelForMaskGeneration, AutoProcessor

        self._processor = self.opened(AutoProcessor)
        return self.opened_model(AutoModelForMaskGeneration)

    def __call__(self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As in `Segmenter`."""
        return [masks for masks, _ in self.with_scores(pictures, boxes)]

    @torch.inference_mode()
    def with_scores(
        self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As in `Segmenter`; the scores are the IoU that the model expects of its masks, cut to [0, 1]."""
        return [self._masks(picture, each) for picture, each in zip(pictures, boxes, strict=True)]

    def _masks(self, picture: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks (N, H, W) of a picture and their scores (N,)."""
        height, width = picture.shape[:2]
        if not len(boxes):
            return np.zeros((0, height, width), bool), np.zeros(0, np.float32)
        model: Any = self.model
        corners = np.asarray(boxes, np.float64) * [width, height, width, height]
        seen = self._processor(images=as_pillow(picture), input_boxes=[corners.tolist()], return_tensors="pt")
        sizes = [seen.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in seen]
        found = model(**self.inputs(seen), multimask_output=False)
        logits, scores = found.pred_masks[0].float(), found.iou_scores[0, :, 0].float()  # (N, 1, h, w), (N,)
        parts = [
            self._processor.post_process_masks([few], *sizes, mask_threshold=self.mask_threshold)[0]
            for few in logits.split(self.batch_size)
        ]
        return torch.cat([part.cpu() for part in parts])[:, 0].bool().numpy(), scores.clip(0, 1).cpu().numpy()
