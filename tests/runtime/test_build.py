"""From configuration to objects: what the groups' own defaults build together."""

import pytest
from hydra.utils import instantiate

from runtime.composition import CONF, compose

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("backbone", ["shapes", "tiny_sd15", "tiny_sd21", "tiny_sdxl"])
def test_the_root_objective_is_the_own_prediction_of_every_backbone(backbone, composed, backbone_named):
    config = backbone_named(backbone).scheduler_config
    objective = instantiate(composed(f"backbone={backbone}").objective, scheduler_config=config)
    assert objective.prediction == config["prediction_type"].removesuffix("_prediction")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_objective_of_an_experiment_fits_its_backbone(experiment):
    cfg = compose("train", [f"experiment={experiment}"])
    assert "scheduler" in cfg.backbone, "read the backbone's prediction elsewhere"
    instantiate(cfg.objective, scheduler_config=cfg.backbone.scheduler)
