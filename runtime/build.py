"""From a checked configuration to objects: backbone, adapters, module, data, callbacks, loggers, trainer.

Each function builds one thing from its node. What fits together is checked here, before the first batch; values are
checked by the classes themselves. torch is imported inside, so that a misspelt key is refused before it is loaded.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from runtime.launch.ranks import ranks_of

if TYPE_CHECKING:
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.strategies import Strategy

    from callbacks.observer import PassedOver
    from datamodules.scene_datamodule import SceneDataModule
    from lightning_modules.scene_diffusion import SceneDiffusion
    from models.backbones.base import Backbone
    from models.conditioning.base import Conditioning
    from models.refining import Refiner

MODULES = "lightning_modules"
START = ("weights", "init")  # settings of a method that only say where it starts


def build_backbone(cfg: DictConfig) -> Backbone:
    """The diffusion model."""
    return instantiate(cfg.backbone, _convert_="all")


def build_conditioning(cfg: DictConfig, backbone: Backbone, *, restored: bool = False) -> Conditioning:
    """The adapters by name, fitted to the backbone; random weights follow from the seed.

    Args:
        cfg: the run's configuration.
        backbone: the diffusion model.
        restored: a checkpoint will be loaded, so that what the adapters would start from is not read.

    Returns:
        The adapters as one.
    """
    import torch

    from models.conditioning.base import Conditioning

    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        skipped = ("module", *(START if restored else ()))
        nodes = {
            name: {key: value for key, value in node.items() if key not in skipped}
            for name, node in cfg.conditioning.items()
        }
        adapters: dict[str, Any] = {}
        for name in sorted(nodes, key=lambda name: bool(nodes[name].get("adapters"))):  # what acts on others comes last
            given = {"others": dict(adapters)} if nodes[name].get("adapters") else {}
            adapters[name] = instantiate(nodes[name], backbone=backbone, **given, _convert_="all")
        return Conditioning({name: adapters[name] for name in nodes})


def build_module(cfg: DictConfig, *, backbone: Backbone | None = None, restored: bool = False) -> SceneDiffusion:
    """The LightningModule of the run's method; several methods share the general one. `restored` as above."""
    import torch

    from lightning_modules.execution import Execution
    from lightning_modules.optimization import Optimization
    from models.conditioning.drops import ConditionDrops

    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        backbone = backbone or build_backbone(cfg)
    _check_precision(backbone, cfg.trainer.precision)
    conditioning = build_conditioning(cfg, backbone, restored=restored)
    optimizer = OmegaConf.to_container(cfg.optimizer, resolve=True)
    schedule = {key: optimizer.pop(key) for key in ("schedule", "warmup_steps", "final_fraction")}
    return _module_class(cfg)(
        backbone=backbone,
        conditioning=conditioning,
        objective=instantiate(cfg.objective, scheduler_config=backbone.scheduler_config, _convert_="all"),
        drops=ConditionDrops(**{key: value for key, value in cfg.drops.items() if value is not None}),
        optimization=Optimization(
            optimizer=_optimizer(optimizer, shared=cfg.trainer.strategy == "fsdp" and ranks_of(os.environ).count > 1),
            schedule=schedule,
            average={"decay": cfg.ema.decay, "warmup": cfg.ema.warmup} if cfg.ema.enabled else None,
            max_nonfinite=cfg.trainer.max_nonfinite,
        ),
        sampler=instantiate(cfg.sampler, _convert_="all"),
        execution=Execution(
            channels_last=cfg.trainer.channels_last,
            compile=cfg.trainer.compile,
            gradient_checkpointing=cfg.trainer.get("gradient_checkpointing", False),  # a run from before has none
        ),
        seed=cfg.seed,
        posterior=cfg.data.get("posterior", "mode"),
    )


def _check_precision(backbone: Backbone, precision: str) -> None:
    """Refuses frozen weights in another half precision than that in which they would compute: all sums would be in float32.

    Args:
        backbone: the diffusion model.
        precision: the trainer's.

    Raises:
        ValueError: they differ.
    """
    from runtime.launch.device import MIXED

    held, computed = str(backbone.unet.dtype).removeprefix("torch."), MIXED.get(precision)
    if held in ("bfloat16", "float16") and computed is not None and backbone.unet.dtype != computed:
        fitting = str(computed).removeprefix("torch.")
        raise ValueError(
            f"backbone.dtype={held}: trainer.precision={precision} computes in {fitting}; set backbone.dtype={fitting}"
        )


