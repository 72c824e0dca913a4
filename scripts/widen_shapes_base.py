"""Gives weights of the shapes base from before it was told places the two input channels that say them.

    python -m scripts.widen_shapes_base OLD NEW

The new columns of the first convolution are random; `experiment=shapes_base_places` trains the result.
"""

import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FIRST = "unet.conv_in.weight"
CHANNELS = 2
DEVIATION = 0.6
"""At 0.1 the noise of the latents drowns them: a linear probe finds .3 of a place's variance, at 0.6 .9."""


def main(old: str, new: str) -> None:
    """Writes the widened weights.

    Args:
        old: a file of `ShapesBackbone.save_weights` without the channels.
        new: the file to write.
    """
    with safe_open(old, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    first = tensors[FIRST]
    drawn = torch.randn(first.shape[0], CHANNELS, *first.shape[2:], generator=torch.Generator().manual_seed(0))
    tensors[FIRST] = torch.cat([first, drawn.to(first) * DEVIATION], dim=1).contiguous()
    save_file(tensors, new, metadata=metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
