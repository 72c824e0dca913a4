"""Trained weights as a module that draws: of a run's checkpoint, or of an adapter file without a run.

The configuration is the run's own, or, for a file, what the file says of itself and the project's defaults. What is drawn
with them is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open

from models.conditioning.adapter_file import SUFFIX, load_pickled, load_weights
from runtime.build import build_module
from runtime.composition import CONF
from runtime.launch.device import MIXED
from runtime.run_directory import RunDirectory, RunError, lay_over
from runtime.texts import read_texts

if TYPE_CHECKING:
    from lightning_modules.scene_diffusion import SceneDiffusion


def load_module(run_cfg: DictConfig, checkpoint: str | None) -> tuple[SceneDiffusion, Path]:
    """The module of a run with the weights of a checkpoint, and which checkpoint that is.

    Args:
        run_cfg: the run's own configuration, or that of `weights_config`.
        checkpoint: a file; None takes the newest whole one of the run.

    Returns:
        The module in evaluation mode, on the CPU, and the file with its weights.

    Raises:
        RunError: the run has no checkpoint.
        ValueError: the weights do not fit.
    """
    if (file := run_cfg.get("weights_file")) is not None:
        return _of_file(run_cfg, file), Path(file)
    path = Path(checkpoint) if checkpoint else RunDirectory(run_cfg.run).newest_checkpoint()
    if path is None or not path.is_file():
        raise RunError(
            f"run={run_cfg.run}: no checkpoint {path or 'yet'}; train it first: python train.py run={run_cfg.run}"
        )
    module = build_module(run_cfg, restored=True)
    stored = load_pickled(path, f"checkpoint={path}")
    module.on_load_checkpoint(stored)
    module.load_state_dict(stored["state_dict"], strict=False)  # on_load_checkpoint has verified the keys
    module.loaded_step = stored["global_step"]
    return module.eval(), path


def weights_config(weights: str, overrides: DictConfig) -> DictConfig:
    """What a run would say of an adapter file that comes without one.

    Args:
        weights: an adapter file, or what the chosen method can read beside it.
        overrides: the configuration of evaluate: `backbone` has to be chosen, `conditioning` only for a file that does not say
            its method; what it sets of `sampler` and `trainer` lies over the defaults.

    Returns:
        Backbone, conditioning, sampler and trainer as a run's configuration has them.

    Raises:
        ValueError: nothing says which backbone or which method.
    """
    if overrides.backbone is None:
        raise ValueError(f"backbone: weights={weights} of which backbone? Name it, such as backbone=sd15")
    about = _about(weights)
    conditioning = overrides.conditioning
    if conditioning is None:
        if "method" not in about:
            raise ValueError(
                f"conditioning: weights={weights} does not say its method; name it, such as conditioning=boxes"
            )
        conditioning = {about["method"]: _option("conditioning", about["method"])}
        settings = json.loads(about.get("settings", "{}"))
        node = conditioning[about["method"]]
        node.update({key: value for key, value in settings.items() if key in node})
    cfg = OmegaConf.create(
        {
            "run": str(weights),
            "weights_file": str(weights),
            "seed": 0,
            "batch_size": 1,
            "backbone": overrides.backbone,
            "conditioning": conditioning,
            "objective": _option("objective", "diffusion"),  # these three are training's, and not used
            "drops": _option("drops", "balanced"),
            "optimizer": _option("optimizer", "adamw"),
            "ema": {"enabled": False},
            "sampler": _option("sampler", "ddim"),
            "trainer": {**_option("trainer", "cpu"), "accelerator": "auto"},
            "data": {},
        }
    )
    given = {
        key: OmegaConf.to_container(overrides[key]) for key in ("sampler", "trainer") if overrides[key] is not None
    }
    lay_over(cfg, given)
    read_texts(cfg)
    OmegaConf.resolve(cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg


def weights_hash(module: SceneDiffusion) -> str:
    """SHA-256 over the averaged weights that draw the pictures, frozen ones included."""
    digest = hashlib.sha256()
    with module.averaged():
        for part in (module.backbone, module.conditioning):
            for key, value in sorted(part.state_dict().items()):
                digest.update(key.encode())
                digest.update(_bytes(value))
    return digest.hexdigest()


def picture_settings(cfg: DictConfig, run_cfg: DictConfig, *, weights: str, seed: int, arm: str) -> dict[str, Any]:
    """All that decides what a picture of a scene looks like, as its manifest keeps it; the refiner is the command's."""
    settings = {
        "weights": weights,
        "sampler": OmegaConf.to_container(run_cfg.sampler, resolve=True),
        "seed": seed,
        "arm": arm,
    }
    if run_cfg.trainer.precision in MIXED:
        settings["precision"] = run_cfg.trainer.precision
    if cfg.refiner is not None:
        settings["refiner"] = OmegaConf.to_container(cfg.refiner, resolve=True)
    return settings


def _of_file(run_cfg: DictConfig, file: str) -> SceneDiffusion:
    """A module whose only adapter has the weights of a file."""
    module = build_module(run_cfg, restored=True)
    adapters = module.conditioning.named
    if len(adapters) != 1:
        raise ValueError(f"conditioning={list(adapters)}: weights={file} are of one method; name that one")
    (adapter,) = adapters.values()
    load_weights(adapter, file, backbone=module.backbone)
    module.loaded_step = None
    return module.eval()


def _about(weights: str) -> dict[str, str]:
    """What an adapter file says of itself; empty for the files of others."""
    path = Path(weights)
    if path.suffix != SUFFIX:
        return {}
    if not path.is_file():
        raise FileNotFoundError(2, "No such file or directory", weights)
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"weights={weights}: cannot be read ({error}); fetch it again") from error


def _option(group: str, name: str) -> dict[str, Any]:
    """A file of `conf/`, over those that its defaults name."""
    file = CONF / group / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(f"{group}={name}: no such {group} here; the weights are of another version")
    own = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(own, dict)
    merged: dict[str, Any] = {}
    for other in own.pop("defaults", []):
        merged |= _option(group, other)
    return merged | {str(key): value for key, value in own.items()}


def _bytes(value: torch.Tensor) -> bytes:
    """The bytes of a tensor, of a type that numpy does not have too."""
    value = value.detach().cpu().contiguous()
    return (value.reshape(-1).view(torch.uint8) if value.dtype == torch.bfloat16 else value).numpy().tobytes()
