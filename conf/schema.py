"""The typed roots of train, evaluate, prepare, sample, convert and app, and the nodes whose keys never vary.

Hydra merges every YAML file and every override into these records, so that an unknown key or a value of the
wrong type is refused at composition. Groups that stand for a class (backbone, conditioning, objective,
callback, …) are `Any` here: the YAML file that was chosen is their schema (`runtime.overrides` compares). What a
node can know about its own values is checked in its `__post_init__`; nothing here imports torch.

The records are not frozen, because OmegaConf would then refuse every override of theirs.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
TASKS = ("convert", "stats", "check", "export")  # of prepare.py, beside those that a file of conf/stage stands for


def _choose(setting: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices."""
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{setting}={value}: no such choice{guess} (have: {', '.join(choices)})")


def _at_least(node: str, record: Any, **least: float) -> None:
    """Refuses numbers below their least value; None passes."""
    for name, bound in least.items():
        value = getattr(record, name)
        if value is not None and value < bound:
            raise ValueError(f"{node}{name}={value}: must be at least {bound:g}")


def _fraction(node: str, record: Any, *names: str) -> None:
    """Refuses numbers outside [0, 1]."""
    for name in names:
        value = getattr(record, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{node}{name}={value}: must lie between 0 and 1")


def _are_numbers(value: Any, count: int) -> bool:
    """Whether a value is a list of so many numbers."""
    return isinstance(value, list) and len(value) == count and all(isinstance(number, int | float) for number in value)


@dataclass(kw_only=True)
class Trainer:
    """Where and for how long a run trains.

    `batch_size` at the root is the global one: a rank takes batch_size / (ranks * accumulate) at once. Of `accumulate` and
    `micro_batch` one is given; the other follows.
    """

    accelerator: str = "cpu"  # cpu, gpu, auto
    devices: Any = 1  # of each machine: a number, a list of indices, or "auto"; under a launcher as many as it started
    num_nodes: int = 1
    strategy: str = "auto"  # auto, ddp, fsdp, or a name of Lightning's
    launcher: str | None = None  # slurm: only where srun has started the process
    timeout_minutes: float = 30.0  # for which a process waits for the others
    precision: str = "32-true"
    max_steps: int = 200  # optimizer steps
    max_time: float | None = None  # hours of an attempt
    accumulate: int = 1  # micro-batches to an optimizer step
    micro_batch: int | None = None  # samples that a rank takes at once, whatever the ranks; null: as accumulate says
    gradient_clip: float | None = 1.0  # largest norm of the gradient; null: none
    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False  # compute a block's activations again in the backward pass, to save memory
    matmul: str = "high"  # float32 matrix products: highest, high (TF32 where there is one), medium
    deterministic: bool = False
    log_every: int = 10  # all of these in optimizer steps
    save_every: int = 100
    save_minutes: float | None = None
    validate_every: int = 100
    keep: int = 3  # checkpoints kept, the newest
    max_nonfinite: int = 0  # steps in a row with a non-finite loss or gradient that are left out before the run stops
    keep_best: str | None = None  # a logged figure; its best checkpoint is kept too
    requeue: bool = False  # ask SLURM to run a stopped job again

    def __post_init__(self) -> None:
        """Refuses values that no run can have."""
        _choose("trainer.accelerator", self.accelerator, ("cpu", "gpu", "auto"))
        _choose("trainer.precision", self.precision, PRECISIONS)
        _choose("trainer.matmul", self.matmul, ("highest", "high", "medium"))
        _at_least("trainer.", self, num_nodes=1, max_steps=1, accumulate=1, micro_batch=1, keep=1)
        self._check_devices()
        if self.launcher is not None:
            _choose("trainer.launcher", self.launcher, ("slurm",))
        for name in ("max_time", "save_minutes", "timeout_minutes"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"trainer.{name}={value}: must be more than 0")
        _at_least("trainer.", self, gradient_clip=0, log_every=1, save_every=1, validate_every=1, max_nonfinite=0)
        if self.micro_batch is not None and self.accumulate != 1:
            raise ValueError(
                f"trainer.accumulate={self.accumulate}: follows from trainer.micro_batch={self.micro_batch}; leave it out, or "
                "set trainer.micro_batch=null"
            )

    def _check_devices(self) -> None:
        """Refuses what names no device: Lightning would, after minutes and in a traceback."""
        given = self.devices
        if isinstance(given, list):
            names_some = bool(given) and all(isinstance(each, int) and each >= 0 for each in given)
        elif isinstance(given, int):
            names_some = given >= 1 and not isinstance(given, bool)
        else:
            names_some = given == "auto"
        if not names_some:
            raise ValueError(f"trainer.devices={given}: must be a number from 1 up, a list of indices, or auto")


@dataclass(kw_only=True)
class Optimizer:
    """The optimizer's class and the schedule of its learning rate."""

    _target_: str = "torch.optim.AdamW"
    learning_rate: float = 1e-4  # at the end of the warm-up
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0  # linear from 0
    fused: bool | None = None  # one kernel for all parameters; null: as the class decides
    schedule: str = "constant"  # constant, cosine, linear: from the warm-up's end to trainer.max_steps
    final_fraction: float = 0.0  # of learning_rate, reached at trainer.max_steps by cosine and linear
    decay_vectors: bool = True  # false: no weight decay on biases, norms and gates, whatever has fewer than two axes

    def __post_init__(self) -> None:
        """Refuses values that no optimizer can have."""
        _choose("optimizer.schedule", self.schedule, ("constant", "cosine", "linear"))
        _at_least("optimizer.", self, learning_rate=0, eps=0, weight_decay=0, warmup_steps=0)
        _fraction("optimizer.", self, "final_fraction")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)}: must be two numbers in [0, 1)")


