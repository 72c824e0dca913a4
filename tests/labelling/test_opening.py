"""What all parts over pretrained models promise: settings out of range and weights that are not there are named, in one line.

Models are opened without a line of their libraries: labelling and evaluation have bars of their own.
"""

import re

import numpy as np
import pytest
import torch

from labelling.describers import Blip2, Florence2, QwenVL
from labelling.detectors import HubDetector, OnnxDetector
from labelling.grounding import GroundingDino
from labelling.local_model import LocalModel
from labelling.parts import PartMissing
from labelling.ram import RamTagger
from labelling.segmenters import Sam
from labelling.taggers import CaptionTagger, ClassifierTagger, ZeroShotTagger
from metrics.clip import Clip
from preparation.export_labels import clip_embedding

PICTURE = np.zeros((40, 56, 3), np.uint8)
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


@pytest.mark.parametrize(
    ("use", "setting"),
    [
        (lambda folder: GroundingDino(model=folder)([PICTURE], [["cat"]]), "detector.model"),
        (lambda folder: HubDetector(model=folder).to("cpu"), "detector.model"),
        (lambda folder: Sam(model=folder)([PICTURE], [np.zeros((1, 4), np.float32)]), "segmenter.model"),
        (lambda folder: Blip2(model=folder)([PICTURE], ["cat"]), "describer.model"),
        (lambda folder: LocalModel(model=folder).to("cpu"), "model"),
    ],
)
def test_weights_that_are_not_there_are_named(use, setting, tmp_path):
    with pytest.raises(PartMissing, match=f"{setting}=.*nowhere: ") as caught:
        use(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_settings_tell_all_without_opening_the_model():
    given = {"model": "nobody/nothing", "revision": "abc"}
    sam = {**given, "part": "Sam", "dtype": "float32", "mask_threshold": 0.5}
    assert Sam(**given, mask_threshold=0.5).settings() == sam
    qwen = {**given, "part": "QwenVL", "dtype": "float32", "prompt": "say {tag}", "max_tokens": 77}
    assert QwenVL(**given, prompt="say {tag}").settings() == qwen
    given |= {"labels": "tokens", "short_side": 512}
    default = {"dtype": "float32", "box_threshold": 0.25, "nms": 0.5, "nms_across": False, "text_threshold": 0.2}
    default |= {"part": "GroundingDino", "separator": ".", "final_stop": True}
    assert GroundingDino(**given).settings() == {**given, **default}


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (CaptionTagger, {"form": "words"}, "tagger.form=words"),
        (ClassifierTagger, {"threshold": 1.0}, "tagger.threshold=1.0"),
        (ClassifierTagger, {"most": 0}, "tagger.most=0"),
        (ClassifierTagger, {"batch_size": 0}, "tagger.batch_size=0"),
        (ClassifierTagger, {"dtype": "int8"}, "tagger.dtype=int8"),
        (ZeroShotTagger, {"words": ["dog"], "template": "photo"}, "tagger.template='photo'"),
        (RamTagger, {"interpolation": "nearest"}, "tagger.interpolation=nearest"),
        (RamTagger, {"dtype": "int8"}, "tagger.dtype=int8"),
        (RamTagger, {"batch_size": 0}, "tagger.batch_size=0"),
        (GroundingDino, {"box_threshold": 1.5}, "detector.box_threshold=1.5"),
        (GroundingDino, {"nms": -0.1}, "detector.nms=-0.1"),
        (GroundingDino, {"text_threshold": 2}, "detector.text_threshold=2"),
        (GroundingDino, {"labels": "words"}, "detector.labels=words"),
        (GroundingDino, {"short_side": 0}, "detector.short_side=0"),
        (GroundingDino, {"dtype": "int8"}, "detector.dtype=int8"),
        (GroundingDino, {"batch_size": 0}, "detector.batch_size=0"),
        (OnnxDetector, {"threshold": 1.5}, "detector.threshold=1.5"),
        (OnnxDetector, {"top": 0}, "detector.top=0"),
        (OnnxDetector, {"form": "yolov5"}, "detector.form=yolov5"),
        (OnnxDetector, {"overlap": 0.0}, "detector.overlap=0.0"),
        (OnnxDetector, {"names": "no_such_file.txt"}, "detector.names=no_such_file.txt"),
        (OnnxDetector, {"names": []}, "detector.names"),
        (QwenVL, {"max_tokens": 0}, "describer.max_tokens=0"),
        (Blip2, {"batch_size": 0}, "describer.batch_size=0"),
        (Florence2, {"prompt": "<OD>"}, "describer.prompt=<OD>"),
        (LocalModel, {"dtype": "int8"}, "dtype=int8"),
        (LocalModel, {"max_tokens": 0}, "max_tokens=0"),
        (LocalModel, {"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_settings_out_of_range_are_refused_in_a_line(kind, settings, named, ram):
    given = {CaptionTagger: {}, RamTagger: {"model": ram}, OnnxDetector: {"file": "x.onnx", "form": "yolox"}}
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        kind(**{**given.get(kind, {"model": "x"}), **settings})
    assert "\n" not in str(caught.value)
