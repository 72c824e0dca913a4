"""RAM as a tagger: images as it was trained on them, the tags of its list that pass their thresholds.

The network is in ``ram_network.py``, reading its weights in ``ram_weights.py``; other taggers are in ``taggers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labelling.opening import Pretrained, as_pillow, batches
from labelling.parts import PartMissing, Tagger

TAG_LIST, THRESHOLDS = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
REPOSITORY = "github.com/xinyu1205/recognize-anything"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class RamTagger(Pretrained, Tagger):
    """Recognize Anything: the tags of its list whose probability is above their own threshold, in the list's order.

    Args:
        model: File of the published weights.
        tags: File with a tag on each line, in the weights' order; null for `ram_tag_list.txt` beside the weights.
        thresholds: File with each tag's threshold in the same order; null for `ram_tag_list_threshold.txt` beside the weights.
        interpolation: How images are brought to the model's square, "bilinear" or "bicubic"; their aspect is not kept.
        dtype: As in `Pretrained`.
        batch_size: Images at once.

    Raises:
        PartMissing: A file is not there.
        ValueError: A setting is out of its range, or the lists do not fit each other.

    Source:
        Zhang et al. 2023, Recognize Anything: A Strong Image Tagging Model.
    """

    kind = "tagger"
    way_out = f"give ram_swin_large_14m.pth, to which {REPOSITORY} has the link"

    def __init__(
        self,
        *,
        model: str,
        tags: str | None = None,
        thresholds: str | None = None,
        interpolation: str = "bilinear",
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> None:
        super().__init__(model=model, revision=None, dtype=dtype, batch_size=batch_size)
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"tagger.interpolation={interpolation}: must be one of {', '.join(INTERPOLATIONS)}")
        if not Path(model).is_file():
            raise PartMissing(f"tagger.model={model}: no such file; {self.way_out}")
        self.interpolation, self.tags_file, self.thresholds_file = interpolation, tags, thresholds
        self.tags = _lines("tags", tags, beside=Path(model).with_name(TAG_LIST))
        self.thresholds = _numbers(
            "thresholds", _lines("thresholds", thresholds, beside=Path(model).with_name(THRESHOLDS))
        )
        if len(self.tags) != len(self.thresholds):
            raise ValueError(
                f"tagger.thresholds: {len(self.thresholds)} thresholds for {len(self.tags)} tags; "
                "give two files of one list, with a line for each tag"
            )

    def settings(self) -> dict[str, Any]:
        """Weights, files of tags and thresholds with a hash of what is in them, and interpolation."""
        lists = "\n".join(f"{tag} {threshold}" for tag, threshold in zip(self.tags, self.thresholds, strict=True))
        return {
            **super().settings(),
            "tags": self.tags_file,
            "thresholds": self.thresholds_file,
            "lists_sha256": sha256(lists.encode()).hexdigest(),
            "interpolation": self.interpolation,
        }

    def _open(self) -> torch.nn.Module:
        from labelling.ram_weights import read_ram

        network = read_ram(self.name)
        if network.sizes.tags != len(self.tags):
            raise ValueError(f"{network.sizes.tags} tags in the weights, {len(self.tags)} in tagger.tags")
        return network.to(getattr(torch, self.dtype))

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[str]]:
        """RAM's tags."""
        thresholds = torch.tensor(self.thresholds)
        tags = []
        for batch in batches(pictures, self.batch_size):
            for row in self.logits(batch).sigmoid() > thresholds:
                tags.append([self.tags[place] for place in row.nonzero()[:, 0].tolist()])
        return tags

    @torch.inference_mode()
    def logits(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """Logits (B, K) float32 on the CPU of the tags of B pictures (H, W, 3) uint8 RGB, all at once."""
        model: Any = self.model
        images = torch.stack([self._image(picture, model.sizes.image_size) for picture in pictures])
        return model(**self.inputs({"images": images})).float().cpu()

    def _image(self, picture: np.ndarray, side: int) -> torch.Tensor:
        """A picture as the network takes it, (3, S, S)."""
        square = as_pillow(picture).resize((side, side), INTERPOLATIONS[self.interpolation])
        values = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
        return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _lines(setting: str, file: str | None, *, beside: Path) -> list[str]:
    """The lines of a file, of which none is empty or there twice as a tag."""
    path = beside if file is None else Path(file)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise PartMissing(
            f"tagger.{setting}={file or 'null'}: {path}: {error.strerror}; put {beside.name} there, "
            f"from ram/data of {REPOSITORY}, or give tagger.{setting}=FILE"
        ) from error
    if not all(lines):
        raise ValueError(
            f"tagger.{setting}={path}: line {lines.index('') + 1} is empty; give a file with a line for each tag"
        )
    return lines


def _numbers(setting: str, lines: Sequence[str]) -> list[float]:
    """Probabilities, one a line."""
    numbers = []
    for number, line in enumerate(lines, 1):
        try:
            numbers.append(float(line))
        except ValueError:
            numbers.append(-1.0)
        if not 0 <= numbers[-1] <= 1:
            raise ValueError(
                f"tagger.{setting}: line {number}: {line}: no probability; give a number from 0 to 1 on each line"
            )
    return numbers
