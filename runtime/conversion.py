"""What `convert.py` does once its configuration is checked: take an adapter from a run or from weights, and write it.

No method is named here: which published files there are, and which forms can be written, the adapter knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from models.conditioning.adapter_file import differing_settings, fill, read_weights, save_adapter
from models.conditioning.base import Conditioning
from runtime.build import build_backbone, build_conditioning
from runtime.restoring import load_module
from runtime.run_directory import load_run_config

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from models.conditioning.base import Adapter

BARE_FORMS = ("adapter", "published")
"""Forms that hold the adapter's tensors alone: the backbone's weights are not needed to write them."""


def convert(cfg: DictConfig) -> str:
    """Converts what the configuration names.

    Args:
        cfg: what `convert.py` was asked for.

    Returns:
        One line that says what was written.

    Raises:
        ValueError: weights that do not fit, or a form that the method does not have.
    """
    adapter, backbone, origin = _from_weights(cfg) if cfg.run is None else _from_run(cfg)
    if cfg.form == "adapter":
        save_adapter(adapter, cfg.out, backbone=backbone)
    else:
        adapter.export(backbone, Path(cfg.out), form=cfg.form)
    sizes = [tensor.numel() for tensor in adapter.published().values()]
    return f"{cfg.out}: {adapter.method}, {len(sizes)} tensors, {sum(sizes):,} parameters, from {origin}"


def _from_run(cfg: DictConfig) -> tuple[Adapter, Backbone, str]:
    """An adapter of a run, with the backbone that it was trained on."""
    run_cfg = load_run_config(cfg.run, cfg)
    if "dtype" in run_cfg.backbone and (cfg.backbone is None or cfg.backbone.get("dtype") is None):
        run_cfg.backbone.dtype = "float32"  # an export has the weights whole, in whichever precision the run held them
    module, checkpoint = load_module(_lean(run_cfg, cfg.form), cfg.checkpoint)
    name = _only(module.conditioning, cfg.adapter, where=f"run={cfg.run}")
    adapter = module.conditioning.named[name]
    averaged = cfg.average and module.average is not None
    if averaged:
        with module.averaged():
            tensors = {key: tensor.clone() for key, tensor in adapter.published().items()}
        fill(adapter, tensors)
    return adapter, module.backbone, f"{'averaged' if averaged else 'plain'} weights of {cfg.run}, {checkpoint.name}"


def _from_weights(cfg: DictConfig) -> tuple[Adapter, Backbone, str]:
    """An adapter with given weights, with the backbone that they are for."""
    whole = OmegaConf.create({"seed": 0, "backbone": cfg.backbone, "conditioning": cfg.conditioning})
    backbone = build_backbone(_lean(whole, cfg.form))
    conditioning = build_conditioning(whole, backbone, restored=True)
    name = _only(conditioning, cfg.adapter, where=f"weights={cfg.weights}")
    adapter = conditioning.named[name]
    weights = read_weights(adapter, cfg.weights, backbone=backbone)
    if differing := differing_settings(adapter, weights):
        raise ValueError(f"{differing} ({cfg.weights}); set it as there")
    dtypes = {tensor.dtype for tensor in weights.tensors.values()}
    if len(dtypes) == 1:
        adapter.to(dtypes.pop())  # the precision of the file stays as it is
    fill(adapter, weights.tensors)
    return adapter, backbone, str(cfg.weights)


def _lean(cfg: DictConfig, form: str) -> DictConfig:
    """The configuration with a backbone without weights, where the structure is enough and the backbone can do so."""
    if form not in BARE_FORMS or "skeleton" not in cfg.backbone:
        return cfg
    return OmegaConf.merge(cfg, {"backbone": {"skeleton": True}})  # type: ignore[return-value]


def _only(conditioning: Conditioning, wanted: str | None, *, where: str) -> str:
    """The name of the adapter to convert."""
    names = list(conditioning.named)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return str(wanted)
    have = f"have: {', '.join(names)}" if names else "there is none"
    raise ValueError(f"adapter={wanted}: {where} needs one adapter to convert ({have}); name it with adapter=NAME")
