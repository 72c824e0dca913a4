"""From configuration to objects: what the groups' own defaults build together."""

import json

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from loggers.metrics_csv import read_metrics
from models.backbones.stable_diffusion import COMPONENTS
from models.conditioning.base import Conditioning
from runtime.build import build_module
from runtime.composition import CONF, compose

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("backbone", ["shapes", "tiny_sd15", "tiny_sd21", "tiny_sdxl"])
def test_the_root_objective_is_the_own_prediction_of_every_backbone(backbone, composed, backbone_named):
    config = backbone_named(backbone).scheduler_config
    objective = instantiate(composed(f"backbone={backbone}").objective, scheduler_config=config)
    assert objective.prediction == config.get("prediction_type", "epsilon").removesuffix("_prediction")


def test_weight_decay_may_be_kept_from_what_has_one_axis(composed, backbone_named):
    backbone = backbone_named("tiny_sdxl")
    for overrides, decays in (((), [0.2]), (("optimizer.decay_vectors=false",), [0.2, 0.0])):
        cfg = composed("conditioning=[scene_graph]", "optimizer.weight_decay=0.2", *overrides)
        module = build_module(cfg, backbone=backbone)
        module.conditioning.detach(backbone.unet)
        groups = module.optimization.optimizer(list(module.trained.parameters())).param_groups
        assert [group["weight_decay"] for group in groups] == decays
        assert sum(len(group["params"]) for group in groups) == len(list(module.trained.parameters()))
    assert all(parameter.ndim < 2 for parameter in groups[1]["params"])
    assert any(
        parameter is module.conditioning.named["scene_graph"].encoder.alpha_obj for parameter in groups[1]["params"]
    )


def test_a_drop_rate_for_a_method_that_is_not_there_is_refused(composed, backbone_named):
    cfg = composed("conditioning=[scene_graph]", "drops.methods={boxes: 0.1}")
    with pytest.raises(ValueError, match=r"drops.methods.boxes: no method of this run \(have: scene_graph\); name one"):
        build_module(cfg, backbone=backbone_named("tiny_sdxl"))
    backbone_named("tiny_sdxl").requires_grad_(False)
    Conditioning.detach(backbone_named("tiny_sdxl").unet)


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


def test_a_run_from_before_a_setting_was_there_still_opens(short, tmp_path):
    content = OmegaConf.to_container(short(tmp_path), resolve=True)
    for group, key in (("optimizer", "decay_vectors"), ("drops", "methods"), ("trainer", "micro_batch")):
        del content[group][key]
    del content["module"]
    build_module(OmegaConf.create(content))


def scheduler_of(node):
    """The noise schedule of a backbone's node, without its weights."""
    if "scheduler" in node:
        return OmegaConf.to_container(node.scheduler)
    return json.loads((COMPONENTS / node.components / "scheduler" / "scheduler_config.json").read_text())
