"""LoRA on attention, the UNet's own and that of other adapters: it owns the low-rank weights, the layers borrow them.

Rank, scaling, dropout and initialisation are peft's. Its own way, layers that replace the UNet's and hold them, would change the
UNet's keys and make it the owner. It reads no scene: it is part of the denoiser, on for every picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig
from peft.tuners.lora import Linear
from safetensors import safe_open
from torch import Tensor, nn

from models.conditioning.adapter_file import SUFFIX, load_weights, read_tensors
from models.conditioning.base import Adapter, AdapterOutput, Text, gate_figures
from models.conditioning.slots import attention_layers, block_sites, slot_layers
from models.conditioning.unet_files import CHECKPOINTS, unet_of_checkpoint
from scenes.json_form import parse_mapping

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from scenes import SceneBatch

NAME = "default"  # peft's own name for an adapter
INIT: dict[str, bool | str] = {"kaiming": True, "gaussian": "gaussian"}
FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it in a folder
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class LowRank(nn.Module):
    """What peft's layer adds to a linear layer, without the layer; nothing at initialisation.

    Args:
        widths: of the layer, (in, out).
        config: rank, scaling, dropout and initialisation.
    """

    def __init__(self, widths: tuple[int, int], config: LoraConfig) -> None:
        super().__init__()
        like = nn.Linear(*widths, bias=False, device="meta")
        # of the layer's shape and of no size: peft takes device and precision from it
        like.weight = nn.Parameter(torch.zeros(()).expand(widths[1], widths[0]), requires_grad=False)
        made: Any = Linear(like, NAME, config, r=config.r, lora_alpha=config.lora_alpha)
        self.dropout, self.scaling = made.lora_dropout[NAME], made.scaling[NAME]
        self.lora_A, self.lora_B = cast(nn.Linear, made.lora_A[NAME]), cast(nn.Linear, made.lora_B[NAME])

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added to the layer's output (..., out), of its input (..., in)."""
        return self.lora_B(self.lora_A(self.dropout(hidden.to(self.lora_A.weight.dtype)))) * self.scaling


