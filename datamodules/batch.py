"""The batch that training, validation and models share, and how it is put together and moved."""

from collections.abc import Sequence

import torch

from datamodules.transforms import Sample
from scenes.scene import SceneBatch


class Batch:
    """B samples with pictures, or with latents in their place.

    Not a dataclass on purpose: Lightning rewrites the tensors of dataclasses when a precision such as
    `bf16-true` is set, and boxes, size ids and pictures must stay float32. For the same reason
    `self.log(..., on_epoch=True)` needs `batch_size=len(batch)`.

    Args:
        images: (B, 3, H, W) float32 in [-1, 1]; None where there are latents.
        scenes: The B scenes, in the frames of the pictures.
        positions: (B,) int64, where the samples stand in the stream of samples (validation: in the held-out
            shards); random numbers of a step are drawn from (seed, position). They stay on the CPU, where they are read.
        latents: (B, C, h, w) float32 as the denoiser takes them, multiplied by the autoencoder's factor; None
            where there are pictures.
        dropped: Objects of these scenes that the crop to the resolution left too little of.
        faults: What was wrong with samples that could not be read, in whose places others stand.
    """

    def __init__(
        self,
        images: torch.Tensor | None,
        *,
        scenes: SceneBatch,
        positions: torch.Tensor,
        latents: torch.Tensor | None = None,
        dropped: int = 0,
        faults: Sequence[str] = (),
    ) -> None:
        self.images = images
        self.latents = latents
        self.scenes = scenes
        self.positions = positions
        self.dropped = dropped
        self.faults = tuple(faults)

    def __len__(self) -> int:
        return len(self.scenes)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(
            None if self.images is None else self.images.to(device, non_blocking=True),
            latents=None if self.latents is None else self.latents.to(device, non_blocking=True),
            scenes=self.scenes.to(device),
            positions=self.positions,
            dropped=self.dropped,
            faults=self.faults,
        )

    def pin_memory(self) -> "Batch":
        """The same batch with its large tensors in page-locked memory; the data loader calls it."""
        return Batch(
            None if self.images is None else self.images.pin_memory(),
            latents=None if self.latents is None else self.latents.pin_memory(),
            scenes=self.scenes,
            positions=self.positions,
            dropped=self.dropped,
            faults=self.faults,
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples together to a batch; all have pictures or all have latents."""
    images = [sample.image for sample in samples if sample.image is not None]
    latents = [sample.latent for sample in samples if sample.latent is not None]
    return Batch(
        torch.stack(images) if images else None,
        latents=torch.stack(latents) if latents else None,
        scenes=SceneBatch([sample.scene for sample in samples]),
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        dropped=sum(sample.dropped for sample in samples),
        faults=[sample.fault for sample in samples if sample.fault is not None],
    )
