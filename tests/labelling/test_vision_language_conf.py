"""The config files of models that are asked, and of what asks them: each builds, and any model may be chosen for any asker."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from labelling.vision_language import VisionLanguage
from metrics.sg_iou import OpenSgIou, SgIou
from preparation.graphs import Graphs

CONF = Path(__file__).parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "vision_language").glob("*.yaml"))


def built(name, *overrides):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return instantiate(compose(name, ["+paths.data=data", *overrides]), _convert_="all")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_builds_and_says_its_settings(model):
    made = built(f"vision_language/{model}")["vision_language"]
    assert isinstance(made, VisionLanguage)
    json.dumps(made.settings())


@pytest.mark.parametrize("model", MODELS)
def test_every_asker_takes_every_model(model):
    closed = built("metric/sg_iou", f"vision_language@metric.sg_iou.model={model}")["metric"]["sg_iou"]
    opened = built("metric/sg_iou_open", f"vision_language@metric.sg_iou_open.model={model}")["metric"]["sg_iou_open"]
    stage = built("stage/graphs", f"vision_language@stage.model={model}")["stage"]
    assert (type(closed), type(opened), type(stage)) == (SgIou, OpenSgIou, Graphs)
    for asker in (closed, opened, stage):
        assert isinstance(asker.model, VisionLanguage)
        json.dumps(asker.settings())
    assert (closed.matching, opened.matching) == ("exact", "folded")
    assert "{entities}" not in opened.prompt


def test_the_published_judge_is_the_metrics_own():
    judge = built("metric/sg_iou")["metric"]["sg_iou"].settings()["judge"]
    assert (judge["model"], judge["sampling"]["temperature"], judge["sampling"]["seed"]) == ("gpt-4o", 0.7, 1234)
