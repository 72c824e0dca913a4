"""Models are opened without a line of their libraries: labelling and evaluation have bars of their own."""

import pytest
import torch

from labelling.describers import Blip2
from labelling.detectors import HubDetector
from labelling.grounding import GroundingDino
from labelling.local_model import LocalModel
from labelling.segmenters import Sam
from metrics.clip import Clip
from preparation.export_labels import clip_embedding

OPEN = {
    "grounding_dino": lambda folder: GroundingDino(model=folder).model,
    "sam": lambda folder: Sam(model=folder).model,
    "blip2": lambda folder: Blip2(model=folder).model,
    "detr": lambda folder: HubDetector(model=folder).to("cpu"),
    "qwen_vl": lambda folder: LocalModel(model=folder).to("cpu"),
    "clip": lambda folder: Clip(folder, setting="model").to(torch.device("cpu")),
    "clip_text": clip_embedding,
}


@pytest.mark.parametrize("name", OPEN)
def test_no_library_writes_a_line(name, tiny_model, capfd):
    folder = tiny_model(name)
    capfd.readouterr()
    OPEN[name](folder)
    assert capfd.readouterr() == ("", "")
