"""From configuration to objects: what the groups' own defaults build together."""

import json

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from models.backbones.stable_diffusion import COMPONENTS
from runtime.composition import CONF, compose

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("backbone", ["shapes", "tiny_sd15", "tiny_sd21", "tiny_sdxl"])
def test_the_root_objective_is_the_own_prediction_of_every_backbone(backbone, composed, backbone_named):
    config = backbone_named(backbone).scheduler_config
    objective = instantiate(composed(f"backbone={backbone}").objective, scheduler_config=config)
    assert objective.prediction == config.get("prediction_type", "epsilon").removesuffix("_prediction")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_objective_of_an_experiment_fits_its_backbone(experiment):
    cfg = compose("train", [f"experiment={experiment}"])
    instantiate(cfg.objective, scheduler_config=scheduler_of(cfg.backbone))


def scheduler_of(node):
    """The noise schedule of a backbone's node, without its weights."""
    if "scheduler" in node:
        return OmegaConf.to_container(node.scheduler)
    return json.loads((COMPONENTS / node.components / "scheduler" / "scheduler_config.json").read_text())
