"""What trainer settings mean on this machine: the device and precision that a trained run draws with, the ranks it trains on.

Training is placed by Lightning. Start latents are drawn on the CPU whatever the device, so pictures differ between devices
by rounding alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from runtime.launch.ranks import Ranks, ranks_of
from runtime.run_directory import RunError

if TYPE_CHECKING:
    from lightning_modules.scene_diffusion import SceneDiffusion

MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def device_of(trainer: DictConfig) -> torch.device:
    """The device that trainer settings name; of several devices the first.

    Args:
        trainer: `accelerator`: cpu, gpu, or auto, which is the GPU where there is one; `devices`: of a list of indices the
            first is taken, as drawing is one process.

    Returns:
        The CPU or a CUDA device.

    Raises:
        RunError: a GPU is asked for that is not there.
    """
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = trainer.devices[0] if isinstance(trainer.devices, ListConfig) and trainer.devices else 0
    if trainer.accelerator not in ("gpu", "auto"):
        raise RunError(f"trainer.accelerator={trainer.accelerator}: no such choice (have: cpu, gpu, auto)")
    if count == 0:
        raise RunError("trainer.accelerator=gpu: torch finds no GPU here; add trainer.accelerator=cpu")
    if index >= count:
        raise RunError(
            f"trainer.devices={trainer.devices}: torch finds {count} GPUs here; name one from 0 to {count - 1}"
        )
    return torch.device("cuda", index)


def world_size(trainer: DictConfig) -> int:
    """Processes that train together, told before there is a trainer.

    Args:
        trainer: `accelerator`, `devices` (a number, a list of indices, or "auto"), `num_nodes`.

    Returns:
        As many as a launcher has started; where it has started none, devices of this machine times the number of machines, as
        Lightning counts them.

    Raises:
        RunError: a GPU is asked for that is not there.
    """
    if (started := ranks_of(os.environ).count) > 1:
        return started
    on_cpu = device_of(trainer).type == "cpu"
    asked = OmegaConf.to_container(trainer).get("devices")
    if on_cpu and isinstance(asked, int) and asked > 0:
        return trainer.num_nodes * asked  # as Lightning has it, whose imports take 10 s

    from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator

    kind = CPUAccelerator if on_cpu else CUDAAccelerator
    devices = kind.auto_device_count() if asked == "auto" else kind.parse_devices(asked)
    return trainer.num_nodes * (devices if isinstance(devices, int) else len(devices))


def accumulation(batch_size: int, trainer: DictConfig) -> int:
    """Micro-batches to an optimizer step.

    Args:
        batch_size: the global one.
        trainer: `accumulate`, or in its place `micro_batch`, and what `world_size` reads.

    Returns:
        `accumulate` as given, or what makes `micro_batch` samples a rank at once into the global batch.

    Raises:
        RunError: the batch does not divide so.
    """
    if trainer.get("micro_batch") is None:
        return trainer.accumulate
    ranks, micro = world_size(trainer), trainer.micro_batch
    if batch_size % (ranks * micro):
        rank_share = batch_size // ranks if batch_size % ranks == 0 else 0
        fitting = [size for size in range(1, rank_share + 1) if rank_share % size == 0 and size <= micro]
        way = f"trainer.micro_batch={fitting[-1]}" if fitting else "another number of devices"
        raise RunError(
            f"trainer.micro_batch={micro}: batch_size={batch_size} (the global one) does not divide by ranks={ranks} x "
            f"{micro} samples at once; take {way}, or another batch_size"
        )
    return batch_size // (ranks * micro)


def place_rank(run_cfg: DictConfig, ranks: Ranks) -> None:
    """Gives each of several processes of a machine its own GPU; of a list of devices the rank's.

    Args:
        run_cfg: its `trainer.devices` is set.
        ranks: which process this is.
    """
    if ranks.count > 1 and torch.cuda.is_available():
        given = run_cfg.trainer.devices
        devices = list(given) if not isinstance(given, int | str) else list(range(torch.cuda.device_count()))
        run_cfg.trainer.devices = [devices[ranks.local % len(devices)]]


@contextmanager
def placed(module: SceneDiffusion, trainer: DictConfig) -> Iterator[SceneDiffusion]:
    """Moves a module to its trainer's device, where it stays; within the block it computes in the trainer's precision.

    Args:
        module: what draws.
        trainer: `accelerator`, `devices`, `precision`, `matmul`. A mixed precision is torch's autocast; under the others a
            module draws in the precision that its weights have.

    Yields:
        The module.
    """
    device = device_of(trainer)
    torch.set_float32_matmul_precision(trainer.matmul)
    dtype = MIXED.get(trainer.precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield module.to(device)
