"""Labelling as it is asked for on the command line: every part's file builds its class."""

import pytest
from hydra.utils import instantiate

from labelling.opening import Pretrained
from labelling.parts import Part
from preparation.label import Label
from runtime.composition import CONF, compose

GIVEN = ["shards=DIR", "out=DIR", "task=label"]
NEEDED = {"vocabulary": ["tagger.words=[dog]"], "zero_shot": ["tagger.words=[dog]"]}
NEEDED["yolox"] = NEEDED["yolox_s"] = NEEDED["yolov8"] = ["detector.file=FILE"]
PRESETS = sorted(path.stem for path in (CONF / "experiment" / "label").glob("*.yaml"))


def options(group):
    return [(group, path.stem) for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(
    ("group", "option"), [*options("tagger"), *options("detector"), *options("segmenter"), *options("describer")]
)
def test_every_file_builds_its_part_with_its_own_settings(group, option, ram):
    chosen = [f"{group}={option}", *NEEDED.get(option, []), *([f"tagger.model={ram}"] if option == "ram" else [])]
    cfg = compose("prepare", [*GIVEN, *chosen, *([] if group == "detector" else ["detector=grounding_dino"])])
    part = instantiate(cfg[group], _convert_="all")
    assert isinstance(part, Part)
    if isinstance(part, Pretrained):
        assert part.kind == group
    told = part.settings()
    for key, value in cfg[group].items():
        if key in told and value is not None and key != "names":  # of a list the words are told, not its name
            assert told[key] == value, key


def test_a_chain_is_put_together_from_its_groups():
    chosen = ["tagger=caption", "detector=grounding_dino", "describer=blip2", "detector.nms=0.4"]
    stage = instantiate(compose("prepare", [*GIVEN, *chosen]).stage, _convert_="all")
    assert isinstance(stage, Label)
    assert [type(part).__name__ for part in stage.parts.values()] == ["CaptionTagger", "GroundingDino", "Blip2"]
    assert stage.settings()["detector"]["nms"] == 0.4


@pytest.mark.parametrize("preset", PRESETS)
def test_a_published_labelling_composes_and_builds(preset, ram):
    files = [] if preset == "igligen" else [f"tagger.model={ram}"]
    cfg = compose("prepare", [f"experiment=label/{preset}", "shards=DIR", "out=DIR", *files])
    assert cfg.task == "label"
    settings = instantiate(cfg.stage, _convert_="all").settings()
    expected = {
        "gligen_coco": ("RamTagger", 0.25, 0.2, 0.5, None, "description"),
        "igligen": ("CaptionTagger", 0.2, 0.2, None, 512, "tag"),
        "rich_context": ("RamTagger", 0.25, 0.2, 0.5, None, "tag"),
    }[preset]
    detector = settings["detector"]
    thresholds = detector["box_threshold"], detector["text_threshold"], detector["nms"]
    assert (settings["tagger"]["part"], *thresholds, settings["square"], settings["phrase"]) == expected


def test_a_chain_without_a_detector_is_refused():
    cfg = compose("prepare", GIVEN)
    with pytest.raises(Exception, match="detector: none"):
        instantiate(cfg.stage, _convert_="all")