@dataclass(kw_only=True)
class Drops:
    """Joint rates at which a sample keeps its conditions in training; they sum to 1.

    One draw per sample decides caption and scene together, so that each kind of guidance has a known rate.
    """

    keep: float = 0.8  # caption and scene
    scene_only: float = 0.1
    caption_only: float = 0.05
    none: float = 0.05
    dropped_caption: str = "empty"  # empty: the text ""; zeros: zero tokens; the pooled vector goes with it
    methods: Any = None  # method -> rate at which it alone does not see a scene that is kept: {boxes: 0.1}

    def __post_init__(self) -> None:
        """Refuses rates that are no distribution."""
        _choose("drops.dropped_caption", self.dropped_caption, ("empty", "zeros"))
        names = ("keep", "scene_only", "caption_only", "none")
        _fraction("drops.", self, *names)
        total = sum(getattr(self, name) for name in names)
        if abs(total - 1) > 1e-6:
            rates = " + ".join(f"{name} {getattr(self, name):g}" for name in names)
            raise ValueError(f"drops: the rates must sum to 1, got {rates} = {total:g}")


@dataclass(kw_only=True)
class Ema:
    """The moving average of the adapters' weights."""

    enabled: bool = True
    decay: float = 0.999
    warmup: bool = True  # decay min(decay, (1 + step) / (10 + step)) in the first steps

    def __post_init__(self) -> None:
        """Refuses values that average nothing."""
        _fraction("ema.", self, "decay")


