"""What plan=true reckons: against a real step on the CPU, by doubling, and for the published recipes without their weights."""

import re

import pytest
import torch

from datamodules.batch import collate
from datamodules.loaders import PositionDataset
from runtime.build import build_data, build_module
from runtime.planning import DEVICES, dry_pass, planned, skeleton
from runtime.run_directory import RunError


def measured(module, batch):
    """Bytes that a real step keeps for its backward pass."""
    fixed = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.train()
        module.losses(batch, batch.positions.tolist(), drop=False).mean()
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("method", ["boxes", "regions"])
def test_what_is_kept_for_the_backward_pass_is_what_a_real_step_keeps(short, tmp_path, method):
    cfg = short(tmp_path / "run", f"conditioning={method}", without=["conditioning"])
    data = build_data(cfg)
    data.prepare_data()
    data.setup("fit")
    dataset = PositionDataset(data.training_set, data._transform)
    batch = collate([dataset[place] for place in range(4)])
    objects = max(len(scene.objects) for scene in batch.scenes)
    real = measured(build_module(cfg), batch)
    reckoned = dry_pass(skeleton(cfg), 4, objects=objects, pictures=True, half=False).saved
    assert reckoned == pytest.approx(real, rel=0.1)


def test_work_grows_with_the_samples_and_checkpointing_trades_it_for_memory(short, tmp_path):
    module = skeleton(short(tmp_path / "run"))
    one, two = (dry_pass(module, count, objects=3, pictures=False, half=True) for count in (2, 4))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.02)
    assert two.saved == pytest.approx(2 * one.saved, rel=0.05)
    frugal = skeleton(short(tmp_path / "run", "trainer.gradient_checkpointing=true"))
    less = dry_pass(frugal, 2, objects=3, pictures=False, half=True)
    assert less.saved < 0.7 * one.saved
    assert less.flops > 1.1 * one.flops
    whole = dry_pass(module, 2, objects=3, pictures=False, half=False)
    assert one.saved < 0.7 * whole.saved


def test_the_backward_pass_and_the_autoencoder_are_counted(composed):
    cfg = composed("experiment=gligen_coco_sd14", "backbone=tiny_sd15", "trainer=cpu", "data.shards=/nowhere")
    module = skeleton(cfg)
    latents, pictures = (dry_pass(module, 2, objects=2, pictures=given, half=True) for given in (False, True))
    assert pictures.flops > latents.flops
    assert pictures.saved == latents.saved  # the autoencoder is frozen


@pytest.mark.parametrize(
    ("experiment", "trained", "frozen"), [("gligen_coco_sd14", 209.1, 1066.2), ("sd15_sg_laion_sg", 13.4, 1066.2)]
)
def test_a_published_recipe_is_planned_without_its_weights_or_data(composed, tmp_path, experiment, trained, frozen):
    cfg = composed(f"experiment={experiment}", "data.shards=/nowhere", f"run={tmp_path / 'run'}", "plan=true")
    module, lines = planned(cfg)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert f"{trained} M trained, {frozen} M frozen" in lines
    assert re.search(r"memory +[\d.]+ of 80 GB on each, fits", lines)
    assert "no shards here" in lines
    assert not (tmp_path / "run").exists()


def test_time_and_memory_follow_the_device(composed):
    def told(*overrides):
        _, lines = planned(composed("experiment=sd15_sg_laion_sg", "data.shards=/nowhere", *overrides))
        return lines, float(re.search(r"([\d.]+) steps/s", lines)[1])

    lines, rate = told("planning.mfu=0.2")
    assert told("planning.mfu=0.4")[1] == pytest.approx(2 * rate, rel=0.01)
    ratio = DEVICES["h100"].peak / DEVICES["a100_80gb"].peak
    assert told("planning.mfu=0.2", "planning.device=h100")[1] == pytest.approx(ratio * rate, rel=0.01)
    tight, _ = told("planning.reserve=79e9")
    assert "DOES NOT FIT" in tight
    assert "DOES NOT FIT" not in lines


def test_what_does_not_divide_or_is_unknown_is_refused(composed):
    cfg = composed("experiment=gligen_coco_sd14", "data.shards=/nowhere", "planning.devices=7")
    with pytest.raises(RunError, match="batch_size=64: does not divide by 7 devices"):
        planned(cfg)
    with pytest.raises(ValueError, match="planning.device=abacus"):
        composed("planning.device=abacus")


def test_the_plan_of_what_is_here_compares_data_and_method(short, fit, tmp_path, capsys):
    module = fit(short(tmp_path / "run", "plan=true"))
    said = capsys.readouterr().out
    assert next(module.parameters()).is_meta
    assert "scenes in" in said
    assert "MB/s" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((), r"validates  on 8 scenes in .*validation"),
        (
            ("data.validation_shards=null", "data.make_validation=null"),
            r"validates  on 6 scenes held out of training: 6 of the 64 in .*train",
        ),
        (
            ("data.validation_shards=null", "data.make_validation=null", "data.validation_samples=0"),
            r"validates  on nothing",
        ),
        (("data.shards=/nowhere", "data.make=null"), r"validates  on all scenes in .*validation"),
        (
            ("data.shards=/nowhere", "data.make=null", "data.validation_shards=null", "data.validation_samples=7"),
            r"validates  on 7 scenes held out of training, at most a tenth",
        ),
    ],
)
def test_it_says_what_is_validated_on(short, fit, tmp_path, capsys, settings, told):
    set_null = [name for name in ("data.make", "data.make_validation") if f"{name}=null" in settings]
    fit(short(tmp_path / "run", "plan=true", *settings, without=set_null))
    assert len(re.findall(told, capsys.readouterr().out)) == 1
