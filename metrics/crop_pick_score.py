"""CropPickScore: CropCLIP with PickScore's model, which people's choices between pictures have tuned; nothing else."""

from collections.abc import Sequence

from metrics.crop_clip import CropClip
from metrics.object_values import SIDES


class CropPickScore(CropClip):
    """PickScore of each box's part of the picture with its object's text; see `CropClip` for what is averaged and the names.

    Args:
        model: PickScore by hub name or local folder.
        revision: Of the hub's repository.
        processor: Hub name or local folder of tokenizer and preprocessing; PickScore is published without them. Null where the
            model's folder has them.
        sides: Between small and medium, medium and large objects: px of a picture whose longer side is 512.
        batch_size: Parts of pictures that go through the model at once.
        resamples: Bootstrap resamples of an interval, over scenes.
        seed: Seed of the resampling.

    Source:
        Kirstain et al. 2023, Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation; Cheng et al. 2024,
        as in `CropClip`.
    """

    name = "crop_pick_score"

    def __init__(
        self,
        *,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        sides: Sequence[float] = SIDES,
        batch_size: int = 32,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model,
            revision=revision,
            processor=processor,
            sides=sides,
            batch_size=batch_size,
            resamples=resamples,
            seed=seed,
        )