@dataclass(kw_only=True)
class Sampler:
    """How pictures are drawn from a trained model."""

    _target_: str = MISSING
    scheduler: Any = MISSING  # builds a diffusers scheduler from the backbone's config
    steps: int = 50
    guidance: float = 5.0  # classifier-free guidance; 1: none
    grounding_fraction: float = 1.0  # share of the steps, from the noisy end, that see the scene (GLIGEN's beta)
    negative_prompt: str | None = None  # caption of the unguided half; null: as the published pipelines
    negative_prompt_file: str | None = None  # a file with it, read once at the start
    guidance_rescale: float = 0.0  # 0 to 1: brings a guided prediction's deviation back (Lin et al. 2023)
    eta: float = 0.0  # share of DDIM's noise that is drawn anew at each step
    size_ids: Any = "target"  # of the image that is drawn; scene: each scene's own; or six numbers

    def __post_init__(self) -> None:
        """Refuses values that no sampler can have."""
        _at_least("sampler.", self, steps=1, guidance=0)
        _fraction("sampler.", self, "grounding_fraction", "guidance_rescale", "eta")
        if isinstance(self.size_ids, str):
            _choose("sampler.size_ids", self.size_ids, ("target", "scene"))
        elif self.size_ids is not None and not _are_numbers(self.size_ids, 6):
            raise ValueError(f"sampler.size_ids={self.size_ids}: must be target, scene or six numbers of pixels")


@dataclass(kw_only=True)
class DataCommon:
    """What every `data/*.yaml` has; a file may add keys of its own beside these."""

    shards: Any = MISSING  # folder of Scene shards, or a list of them
    workers: int = 0  # loader processes on a rank
    window: int = 8  # shards within which samples are permuted
    flip: bool = False  # mirror half of the samples
    min_area: float = 0.01  # objects that cover less of the cropped picture go
    min_visible: float = 0.0  # objects go of whose box the crop leaves less than this share
    caption: str = "first"  # of several: the first, or any
    resize: str = "crop"  # how a picture becomes square: crop, squash, pad
    crop: str = "center"  # which part training cuts out: center, random, random_resized
    crop_scale: list[float] = field(default_factory=lambda: [0.8, 1.1])  # of random_resized: share of the area
    crop_ratio: list[float] = field(default_factory=lambda: [0.95, 1.05])  # of random_resized: width over height
    interpolation: str = "bilinear"  # how pixels are scaled: bilinear, bicubic, lanczos
    transforms: Any = None  # of a list of shards: what each folder has of its own, [{crop: random}, {}]
    relations: str = "stored"  # those of the shards, or of the boxes (left of, above, inside, …)
    relations_per_object: int | None = None  # of boxes: to the nearest so many others; null: all pairs
    posterior: str = "sample"  # of stored moments of latents: sample draws anew each time, mode takes the mean
    validation_samples: int = 512  # without validation_shards: scenes held out of the training shards, at most a tenth
    cache: str | None = None  # local folder for copies of shards behind an address
    cache_bytes: float = 100e9  # most bytes of them on a machine
    max_bad_fraction: float = 0.001  # share of a rank's samples that may be unreadable; others stand in for them

    def __post_init__(self) -> None:
        """Refuses values that no loader can have."""
        _at_least("data.", self, workers=0, window=1, relations_per_object=0, cache_bytes=1, validation_samples=0)
        _fraction("data.", self, "min_area", "min_visible", "max_bad_fraction")
        _choose("data.caption", self.caption, ("first", "any"))
        listed = self.shards if isinstance(self.shards, list) else [self.shards]
        if not all(isinstance(folder, str) for folder in listed):
            raise ValueError(f"data.shards={self.shards}: must be a folder, or a list of folders such as [DIR1,DIR2]")
        _choose("data.resize", self.resize, ("crop", "squash", "pad"))
        _choose("data.crop", self.crop, ("center", "random", "random_resized"))
        _choose("data.interpolation", self.interpolation, ("bilinear", "bicubic", "lanczos"))
        self._check_transforms()
        _choose("data.relations", self.relations, ("stored", "boxes"))
        _choose("data.posterior", self.posterior, ("sample", "mode"))

    def _check_transforms(self) -> None:
        """Refuses what is no list of nodes."""
        given = self.transforms
        if given is not None and not (isinstance(given, list) and all(isinstance(one, dict) for one in given)):
            raise ValueError(
                f"data.transforms={given}: must be a list of nodes, one for each folder, such as [{{flip: true}},{{}}]"
            )


