"""From configuration to objects: what the groups' own defaults build together."""

import json

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from loggers.metrics_csv import read_metrics
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


def test_a_run_shorter_than_the_logging_interval_logs_its_last_step_without_a_warning(short, fit, tmp_path):
    # a warning of Lightning's would be an error here
    fit(
        short(
            tmp_path, "trainer.max_steps=3", "trainer.log_every=10", "callback=[]", "logger=[csv]", without=["callback"]
        )
    )
    assert [step for step, name, _ in read_metrics(tmp_path / "metrics.csv") if name == "train/loss"] == [2]


def scheduler_of(node):
    """The noise schedule of a backbone's node, without its weights."""
    if "scheduler" in node:
        return OmegaConf.to_container(node.scheduler)
    return json.loads((COMPONENTS / node.components / "scheduler" / "scheduler_config.json").read_text())
