"""What tests of the metrics over features share: pictures, scenes, and Inception's two files at random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import inception_v3

from metrics.weights import quiet
from scenes.scene import Scene


@pytest.fixture(scope="session")
def pictures():
    """pictures(count, seed=0, size=(52, 40)): smooth pictures (H, W, 3) uint8 of chance."""

    def made(count, seed=0, size=(52, 40)):
        coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
        return [np.asarray(Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC)) for one in coarse]

    return made


@pytest.fixture(scope="session")
def named():
    """named(count): scenes without objects."""
    return lambda count: [Scene(id=f"s{place:03d}", caption="a red circle") for place in range(count)]


class Scripted(nn.Module):
    """What NVIDIA's file holds, with the same calls, around fewer layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 9, stride=8),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(24, 2048, 1),
        )
        self.output = nn.Linear(2048, 1008)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = nn.functional.interpolate(img.to(torch.float32), size=[299, 299], mode="bilinear", align_corners=False)
        features = self.layers.forward((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(dim=1)


@pytest.fixture(scope="session")
def torchscript(tmp_path_factory):
    """A file in the form of NVIDIA's TorchScript, at random weights."""
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        network = Scripted().eval()
        network.output.bias.data.normal_(std=3)
        torch.jit.script(network).save(str(path))
    return path


@pytest.fixture(scope="session")
def state_dict(tmp_path_factory):
    """A file in the form of pytorch-fid's weights: the whole network, at random weights that keep pictures apart."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path