@dataclass(kw_only=True)
class Paths:
    """Where files go; every other path is made from these."""

    data: str = "data"
    runs: str = "runs"


PLANNED = ("v100_32gb", "rtx4090", "a6000", "l40s", "a100_40gb", "a100_80gb", "h100", "h200")


@dataclass(kw_only=True)
class Planning:
    """What `plan=true` reckons with; it changes nothing in a run."""

    device: str = "a100_80gb"  # one of runtime.planning.DEVICES
    devices: int = 8  # of each machine, where trainer.devices is auto
    mfu: float = 0.4  # share of the device's peak that is reached
    reserve: float = 2e9  # bytes of each device that are left free
    objects: int = 8  # of a scene

    def __post_init__(self) -> None:
        """Refuses values that plan nothing."""
        _choose("planning.device", self.device, PLANNED)
        _at_least("planning.", self, devices=1, objects=1)
        _fraction("planning.", self, "mfu")


@dataclass(kw_only=True)
class Train:
    """Root of `train.py`."""

    name: str = MISSING
    run: str = "${paths.runs}/${name}"
    seed: int = 0
    batch_size: int = 64  # global: over all ranks and accumulated micro-batches
    plan: bool = False  # true: say what would be trained, and stop
    start_from: str | None = None  # another run's folder or checkpoint: its weights and their average; null: none
    module: str | None = None  # class of the LightningModule; null: that of the method
    start_optimizer: bool = False  # take that run's optimizer state too
    backbone: Any = MISSING
    conditioning: dict[str, Any] = field(default_factory=dict)
    data: Any = MISSING
    objective: Any = MISSING
    optimizer: Optimizer = field(default_factory=Optimizer)
    sampler: Sampler = field(default_factory=Sampler)
    trainer: Trainer = field(default_factory=Trainer)
    planning: Planning = field(default_factory=Planning)
    drops: Drops = field(default_factory=Drops)
    ema: Ema = field(default_factory=Ema)
    logger: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    paths: Paths = field(default_factory=Paths)

    def __post_init__(self) -> None:
        """Refuses values that no run can have."""
        _at_least("", self, batch_size=1, seed=0)
        if self.start_optimizer and self.start_from is None:
            raise ValueError("start_optimizer=true: there is no run to take it from; give start_from=RUN")


def _as_run() -> Any:
    """A key that a run owns: null means "as the run"; an override may name any key that the run has below."""
    return field(default=None, metadata={"as_run": True})


@dataclass(kw_only=True)
class Report:
    """What the page of an evaluation shows."""

    pictures: int = 200  # scenes; of more than that: by lot, the best and the worst

    def __post_init__(self) -> None:
        """Refuses values that no page can have."""
        _at_least("report.", self, pictures=0)


