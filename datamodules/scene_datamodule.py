"""The data of a run for Lightning: shards, their order and the loaders, resumable at any optimizer step.

The order is a pure function of (seed, position) and the position is optimizer step x batch_size, so resuming
needs nothing but the step. Here it is tied to a Trainer; the arithmetic is in `order.py`, reading in
`shards.py`.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from datamodules.batch import Batch, collate
from datamodules.held_out import HeldOut, choose
from datamodules.loaders import PositionDataset, PositionLoader
from datamodules.mixture import HeldOutSet, MixedShards, folders_of
from datamodules.order import GlobalBatches, MixedOrder, SampleOrder, check_weights, held_out_batches
from datamodules.shard_index import read_index
from datamodules.shard_writer import describe
from datamodules.shards import ShardCache, ShardError, ShardSet, has_shards
from datamodules.storage import named
from datamodules.transforms import CUT_LATENT, FLIPPED_LATENT, SceneTransform

__all__ = ["Batch", "Part", "SceneDataModule"]

log = logging.getLogger(__name__)

Make = Callable[..., object]
PER_FOLDER = (
    "caption",
    "crop",
    "crop_ratio",
    "crop_scale",
    "equal_texts",
    "flip",
    "interpolation",
    "min_area",
    "min_visible",
    "resize",
)
"""Settings of training samples that a folder of several may have of its own."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a folder of shards gives to a run, or to its validation.

    Attributes:
        folder: The folder.
        samples: Samples in it; to a run those that are not held out.
        drawn: How often one of them comes.
    """

    folder: str | Path
    samples: int
    drawn: int


class SceneDataModule(pl.LightningDataModule):
    """Scenes with pictures, or with latents in their place, for training and validation.

    One Lightning epoch is the whole run: the train loader is `max_steps x accumulate` micro-batches long and
    passes over the data as often as that takes. It needs `Trainer(max_steps=...,
    use_distributed_sampler=False)`, `accumulate_grad_batches` equal to `accumulate`, and the callback
    `resume.ResumeWholeSteps` when a run may be stopped within an accumulated step or go on with another
    `accumulate`.

    Args:
        shards: Folder of the training shards, or several that are mixed by weight.
        resolution: Height and width of the pictures, px; latents must have been made of pictures of that size.
        batch_size: Samples of an optimizer step over all ranks and accumulation steps.
        seed: Seed of the order, the crops and the mirroring.
        accumulate: Micro-batches of an optimizer step.
        window: Shards that are shuffled together.
        workers: Processes that fetch, on each rank.
        flip: Whether half of the training samples are mirrored; latents can where those of the mirrored pictures are stored too.
        weights: Of a list of folders, how often each has its turn: whole numbers, one for each. A folder by itself has none.
        min_area: Objects whose box covers less than this share of the cropped picture go.
        min_visible: Objects go of whose box the crop leaves less than this share; held-out scenes too.
        caption: Where a picture has several captions: "first", or "any" to draw one in training.
        resize: How pictures become square, "crop" or "squash"; as in `SceneTransform`.
        crop: Which part of a training sample is cut out, "center", "random" or "random_resized"; held-out scenes have the centre.
        crop_scale: Of "random_resized", as in `SceneTransform`.
        crop_ratio: Likewise.
        interpolation: How pixels are scaled, as in `SceneTransform`; of held-out scenes too.
        equal_texts: What becomes of descriptions that objects of a training sample share, as in `SceneTransform`.
        transforms: Of a list of folders, for each the settings of training samples that are its own, out of `PER_FOLDER`; {} for
            none. A folder by itself has none.
        relations: Those that are "stored", or those of the "boxes"; as in `SceneTransform`, held-out scenes too.
        relations_per_object: Of the "boxes", for each object; None is all pairs.
        posterior: Of stored moments, "sample" draws a latent anew at each position of the training stream, "mode" takes the mean;
            held-out scenes have the mean.
        make: Called as `make(out=shards)` when there are no shards in the folder, once on each node. Where it is a partial
            with an `out` of its own, it makes that folder alone: shards in another one are taken as they are.
        validation_shards: Folder of the held-out shards; without it some of the training samples are held out.
        validation_samples: Where there is no such folder, how many: those whose scenes' ids have the lowest hashes, at most
            a tenth of all. 0 validates nothing.
        validation_batch_size: Most samples of a validation batch over all ranks; `batch_size / accumulate` if
            not given.
        make_validation: As `make`, for the held-out shards.
        cache: Where copies of shards behind an address (`s3://…`, `https://…`) are kept, on a local disk.
        cache_bytes: Most bytes of such copies on a machine.
        max_bad_fraction: Share of a rank's training samples that may be unreadable, of those it has had or of its share of
            one epoch, whichever is more; the next readable sample of the shard stands in for one that is not.

    Attributes:
        dropped_objects: Objects of the batches so far that the crop to the resolution left too little of.
        bad_samples: Samples of the rank's batches so far that could not be read.

    Raises:
        ValueError: `batch_size` is not a multiple of `accumulate`; weights or transforms do not fit the folders, or `make` is
            to make several of them; `validation_samples` is below 0.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        resolution: int,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        window: int = 8,
        workers: int = 0,
        flip: bool = False,
        weights: Sequence[int] | None = None,
        min_area: float = 0.01,
        min_visible: float = 0.0,
        caption: str = "first",
        resize: str = "crop",
        crop: str = "center",
        crop_scale: Sequence[float] = (0.8, 1.1),
        crop_ratio: Sequence[float] = (0.95, 1.05),
        interpolation: str = "bilinear",
        equal_texts: str = "kept",
        transforms: Sequence[Mapping[str, Any]] | None = None,
        relations: str = "stored",
        relations_per_object: int | None = None,
        posterior: str = "sample",
        make: Make | None = None,
        validation_shards: str | None = None,
        validation_samples: int = 0,
        validation_batch_size: int | None = None,
        make_validation: Make | None = None,
        cache: str | None = None,
        cache_bytes: float = 100e9,
        max_bad_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        # Refuses at start-up what no number of ranks would mend.
        GlobalBatches(batch_size, accumulate=accumulate)
        self.folders = folders_of(shards)
        self.weights = _weights(None if isinstance(shards, str | Path) else weights, self.folders, make)
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.window = window
        self.workers = workers
        self.validation_shards = None if validation_shards is None else named(validation_shards)
        if validation_samples < 0:
            raise ValueError(f"data.validation_samples={validation_samples}: give 0 or more")
        self.validation_samples = validation_samples if validation_shards is None else 0
        self._cache = None if cache is None else ShardCache(cache, limit=cache_bytes)
        self.max_bad_fraction = max_bad_fraction
        self.validation_batch_size = validation_batch_size or batch_size // accumulate
        self.dropped_objects = self.bad_samples = self._samples = 0
        self._validation_transform = SceneTransform(
            resolution=resolution,
            min_area=min_area,
            min_visible=min_visible,
            resize=resize,
            interpolation=interpolation,
            relations=relations,
            relations_per_object=relations_per_object,
        )
        self._transform = replace(
            self._validation_transform,
            flip=flip,
            seed=seed,
            caption=caption,
            posterior=posterior,
            equal_texts=equal_texts,
            crop=crop,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
        )
        of_folders = None if isinstance(shards, str | Path) else transforms
        self._transforms = _of_folders(self._transform, of_folders, len(self.folders))
        self._make = _own(self.folders[0], make)
        self._make_validation = _own(self.validation_shards, make_validation)

    def prepare_data(self) -> None:
        """Make the shards that are not there, if it was said how."""
        for path, make in ((self.folders[0], self._make), (self.validation_shards, self._make_validation)):
            if path is not None and make is not None and not has_shards(path):
                _make_once(path, make)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards, so that what is wrong with them is said before training starts."""
        if stage in (None, "fit"):
            _ = self.order
        if self.validates or stage == "validate":
            _ = self.validation_set
        elif self.trainer is not None:
            # Lightning's own way not to validate: a loader without batches, or none, makes it warn.
            self.trainer.limit_val_batches = 0

    def teardown(self, stage: str | None = None) -> None:
        """Say what was lost."""
        if self.dropped_objects:
            log.warning("%d objects went because the crop left too little of them", self.dropped_objects)
        if self.bad_samples:
            log.warning("rank %d: %d of %d samples could not be read", self._rank, self.bad_samples, self._samples)

    @functools.cached_property
    def training_set(self) -> ShardSet | MixedShards:
        """The training samples."""
        _refuse_other_source(self.folders[0], self._make, setting="make")
        opened = [
            _opened(folder, transform, self._cache)
            for folder, transform in zip(self.folders, self._transforms, strict=True)
        ]
        if self._cache is not None:
            _check_room(opened, self._cache, self.window)
        return opened[0] if len(opened) == 1 else MixedShards(opened)

    @functools.cached_property
    def order(self) -> SampleOrder | MixedOrder:
        """Which training sample is at a position."""
        parts = self._parts
        left_out = self._held_out.left_out if self._held_out is not None else [None] * len(parts)
        orders = [
            SampleOrder(part.sizes, seed=self.seed, window=self.window, left_out=rows)
            for part, rows in zip(parts, left_out, strict=True)
        ]
        return orders[0] if len(orders) == 1 else MixedOrder(orders, self.weights, seed=self.seed)

    def parts(self, positions: int) -> list[Part]:
        """What each folder gives to the first `positions` samples."""
        order = self.order
        if not isinstance(order, MixedOrder):
            return [Part(folder=self.folders[0], samples=order.samples, drawn=positions)]
        return [
            Part(folder=folder, samples=own.samples, drawn=drawn)
            for folder, own, drawn in zip(self.folders, order.orders, order.counts(positions), strict=True)
        ]

    @property
    def validates(self) -> bool:
        """Whether there are held-out samples."""
        return self.validation_shards is not None or self.validation_samples > 0

    def validation_parts(self) -> list[Part]:
        """What each folder gives to one validation; nothing where nothing is validated."""
        if not self.validates:
            return []
        stored = self.validation_set
        if not isinstance(stored, HeldOutSet):
            return [Part(folder=stored.path, samples=len(stored), drawn=len(stored))]
        return [
            Part(folder=folder, samples=len(part), drawn=count)
            for folder, part, count in zip(self.folders, stored.parts, stored.counts(), strict=True)
        ]

    @functools.cached_property
    def _held_out(self) -> HeldOut | None:
        """What training leaves out."""
        return choose(self._parts, self.validation_samples) if self.validation_samples else None

    @property
    def _parts(self) -> tuple[ShardSet, ...]:
        """The training folders, opened."""
        stored = self.training_set
        return stored.parts if isinstance(stored, MixedShards) else (stored,)

    @functools.cached_property
    def validation_set(self) -> ShardSet | HeldOutSet:
        """The held-out samples."""
        if self._held_out is not None:
            return HeldOutSet(self._parts, self._held_out)
        if self.validation_shards is None:
            raise ValueError(
                "data.validation_shards=null, data.validation_samples=0: nothing to validate on; give a folder of held-out "
                "shards, or a number of training samples to hold out"
            )
        _refuse_other_source(self.validation_shards, self._make_validation, setting="make_validation")
        return _opened(self.validation_shards, self._validation_transform, self._cache)

    def held_out(self, count: int, *, first: int = 0) -> Batch:
        """`count` held-out samples from number `first` on, or what there is, for pictures and scores during training."""
        dataset = PositionDataset(self.validation_set, self._validation_transform)
        return collate([dataset[place] for place in range(first, min(first + count, len(self.validation_set)))])

    @property
    def provides(self) -> frozenset[str]:
        """What every training scene carries, in the words of `sources.base.PROVIDABLE`."""
        of_boxes = {"relations"} if self._transform.relations == "boxes" else set()
        return self.training_set.provides | of_boxes

    def train_dataloader(self) -> PositionLoader:
        """The micro-batches of this rank from the one that follows the trainer's step on."""
        trainer = self._attached_trainer()
        self._check(trainer)
        batches = GlobalBatches(self.batch_size, ranks=trainer.world_size, accumulate=self.accumulate)
        length = trainer.max_steps * self.accumulate

        def plan() -> Iterator[range]:
            first = self._next_micro_batch(trainer)
            return (batches.positions(number, trainer.global_rank) for number in range(first, length))

        dataset = PositionDataset(self.training_set, self._transforms, order=self.order)
        return self._loader(dataset, plan, length)

    def val_dataloader(self) -> PositionLoader:
        """This rank's shares of one pass over the held-out samples."""
        trainer = self._attached_trainer()
        batches = held_out_batches(
            len(self.validation_set),
            self.validation_batch_size,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
        )
        dataset = PositionDataset(self.validation_set, self._validation_transform)
        return self._loader(dataset, lambda: batches, len(batches))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; every batch comes by here once."""
        self.dropped_objects += batch.dropped
        self._samples += len(batch)
        if batch.faults:
            self._count_bad(batch.faults)
        return batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The batch size, and the position that follows the last whole step."""
        return {
            "batch_size": self.batch_size,
            "position": self._attached_trainer().global_step * self.batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse what would change the order of samples.

        Args:
            state_dict: What `state_dict` gave when the checkpoint was made.

        Raises:
            ValueError: The checkpoint was made with another batch size.
        """
        if state_dict["batch_size"] != self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: the checkpoint at position {state_dict['position']} "
                f"was made with batch_size={state_dict['batch_size']}; set that to resume, or start a new run"
            )

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _count_bad(self, faults: Sequence[str]) -> None:
        """Count samples that could not be read, and say which.

        Args:
            faults: What was wrong with each.

        Raises:
            ShardError: There are more than `max_bad_fraction`.
        """
        self.bad_samples += len(faults)
        epoch = self.order.samples / self._attached_trainer().world_size
        told = f"rank {self._rank}: {self.bad_samples} of {self._samples} samples could not be read, the last: {faults[-1]}"
        if self.bad_samples > self.max_bad_fraction * max(self._samples, epoch):
            raise ShardError(f"data.max_bad_fraction={self.max_bad_fraction:g}: {told}")
        log.warning(told)

    def _loader(self, dataset: PositionDataset, plan: Callable[[], Any], length: int) -> PositionLoader:
        on_gpu = self._attached_trainer().strategy.root_device.type == "cuda"
        return PositionLoader(dataset, plan, length=length, workers=self.workers, pin_memory=on_gpu)

    def _attached_trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise ValueError(
                "SceneDataModule: rank and step come from a Trainer; use it through Trainer.fit or validate"
            )
        return self.trainer

    def _check(self, trainer: pl.Trainer) -> None:
        """Refuse settings of the trainer under which positions would not follow from the step."""
        if trainer.max_steps < 0:
            raise ValueError("trainer.max_steps=-1: a run is a number of optimizer steps; set trainer.max_steps")
        if trainer.overfit_batches:
            raise ValueError(
                f"trainer.overfit_batches={trainer.overfit_batches}: no batch of a stream comes again; "
                "make shards of a few samples to overfit on"
            )
        if trainer.accumulate_grad_batches != self.accumulate:
            raise ValueError(
                f"data.accumulate={self.accumulate} and trainer.accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches} differ; set both from one value"
            )

    def _next_micro_batch(self, trainer: pl.Trainer) -> int:
        counted = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if counted % self.accumulate:
            raise ValueError(
                f"the checkpoint was taken within step {trainer.global_step + 1}, after "
                f"{counted % self.accumulate} of accumulate={self.accumulate} micro-batches; "
                "add the callback datamodules.resume.ResumeWholeSteps"
            )
        return trainer.global_step * self.accumulate


def _opened(path: str | Path, transform: SceneTransform, cache: ShardCache | None) -> ShardSet:
    """The samples of a folder, if the transform fits them.

    Args:
        path: Folder of the shards.
        transform: What is to be made of each.
        cache: For copies of remote shards.

    Returns:
        The samples.

    Raises:
        ShardError: They are latents of another size, to be cut, or to be mirrored without mirrored ones; or relations are
            asked for of boxes that are not there.
    """
    stored = ShardSet(path, cache=cache)
    if transform.relations == "boxes" and "boxes" not in stored.provides:
        raise ShardError(f"data.relations=boxes: {path} has no boxes; set data.relations=stored or give other shards")
    if stored.latents is None:
        return stored
    if transform.crop != "center":
        raise ShardError(f"data.crop={transform.crop}: {path}: {CUT_LATENT}")
    if transform.flip and not stored.latents.flipped:
        raise ShardError(f"data.flip=true: {path}: {FLIPPED_LATENT}")
    if stored.latents.pixels != (transform.resolution, transform.resolution):
        raise ShardError(
            f"data.resolution={transform.resolution}: {path} holds latents of pictures of (height, width) "
            f"{stored.latents.pixels}; set data.resolution to that or give other shards"
        )
    return stored


def _of_folders(
    common: SceneTransform, own: Sequence[Mapping[str, Any]] | None, folders: int
) -> tuple[SceneTransform, ...]:
    """The transform of each folder.

    Args:
        common: What all have that have nothing of their own.
        own: Settings of each folder; None for none.
        folders: Their number.

    Returns:
        One for each folder.

    Raises:
        ValueError: They do not fit the folders, or name no setting that a folder may have.
    """
    given = [{}] * folders if own is None else list(own)
    if len(given) != folders:
        raise ValueError(
            f"data.transforms: {len(given)} for {folders} folders of shards; give one for each, {{}} for none"
        )
    if unknown := sorted(key for one in given for key in one if key not in PER_FOLDER):
        raise ValueError(f"data.transforms: {unknown[0]}: no such setting of a folder (have: {', '.join(PER_FOLDER)})")
    return tuple(replace(common, **one) for one in given)


def _check_room(parts: Sequence[ShardSet], cache: ShardCache, window: int) -> None:
    """Refuse a cache that would fetch the shards that are read at once over and over again; with room for twice as many, use it.

    Args:
        parts: The folders, opened.
        cache: Has a limit.
        window: Shards of each folder that are read at once.

    Raises:
        ShardError: They have more bytes than the limit.
    """
    remote = [part for part in parts if not isinstance(part.path, Path)]
    needed = sum(sum(sorted((entry.bytes for entry in part.entries), reverse=True)[:window]) for part in remote)
    if needed > cache.limit:
        raise ShardError(
            f"data.cache_bytes={cache.limit}: the data.window={window} shards that are read at once have up to {needed} bytes; "
            "raise data.cache_bytes, or lower data.window"
        )
    for part in remote:
        part.has_room_ahead = 2 * needed <= cache.limit


def _weights(weights: Sequence[int] | None, folders: tuple[str | Path, ...], make: Make | None) -> tuple[int, ...]:
    """The weight of each folder.

    Args:
        weights: As they were given; none are needed for one folder.
        folders: What they are of.
        make: Given where shards that are not there are to be made.

    Returns:
        One for each folder.

    Raises:
        ValueError: They do not fit the folders, or several folders would be made.
    """
    if len(folders) > 1 and make is not None:
        raise ValueError(
            f"data.make: makes one folder of shards, and data.shards names {len(folders)}; set data.make=null"
        )
    if weights is None and len(folders) > 1:
        raise ValueError(
            f"data.weights: {len(folders)} folders of shards and no weights; give one for each, such as [1,2]"
        )
    given = (1,) if weights is None else tuple(weights)
    check_weights(given, len(folders))
    return given


def _own(path: str | Path | None, make: Make | None) -> Make | None:
    """`make`, unless it says that it makes another folder than this, or this is remote."""
    out = getattr(make, "keywords", {}).get("out")
    if isinstance(path, str):
        return None
    is_named_by_the_caller = out is not None and path is not None and Path(out).resolve() != path.resolve()
    return None if is_named_by_the_caller else make


def _make_once(path: str | Path, make: Make) -> None:
    try:
        make(out=path)
    except ShardError:
        # Another process of the same start may have been quicker: its shards are as good.
        if not has_shards(path):
            raise


def _refuse_other_source(path: str | Path, make: Make | None, *, setting: str) -> None:
    """Refuse shards that `make` would make of another source, as far as it tells its source.

    Args:
        path: Folder of the shards.
        make: What made them, or would have.
        setting: Its key under `data`, for the message.

    Raises:
        ShardError: Name or arguments differ.
    """
    source = getattr(make, "keywords", {}).get("source")
    if source is None:
        return
    stored, wanted = read_index(path)["source"], describe(source)
    if stored == wanted or not stored["arguments"]:
        return
    old, new = ({"source": kind["name"], **kind["arguments"]} for kind in (stored, wanted))
    changed = [f"{name}={old.get(name)} (now {new[name]})" for name in new if old.get(name) != new[name]]
    raise ShardError(
        f"shards={path}: the source has changed since they were made, {', '.join(changed)}; "
        "remove the folder to make them again, make them elsewhere with paths.data=DIR, "
        f"or take them as they are with data.{setting}=null"
    )