def _optimizer(node: dict[str, Any], *, shared: bool = False) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer that waits for its parameters.

    Args:
        node: its class under `_target_`, `learning_rate`, `decay_vectors`, and the class's own arguments; null ones are left to
            the class.
        shared: each rank keeps the state of a part of the parameters.

    Returns:
        Called with the parameters, it gives the optimizer.

    Raises:
        ValueError: its package is not installed.
    """
    target = node.pop("_target_")
    try:
        optimizer = get_class(target)
    except Exception as error:
        raise ValueError(
            f"optimizer._target_: {target} cannot be imported; install {target.partition('.')[0]}, or take optimizer=adamw"
        ) from error
    settings = {key: value for key, value in node.items() if value is not None}
    decay_vectors = settings.pop("decay_vectors", True)  # a run from before has none
    settings["lr"] = settings.pop("learning_rate")
    build = functools.partial(optimizer, **settings)
    if shared:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        build = functools.partial(ZeroRedundancyOptimizer, optimizer_class=optimizer, **settings)
    return build if decay_vectors else lambda parameters: build(_groups(parameters))


def _groups(parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those of fewer than two axes without."""
    decayed, plain = [], []
    for parameter in parameters:
        (plain if parameter.ndim < 2 else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _module_class(cfg: DictConfig) -> type[SceneDiffusion]:
    """The class that the run names under `module`, else the one that its only method names, else the general one."""
    if cfg.get("module"):
        return get_class(cfg.module)
    nodes = list(cfg.conditioning.values())
    if len(nodes) == 1 and nodes[0].get("module"):
        return get_class(nodes[0].module)
    return get_class(f"{MODULES}.scene_diffusion.SceneDiffusion")


def build_refiner(cfg: DictConfig) -> Refiner | None:
    """What refines finished pictures; None where the configuration of evaluate or sample names none."""
    return None if cfg.refiner is None else instantiate(cfg.refiner)


def build_data(cfg: DictConfig) -> SceneDataModule:
    """The data of the run."""
    return instantiate(cfg.data, _convert_="all")


def build_callbacks(cfg: DictConfig, passed_over: PassedOver) -> list[pl.Callback]:
    """The run's callbacks in the order in which they are to act, whatever the order of their names.

    What saves comes first; then what only shows or measures, what works on held-out scenes last; then what keeps the best.

    Args:
        cfg: the run's configuration.
        passed_over: catches what those raise that only show or measure.

    Returns:
        They, with what makes the run go on from whole steps.
    """
    from callbacks.checkpoint import Checkpoint, KeepBest
    from callbacks.observer import HeldOutObserver, Observer
    from datamodules.resume import ResumeWholeSteps

    chosen = {name: instantiate(node, _convert_="all") for name, node in cfg.callback.items()}
    for name, callback in chosen.items():
        if isinstance(callback, Observer):
            passed_over.watch(str(name), callback)
    saving = [callback for callback in chosen.values() if isinstance(callback, Checkpoint)]
    others = [callback for callback in chosen.values() if not isinstance(callback, Checkpoint | HeldOutObserver)]
    drawing = [callback for callback in chosen.values() if isinstance(callback, HeldOutObserver)]
    keeping = [KeepBest(callback, passed_over) for callback in saving if callback.best is not None]
    return [ResumeWholeSteps(), *saving, *others, *drawing, *keeping, passed_over]


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning's trainer with the run's callbacks and loggers."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    from callbacks.checkpoint_files import CheckpointFiles
    from callbacks.observer import PassedOver

    node = cfg.trainer
    passed_over = PassedOver()
    loggers = {name: instantiate(node, _convert_="all") for name, node in cfg.logger.items()}
    for name, logger in loggers.items():
        passed_over.watch_logger(str(name), logger)
    torch.set_float32_matmul_precision(node.matmul)
    # where SLURM is installed Lightning tells every plain process to use it
    warnings.filterwarnings("ignore", message=".*srun.* is not used")
    ranks = ranks_of(os.environ).count
    return pl.Trainer(
        # the processes have met, whoever started them; Lightning's own way under SLURM would save by itself on its signals
        plugins=[TorchElasticEnvironment() if ranks > 1 else LightningEnvironment(), CheckpointFiles()],
        accelerator=node.accelerator,
        devices=node.devices,
        num_nodes=node.num_nodes,
        strategy=build_strategy(node.strategy, ranks, timeout=node.get("timeout_minutes", 30.0)),
        precision=node.precision,
        max_steps=node.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=node.accumulate,
        gradient_clip_val=node.gradient_clip,
        deterministic=node.deterministic,
        log_every_n_steps=min(node.log_every, node.max_steps),  # a run of few steps logs its last
        val_check_interval=node.validate_every * node.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(Path(cfg.run)),
        callbacks=build_callbacks(cfg, passed_over),
        logger=list(loggers.values()),
    )


def build_strategy(name: str, ranks: int, *, timeout: float = 30.0) -> Strategy | str:
    """How processes share the work of a step.

    Args:
        name: auto, ddp, fsdp, or what Lightning calls one of its own.
        ranks: Processes that train together.
        timeout: Minutes for which one waits for the others.

    Returns:
        The strategy, or Lightning's name of one; of a single process the plain one.
    """
    settings: dict[str, Any] = {
        "timeout": timedelta(minutes=timeout),
        "gradient_as_bucket_view": True,  # gradients lie where they are sent from: one copy of them less
    }
    if name in ("auto", "ddp", "fsdp") and ranks == 1:
        return "auto"
    if name in ("auto", "ddp"):
        from pytorch_lightning.strategies import DDPStrategy

        return DDPStrategy(**settings)
    if name == "fsdp":
        from runtime.launch.sharding import SharedOut  # where torch was built without it, other strategies still work

        return SharedOut(**settings)
    return name


def check_fit(conditioning: Any, provides: frozenset[str], *, data: str) -> None:
    """Refuses data that lacks what the methods require.

    Args:
        conditioning: a `Conditioning`: the fields that its adapters require, and their names for the message.
        provides: the fields that the data provides.
        data: name of the data, for the message.

    Raises:
        ValueError: something required is not provided; both are named.
    """
    missing = sorted(conditioning.requires - provides)
    if missing:
        raise ValueError(
            f"conditioning={list(conditioning.adapters)} requires {', '.join(missing)}, but data {data} provides only "
            f"{', '.join(sorted(provides))}; choose other data or another conditioning"
        )