@dataclass(kw_only=True)
class Evaluate:
    """Root of `evaluate.py`."""

    run: str | None = None
    weights: str | None = None  # in place of a run: an adapter file; backbone=NAME says what it belongs to
    protocol: Any = MISSING
    metric: dict[str, Any] = field(default_factory=dict)
    scenes: str | None = None  # a file of scenes, or a folder of them, in place of the protocol's split
    images: str | None = None  # folder of pictures to score, or "real"; null: generate
    images_are: str = (
        "auto"  # of such a folder: square as the protocol draws, whole as the real ones; auto: by their size
    )
    out: str | None = None  # folder of the report; null: inside the run
    true_rows: str | None = (
        None  # where what metrics keep of true pictures lies, for other evaluations; null: inside out
    )
    checkpoint: str | None = None  # null: the newest of the run
    references: str | None = None  # a folder for statistics of the true pictures, which metric.fid.reference=FILE reads
    logger: dict[str, Any] = field(default_factory=dict)  # wandb: the tables and pictures go there too
    refiner: Any = None  # refines what was generated; null: nothing does
    report: Report = field(default_factory=Report)
    paths: Paths = field(default_factory=Paths)
    backbone: Any = _as_run()
    conditioning: Any = _as_run()
    sampler: Any = _as_run()
    trainer: Any = _as_run()

    def __post_init__(self) -> None:
        """Refuses settings that name nothing to evaluate, or two things."""
        if self.run is not None and self.weights is not None:
            raise ValueError("run, weights: both given; name what to evaluate with run=DIR or weights=FILE")
        if self.run is None and self.weights is None and self.images is None:
            raise ValueError(
                "run, weights, images: none given; name what to evaluate with run=DIR, weights=FILE backbone=NAME, or images=DIR"
            )
        if self.weights is not None and self.checkpoint is not None:
            raise ValueError(f"checkpoint={self.checkpoint}: only a run has one; leave it out, or give run=DIR")
        if unfit := [name for name in self.logger if name != "wandb"]:
            raise ValueError(
                f"logger={unfit[0]}: an evaluation writes metrics.json and report.html; leave it out, or logger=wandb"
            )
        _choose("images_are", self.images_are, ("auto", "square", "whole"))
        if self.images_are != "auto" and self.images in (None, "real"):
            raise ValueError(f"images_are={self.images_are}: only a folder of pictures is told so; give images=DIR")
        if self.scenes is not None and self.images == "real":
            raise ValueError(f"images=real: scenes={self.scenes} has no pictures; give shards with protocol.shards=DIR")


