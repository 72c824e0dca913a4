"""Reading RAM's published weights: its names become those of transformers' layers, and not one tensor is taken on trust.

The network is in ``ram_network.py``.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor

from labelling.ram_network import RamNetwork, RamSizes

# Of RAM's file: its captioning half, with which the decoder shares its layers, what the published model deletes of BERT, and
# what Swin computes again. None of it takes part in tagging.
_UNUSED = re.compile(
    r"tag_encoder\.|text_decoder\.|tagging_head\.(embeddings|encoder\.layer\.\d+\.attention)\."
    r"|visual_encoder\..+\.(attn_mask|relative_position_index)$"
)
_NAMES = (
    (re.compile(r"^visual_encoder\.patch_embed\.proj\."), "encoder.embeddings.patch_embeddings.projection."),
    (re.compile(r"^visual_encoder\.patch_embed\.norm\."), "encoder.embeddings.norm."),
    (re.compile(r"^visual_encoder\.norm\."), "encoder.layernorm."),
    (re.compile(r"^visual_encoder\.layers\."), "encoder.encoder.layers."),
    (re.compile(r"\.norm1\."), ".layernorm_before."),
    (re.compile(r"\.norm2\."), ".layernorm_after."),
    (re.compile(r"\.attn\.proj\."), ".attention.o_proj."),
    (
        re.compile(r"\.attn\.relative_position_bias_table$"),
        ".attention.relative_position_bias.relative_position_bias_table",
    ),
    (re.compile(r"^tagging_head\.encoder\.layer\."), "decoder."),
)
_QKV = re.compile(r"\.attn\.qkv\.")


def read_ram(path: str | Path) -> RamNetwork:
    """RAM with the weights of a published file, such as `ram_swin_large_14m.pth`.

    Args:
        path: The file; what it holds besides `model`, such as the optimizer's state, is not read from the disk.

    Returns:
        The network, in the file's dtype.

    Raises:
        ValueError: The file is none of weights alone, or not of RAM's; the message does not name it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        more = f": it asks for {asked[1]}" if asked else ""
        raise ValueError(f"no file of torch's with weights alone{more}") from error
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError("holds no `model`")
    return ram_of(state)


def ram_of(state: Mapping[str, Tensor]) -> RamNetwork:
    """RAM of the published names and tensors.

    Args:
        state: As in the file under `model`.

    Returns:
        The network, whose parameters are those tensors.

    Raises:
        ValueError: A tensor is missing, is of another shape, or is none of RAM's.
    """
    state = {key.replace("vision_multi", "tagging_head"): value for key, value in state.items()}  # its earlier name
    state = {key: value for key, value in state.items() if not _UNUSED.match(key)}
    try:
        sizes = _sizes(state)
    except KeyError as error:
        raise ValueError(f"no weights of RAM: {error.args[0]} is missing") from error
    with init_empty_weights(include_buffers=False):
        network = RamNetwork(sizes)
    tensors = dict(_renamed(state))
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    shaped = [name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shaped}
    if any(faults.values()):
        told = [f"{len(names)} tensors {fault} (the first: {names[0]})" for fault, names in faults.items() if names]
        raise ValueError(f"no weights of RAM: {', '.join(told)}")
    network.load_state_dict(tensors, assign=True)
    return network


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our names of the published tensors; queries, keys and values of Swin are one tensor there and three here."""
    for key, tensor in state.items():
        for pattern, name in _NAMES:
            key = pattern.sub(name, key)
        if _QKV.search(key):
            for kind, part in zip("qkv", tensor.chunk(3), strict=True):
                yield _QKV.sub(f".attention.{kind}_proj.", key), part
        else:
            yield key, tensor


def _sizes(state: Mapping[str, Tensor]) -> RamSizes:
    """The sizes that the tensors' shapes tell."""
    stages = range(_count(state, "visual_encoder.layers"))
    blocks = [f"visual_encoder.layers.{stage}.blocks" for stage in stages]
    tables = [_shape(state, f"{block}.0.attn.relative_position_bias_table") for block in blocks]
    swin_width, _, patch_size, _ = _shape(state, "visual_encoder.patch_embed.proj.weight")
    tags, embed_width = _shape(state, "label_embed")
    decoder = "tagging_head.encoder.layer"
    hidden, decoder_width = _shape(state, f"{decoder}.0.intermediate.dense.weight")
    return RamSizes(
        tags=tags,
        embed_width=embed_width,
        patch_size=patch_size,
        swin_width=swin_width,
        depths=tuple(_count(state, block) for block in blocks),
        heads=tuple(heads for _, heads in tables),
        window_size=(isqrt(tables[0][0]) + 1) // 2,  # a table has a row for each of (2 w - 1)^2 offsets
        mlp_ratio=_shape(state, f"{blocks[0]}.0.mlp.fc1.weight")[0] / swin_width,
        decoder_width=decoder_width,
        decoder_hidden=hidden,
        decoder_layers=_count(state, decoder),
    )


def _shape(state: Mapping[str, Tensor], key: str) -> Sequence[int]:
    return state[key].shape


def _count(state: Mapping[str, Tensor], list_name: str) -> int:
    """Entries of a list of modules, of which there has to be one."""
    depth = list_name.count(".") + 1
    places = {key.split(".")[depth] for key in state if key.startswith(f"{list_name}.")}
    if not places:
        raise KeyError(f"{list_name}.0")
    return len(places)
