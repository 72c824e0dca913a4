"""Which conditions a training sample keeps: one draw per sample decides over scene and caption together.

The joint rates are a table, so that what a recipe says ("boxes off 10 %, captions off 50 %") is what happens. The random
number comes from outside; nothing here draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scenes import SceneBatch


@dataclass(frozen=True, kw_only=True)
class ConditionDrops:
    """Joint rates of keeping scene and caption, for classifier-free guidance.

    Attributes:
        keep: both are kept.
        scene_only: the caption is dropped.
        caption_only: the scene is dropped.
        none: both are dropped.
        dropped_caption: "empty" encodes "" in place of a dropped caption, "zeros" gives zero tokens and a zero pooled vector.
        methods: method -> rate at which it alone does not see a scene that is kept, drawn for each method by itself; for
            several methods together.

    Raises:
        ValueError: rates that are negative or do not sum to 1, or another word for a dropped caption.
    """

    keep: float
    scene_only: float = 0.0
    caption_only: float = 0.0
    none: float = 0.0
    dropped_caption: str = "empty"
    methods: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rates = self.rates
        if min(rates) < 0 or abs(sum(rates) - 1) > 1e-6:
            raise ValueError(f"drops: the rates {rates} sum to {sum(rates):g}; make them sum to 1, none negative")
        if self.dropped_caption not in ("empty", "zeros"):
            raise ValueError(f"drops.dropped_caption: {self.dropped_caption!r} is unknown; take empty or zeros")
        for name, rate in self.methods.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"drops.methods.{name}: {rate} is outside [0, 1]; give a rate")

    @property
    def rates(self) -> tuple[float, float, float, float]:
        """keep, scene_only, caption_only, none."""
        return self.keep, self.scene_only, self.caption_only, self.none

    def __call__(self, scenes: SceneBatch, draws: Tensor) -> tuple[SceneBatch, list[str], Tensor]:
        """Scenes and captions with what is dropped removed.

        Args:
            scenes: B scenes.
            draws: (B,) uniform numbers in [0, 1).

        Returns:
            The scenes, B captions, and (B,) bool, True where the caption is kept.
        """
        edges = torch.tensor(self.rates, dtype=torch.float64).cumsum(0)[:3]
        kind = torch.bucketize(draws.cpu(), edges, right=True)
        has_caption = (kind == 0) | (kind == 2)
        captions = [c if kept else "" for c, kept in zip(scenes.captions, has_caption.tolist(), strict=True)]
        return scenes.drop((kind == 0) | (kind == 1)), captions, has_caption

    def zeroed(self, has_caption: Tensor) -> Tensor | None:
        """Which captions are to stay as they are encoded, of has_caption (B,) bool; None where all do, the empty ones too."""
        return None if self.dropped_caption == "empty" else has_caption

    def seen(self, scenes: SceneBatch, draws: Tensor) -> dict[str, SceneBatch]:
        """What each method that has a rate of its own sees of scenes that are kept.

        Args:
            scenes: B scenes, as `__call__` gave them.
            draws: (B, methods) uniform numbers in [0, 1), a column for each name in `methods`, in order of the names.

        Returns:
            Method -> B scenes, those that it does not see replaced by null scenes.
        """
        names = sorted(self.methods)
        return {name: scenes.drop(draws[:, place].cpu() >= self.methods[name]) for place, name in enumerate(names)}