@dataclass(kw_only=True)
class Sample:
    """Root of `sample.py`. With `again` every null is "as the picture"."""

    run: str | None = None  # a run, or
    weights: str | None = None  # an adapter file, with backbone=NAME
    checkpoint: str | None = None  # of a run; null: the newest
    scene: str | None = None  # a scene file, or
    phrases: list[str] | None = None  # a scene on the command line: what is in the picture,
    boxes: list[Any] | None = None  # and where: for each phrase left, top, right, bottom in [0, 1]; or
    split: str | None = None  # a folder of shards, or a file of many scenes: a picture of each; or
    again: str | None = None  # a picture that sample.py or app.py made
    caption: str | None = None  # in place of the scene's own
    out: str | None = None  # null: sample.png, with again beside the picture; the folder of a split has to be named
    form: str | None = None  # sheet, grid (over seeds and guidances) or picture; null: as is asked for
    seeds: list[int] | None = None  # a row of the sheet each; of a split one; null: [0]
    guidances: list[float] | None = None  # of a grid: a column each; null: sampler.guidance alone
    inpaint: str | None = None  # a picture that is kept outside the scene's boxes
    paste_back: bool | None = None  # true: give its pixels back as they were, where decoding would alter them
    limit: int | None = None  # of a split: its first so many scenes; null: all
    batch_size: int = 8  # of a split: pictures at a time; it changes no number
    picture_format: str = "jpg"  # of a split: jpg, png
    npz: bool = False  # of a split: real and generated pictures as LAION-SG's scripts score them
    refiner: Any = None  # refines the pictures; null: nothing does
    paths: Paths = field(default_factory=Paths)
    backbone: Any = _as_run()
    conditioning: Any = _as_run()
    sampler: Any = _as_run()
    trainer: Any = _as_run()

    def __post_init__(self) -> None:
        """Refuses values that no picture can have."""
        if self.seeds is not None and (not self.seeds or min(self.seeds) < 0):
            raise ValueError(f"seeds={list(self.seeds)}: must be one or more numbers from 0 up, such as seeds=[0,1]")
        if self.guidances is not None and (not self.guidances or min(self.guidances) < 0):
            raise ValueError(
                f"guidances={list(self.guidances)}: must be one or more numbers from 0 up, such as guidances=[1,3]"
            )
        _choose("picture_format", self.picture_format, ("jpg", "png"))
        _at_least("", self, batch_size=1, limit=1)
        self._check_what_is_drawn()
        if self.run is not None and self.weights is not None:
            raise ValueError("run, weights: both given; name what draws with run=DIR or weights=FILE backbone=NAME")
        if self.run is None and self.weights is None and self.again is None:
            raise ValueError("run, weights: neither given; name what draws with run=DIR or weights=FILE backbone=NAME")
        if self.weights is not None and self.checkpoint is not None:
            raise ValueError(f"checkpoint={self.checkpoint}: only a run has one; leave it out, or give run=DIR")
        if self.split is None:
            self._refuse("scene", limit=None, npz=False, picture_format="jpg")
            self._check_form()
        else:
            self._refuse("split", inpaint=None, paste_back=None, form=None, guidances=None, caption=None)
            if self.out is None or len(self.seeds or [0]) > 1:
                wrong = "out" if self.out is None else f"seeds={list(self.seeds or [])}"
                raise ValueError(f"{wrong}: split={self.split} needs a folder and one seed; give out=DIR seeds=[0]")

    def _check_what_is_drawn(self) -> None:
        """Refuses no scene and several."""
        named = ("scene", "phrases", "split", "again")
        given = [name for name in named if getattr(self, name) is not None]
        way = "scene=FILE, phrases=[...] boxes=[...], split=DIR or again=PICTURE"
        if not given:
            raise ValueError(f"{', '.join(named)}: none given; name what to draw with {way}")
        if len(given) > 1 and given not in (["scene", "again"], ["phrases", "again"]):  # another scene, else the same
            raise ValueError(f"{', '.join(given)}: only one can be drawn; name it with {way}")
        if (self.phrases is None) != (self.boxes is None) or len(self.phrases or []) != len(self.boxes or []):
            counts = f"{len(self.phrases or [])} phrases for {len(self.boxes or [])} boxes"
            raise ValueError(
                f"phrases, boxes: {counts}; give one box for each, such as phrases=[a,b] boxes=[[0,0,.5,.5],[.5,.5,1,1]]"
            )

    def _check_form(self) -> None:
        """Refuses what a form has no place for."""
        if self.form is not None:
            _choose("form", self.form, ("sheet", "grid", "picture"))
        if self.guidances is not None and self.form not in (None, "grid"):
            raise ValueError(
                f"guidances={list(self.guidances)}: form={self.form} has one, sampler.guidance=N; or take form=grid"
            )
        if self.form == "picture" and len(self.seeds or [0]) > 1:
            raise ValueError(f"seeds={list(self.seeds or [])}: form=picture is of one; give one, or take form=grid")
        if self.inpaint is not None and (self.form == "grid" or self.guidances is not None):
            raise ValueError(f"inpaint={self.inpaint}: a grid paints whole pictures; leave it out, or take form=sheet")
        if self.out is not None and Path(self.out).suffix.lower() != ".png":
            raise ValueError(
                f"out={self.out}: a picture keeps its scene and settings in it, as a PNG; name it FILE.png"
            )

    def _refuse(self, what: str, **usual: Any) -> None:
        """Refuses settings that mean nothing to what is drawn."""
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)}: means nothing with {what}=; leave it out")