class LoraAdapter(Adapter):
    """Low-rank changes to the queries, keys, values and outputs of attention.

    Which layers these are peft tells by the ends of their names. In a published UNet that holds a method's layers they are
    changed with the UNet's own.

    Args:
        backbone: the denoiser to fit; read for its layers, not kept.
        rank: of each change.
        alpha: a change is multiplied by alpha / rank; None takes the rank.
        dropout: share of a change's inputs that training zeroes, drawn from torch's generator: a run that was stopped then goes
            on with other numbers than an unbroken one.
        init: of the first matrix: "kaiming", peft's own, or "gaussian", of deviation 1 / rank; the second is zero.
        blocks: "all", or some of down, mid, up.
        adapters: whether layers of these names in other adapters' modules in the blocks are changed too.
        others: the other adapters by name; read for their layers, not kept.
        weights: where to start from: an adapter file, a LoRA that diffusers has written (a file, or its folder), or a
            checkpoint (`.pt`, `.ckpt`, `.pth`) of a published training with LoRA.

    Raises:
        ValueError: a rank below 1, an unknown initialisation, two adapters with a layer of one name, or weights that do not fit.

    Source:
        Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    method = "lora"

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "gaussian",
        blocks: str | Sequence[str] = "all",
        adapters: bool = False,
        others: Mapping[str, Adapter] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"conditioning.lora.rank: {rank} is less than 1; give a positive number")
        if not 0 <= dropout < 1:
            raise ValueError(f"conditioning.lora.dropout: {dropout} is not a share below 1; give 0 for none")
        if init not in INIT:
            raise ValueError(f"conditioning.lora.init: {init!r} is unknown; take {', '.join(INIT)}")
        blocks = blocks if isinstance(blocks, str) else list(blocks)
        alpha = float(rank if alpha is None else alpha)
        self._settings = {"rank": rank, "alpha": alpha, "blocks": blocks, "adapters": adapters}
        self.config = LoraConfig(
            r=rank,
            lora_alpha=cast(int, self._settings["alpha"]),
            lora_dropout=dropout,
            init_lora_weights=cast(bool, INIT[init]),
            target_modules=TARGETS,
        )
        layers = attention_layers(backbone.unet, blocks)
        if adapters:
            layers |= _layers_of_others(others or {}, {site.path for site in block_sites(backbone.unet, blocks)})
        self.paths = list(layers)
        self.changes = nn.ModuleList(LowRank(widths, self.config) for widths in layers.values())
        if weights is not None:
            load_weights(self, weights, backbone=backbone)

    def settings(self) -> dict[str, Any]:
        """Rank, alpha, blocks, and whether it acts on other adapters."""
        return self._settings

    def layer_modules(self) -> dict[str, nn.Module]:
        """One change for each layer."""
        return dict(zip(self.paths, self.changes, strict=True))

    def gates(self) -> dict[str, float]:
        """Mean magnitude of each second matrix, by layer: 0 at initialisation."""
        changes = cast(list[LowRank], list(self.changes))
        return gate_figures({path: each.lora_B.weight for path, each in zip(self.paths, changes, strict=True)})

    def published(self) -> dict[str, Tensor]:
        """Its tensors under the names of a LoRA of diffusers."""
        return {
            f"unet.{path}.{name}": parameter.data
            for path, change in self.layer_modules().items()
            for name, parameter in change.named_parameters()
        }

    def read_published(self, path: str) -> dict[str, Tensor]:
        """The tensors of a LoRA that diffusers or a published training has written.

        Args:
            path: a safetensors file, the folder of `pytorch_lora_weights.safetensors`, or a checkpoint; no code in it is run.

        Returns:
            Tensors by published name, on the CPU.

        Raises:
            ValueError: nothing there, no LoRA, or one of another rank or alpha.
        """
        what, file = f"conditioning.lora.weights: {path}", Path(path)
        file = file / FILE if file.is_dir() else file
        if not file.is_file() or file.suffix not in (SUFFIX, *CHECKPOINTS):
            raise ValueError(
                f"{what} is no safetensors file, checkpoint or folder with {FILE}; give one of a LoRA, or of an adapter"
            )
        tensors = read_tensors(file, what) if file.suffix == SUFFIX else _of_checkpoint(file, what)
        ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
        if not ranks:
            raise ValueError(
                f"{what} holds no LoRA of the form that diffusers writes (unet.*.lora_A.weight); write it so"
            )
        said: dict[str, Any] = {}
        if file.suffix == SUFFIX:
            with safe_open(file, framework="pt") as opened:
                metadata = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
            said = parse_mapping(metadata, f"{what}: its lora_adapter_metadata")
        found = {"rank": ranks, "alpha": {said["unet.lora_alpha"]} if "unet.lora_alpha" in said else ranks}
        for name, values in found.items():
            if values != {self._settings[name]}:
                listed = ", ".join(f"{value:g}" for value in sorted(values))
                raise ValueError(
                    f"conditioning.lora.{name}: {self._settings[name]:g} here, but {path} has {listed}; set it as there"
                )
        return tensors

    def export(self, backbone: Backbone, out: Path, *, form: str) -> None:
        """Writes a folder that `load_lora_weights` of a diffusers pipeline reads.

        Args:
            backbone: not read.
            out: the folder.
            form: "diffusers".

        Raises:
            ValueError: another form.
        """
        if form != "diffusers":
            super().export(backbone, out, form=form)
        layers: dict[str, nn.Module | Tensor] = {
            name.removeprefix("unet."): tensor.contiguous() for name, tensor in self.published().items()
        }
        metadata = self.config.to_dict()
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            out, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
        )

    def forward(self, scenes: SceneBatch, text: Text, latent_size: tuple[int, int]) -> AdapterOutput:
        """Nothing: it acts whatever the scene."""
        return AdapterOutput()


def _layers_of_others(others: Mapping[str, Adapter], blocks: set[str]) -> dict[str, tuple[int, int]]:
    """The layers of other adapters in some blocks that peft's rule of names also means: path -> widths (in, out)."""
    layers, owner = {}, {}
    for name, adapter in others.items():
        modules = {path: module for path, module in adapter.slot_modules().items() if path in blocks}
        for path, layer in slot_layers(modules).items():
            if not path.endswith(tuple(f".{target}" for target in TARGETS)):
                continue
            if path in owner:
                raise ValueError(
                    f"conditioning.lora.adapters: true, but {owner[path]} and {name} both have {path}; set it to false"
                )
            layers[path], owner[path] = (layer.in_features, layer.out_features), name
    return layers


def _of_checkpoint(file: Path, what: str) -> dict[str, Tensor]:
    """The LoRA in a checkpoint of a published training, by the names that diffusers writes; its average is left out."""
    ending = f".{NAME}.weight"
    return {
        f"unet.{name.removesuffix(ending)}.weight": tensor
        for name, tensor in unet_of_checkpoint(file, what).items()
        if ".lora_" in name and name.endswith(ending) and not name.startswith("ema_")
    }