@dataclass(kw_only=True)
class Export:
    """What `task=export` of prepare.py writes."""

    # rich_context: label_ID.json; gligen_coco: a pickled list; igligen: boxes/ and latents/ of .npy; laion_sg: train.json
    form: str = "rich_context"
    pictures: bool = True  # beside the labels, except igligen's; false: labels alone
    whole_pixels: bool = True  # of rich_context: boxes in whole pixels, as published
    text_encoder: str | None = (
        None  # of gligen_coco: CLIP whose features of the phrases its own loader needs; null: none
    )
    latents: str | None = (
        "sample"  # of igligen, of stored moments: one draw, as published; mode: the mean; null: boxes alone
    )
    seed: int = 0  # of latents=sample: the draws are those of task=latents stage.output.store=sample
    sizes: bool = (
        True  # of igligen: a sixth column of (height, width), as IGLIGEN-XL reads; false: five, as IGLIGEN does
    )

    def __post_init__(self) -> None:
        """Refuses a form that there is not, and settings that it has no use for."""
        _choose("export.form", self.form, ("rich_context", "gligen_coco", "igligen", "laion_sg"))
        if self.latents is not None:
            _choose("export.latents", self.latents, ("sample", "mode"))
        if self.seed < 0:
            raise ValueError(f"export.seed={self.seed}: must be at least 0")
        if self.text_encoder is not None and self.form != "gligen_coco":
            raise ValueError(
                f"export.text_encoder={self.text_encoder}: only form=gligen_coco holds features; leave it out"
            )


@dataclass(kw_only=True)
class App:
    """Root of `app.py`."""

    run: str | None = None  # a run that is chosen when the page opens; or
    weights: str | None = None  # an adapter file without a run, with backbone=NAME
    scene: str | None = None  # a scene file that the page opens with
    host: str = "127.0.0.1"  # the address that the page listens at
    port: int = 7860
    objects: int = 60  # of a scene, at most
    upload_bytes: int = 10_000_000  # of a scene file, or a picture with a scene in it, at most
    kept: int = 2  # runs that stay in memory
    paths: Paths = field(default_factory=Paths)
    backbone: Any = _as_run()
    conditioning: Any = _as_run()
    sampler: Any = _as_run()
    trainer: Any = _as_run()

    def __post_init__(self) -> None:
        """Refuses values that no page can have."""
        if self.run is not None and self.weights is not None:
            raise ValueError("run, weights: both given; name what draws with run=DIR or weights=FILE backbone=NAME")
        for name in ("backbone", "conditioning"):
            if getattr(self, name) is not None and self.weights is None:
                raise ValueError(f"{name}: a run has its own; leave it out, or name a file with weights=FILE")
        _at_least("", self, port=1, objects=1, upload_bytes=1, kept=1)
        if self.port > 65535:
            raise ValueError(f"port={self.port}: must be at most 65535")


@dataclass(kw_only=True)
class Prepare:
    """Root of `prepare.py`."""

    task: str = "convert"
    source: Any = None
    backbone: Any = None  # whose autoencoder or text encoders a stage runs
    stage: Any = None  # what a task does that makes shards of shards; task=NAME chooses stage=NAME
    tagger: Any = None  # of task=label: what names things in pictures,
    detector: Any = None  # finds them,
    segmenter: Any = None  # outlines them,
    describer: Any = None  # and describes them
    shards: str | None = None  # folder of shards that a task other than convert reads, or its address
    out: str | None = None  # folder that a task makes, or its address
    shard_size: int = 1000  # of task=convert: samples to a shard
    shard_bytes: int | None = None  # of task=convert: most bytes of a shard; null: whatever its samples have
    max_bad_fraction: float = 0.01  # share of samples that may be unreadable
    accelerator: str = "auto"  # where a task's models work: cpu, gpu, auto
    export: Export = field(default_factory=Export)
    paths: Paths = field(default_factory=Paths)

    def __post_init__(self) -> None:
        """Refuses values that no task can have."""
        if self.stage is None:
            _choose("task", self.task, (*TASKS, *stages()))
        _choose("accelerator", self.accelerator, ("cpu", "gpu", "auto"))
        _at_least("", self, shard_size=1, shard_bytes=1)
        _fraction("", self, "max_bad_fraction")
        if self.task == "convert" and self.source is None:
            raise ValueError("source: task=convert reads a source; name one with source=NAME, such as source=shapes")
        if self.task == "convert" and self.out is None:
            raise ValueError("out: task=convert makes a folder of shards; name it with out=DIR")
        if self.task != "convert" and self.shards is None:
            raise ValueError(f"shards: task={self.task} reads shards; name their folder with shards=DIR")
        if self.task != "check" and self.out is None:
            raise ValueError(f"out: task={self.task} makes a folder; name it with out=DIR")
        if self.task not in TASKS and self.stage is None:
            raise ValueError(f"stage: task={self.task} was chosen without it; add stage={self.task}")


def stages() -> tuple[str, ...]:
    """The tasks of prepare.py that make shards of shards: the files of conf/stage."""
    return tuple(sorted(path.stem for path in (Path(__file__).parent / "stage").glob("*.yaml")))


@dataclass(kw_only=True)
class Convert:
    """Root of `convert.py`."""

    run: str | None = None  # a run, or
    weights: str | None = (
        None  # weights of the method that conditioning=NAME names: a file, a folder, a name on the hub
    )
    out: str = MISSING
    form: str = "adapter"  # adapter: a file of the adapter alone; the others are the method's
    average: bool = True  # of a run: the averaged weights; false: those of its last step
    adapter: str | None = None  # of several methods: which one
    checkpoint: str | None = None  # of a run; null: the newest
    paths: Paths = field(default_factory=Paths)
    backbone: Any = _as_run()
    conditioning: Any = _as_run()

    def __post_init__(self) -> None:
        """Refuses settings that name no weights, or two, and those that have no use."""
        if (self.run is None) == (self.weights is None):
            given = "neither" if self.run is None else "both"
            raise ValueError(f"run, weights: {given} given; name what to convert with run=DIR or weights=FILE")
        if self.weights is not None:
            self._check_weights()
        if self.form == "adapter" and not self.out.endswith(".safetensors"):
            raise ValueError(
                f"out={self.out}: form=adapter makes a safetensors file; name it with out=FILE.safetensors"
            )

    def _check_weights(self) -> None:
        """What weights without a run need, and what only a run has."""
        for group, example in (("conditioning", "boxes"), ("backbone", "sd14")):
            if getattr(self, group) is None:
                raise ValueError(
                    f"{group}: weights={self.weights} of which {group}? Name it, such as {group}={example}"
                )
        for setting, value, usual in (
            ("average", self.average, True),
            ("checkpoint", self.checkpoint, None),
        ):
            if value != usual:
                raise ValueError(f"{setting}={value}: only a run has that; leave it out, or name a run with run=DIR")


# Keys of a run that only its training reads, so that an evaluation could not act on them, and what it has instead.
TRAINING_ALONE = {
    "batch_size": "set the pictures at a time with protocol.batch_size=N",
    "data": "name the held-out shards with protocol.shards=DIR",
    "drops": "leave it out",
    "ema": "leave it out: pictures are drawn from the averaged weights where the run has them",
    "objective": "leave it out: the backbone says what is predicted, sampler.KEY=VALUE how pictures are drawn",
    "optimizer": "leave it out",
    "seed": "set those of the pictures with protocol.seeds=[N]",
}

ROOTS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "prepare": Prepare,
    "sample": Sample,
    "convert": Convert,
    "app": App,
}


def as_run_keys(root: type | None) -> tuple[str, ...]:
    """Keys of a root that are null for "as the run"; none for anything else."""
    if root is None or root not in ROOTS.values():
        return ()
    return tuple(entry.name for entry in fields(root) if entry.metadata.get("as_run"))


def takes_anything(path: str) -> bool:
    """Whether a dotted key of a run, such as `sampler.size_ids`, takes values of several types."""
    node: Any = Train
    *groups, name = path.split(".")
    for group in groups:
        node = {entry.name: entry.type for entry in fields(node)}.get(group)
        if not is_dataclass(node):
            return False
    return bool(groups) and {entry.name: entry.type for entry in fields(node)}.get(name) is Any


def register() -> None:
    """Stores each root as `<config>_schema`, the first entry of that config's defaults list."""
    for name, root in ROOTS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=root)
