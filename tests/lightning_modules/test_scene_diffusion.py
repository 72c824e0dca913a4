"""The shared step under a real Trainer: what trains, what a checkpoint holds, what loading refuses, how a run resumes."""

import json
import math
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.batch import collate
from datamodules.loaders import PositionDataset
from lightning_modules.regions import Regions
from lightning_modules.scene_diffusion import SceneDiffusion
from models.backbones.stable_diffusion import StableDiffusion
from models.objectives import draw
from runtime.build import build_data, build_module, build_trainer
from runtime.restoring import load_module
from runtime.run_directory import RunDirectory
from tests.run_files import broken_off, equal, equal_moments, folder_of, logged, moments, stored


def shown(cfg, name):
    """The points of a figure as TensorBoard shows them."""
    events = EventAccumulator(str(folder_of(cfg) / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def batch_of(cfg, *places):
    """Training samples at positions of their own."""
    data = build_data(cfg)
    dataset = PositionDataset(data.training_set, data._transform)
    return collate([dataset[place] for place in places])


@pytest.fixture(scope="module")
def batch(short_run):
    return batch_of(short_run[0], 3, 17, 40, 41, 8, 60)


class TestStep:
    def test_the_adapter_has_learnt_and_the_backbone_has_not(self, short_run):
        cfg, module = short_run
        assert type(module) is Regions  # the method names its module
        fresh = build_module(cfg)
        assert equal(fresh.backbone.state_dict(), module.backbone.state_dict())
        before = dict(fresh.conditioning.named_parameters())
        assert not [name for name, p in module.conditioning.named_parameters() if torch.equal(p, before[name])]

    def test_the_loss_of_a_sample_does_not_depend_on_its_batch(self, short_run, batch):
        _, module = short_run
        keys = batch.positions.tolist()
        with torch.no_grad():
            together = module.losses(batch, keys)
            assert together.shape == (6,)
            for n in range(6):
                one = type(batch)(batch.images[[n]], scenes=batch.scenes[[n]], positions=batch.positions[[n]])
                torch.testing.assert_close(module.losses(one, keys[n : n + 1])[0], together[n])
            assert not torch.allclose(module.losses(batch, [key + 1 for key in keys]), together)

    def test_validation_draws_the_same_noise_every_time_and_drops_nothing(self, short_run, batch, monkeypatch):
        _, module = short_run
        keys = list(range(2**63, 2**63 + 6))
        with torch.no_grad():
            first = module.losses(batch, keys, drop=False)
            assert torch.equal(module.losses(batch, keys, drop=False), first)
            monkeypatch.setattr(module, "drops", type(module.drops)(keep=0.0, none=1.0))
            assert torch.equal(module.losses(batch, keys, drop=False), first)
            assert not torch.allclose(module.losses(batch, keys), first)

    def test_averaged_weights_are_lent_and_given_back(self, short_run):
        _, module = short_run
        present = {name: p.clone() for name, p in module.conditioning.named_parameters()}
        mean = dict(module.average.average.module.named_parameters())
        module.train()
        with module.averaged():
            assert not any(part.training for part in module.modules())
            assert equal(dict(module.conditioning.named_parameters()), mean)
        assert module.training
        assert not module.backbone.unet.training
        assert equal(dict(module.conditioning.named_parameters()), present)
        assert not equal(present, mean)

    def test_without_adapters_the_backbone_trains(self, short, batch, tmp_path):
        module = build_module(short(tmp_path / "none", "conditioning=none", without=["conditioning"]))
        assert type(module) is SceneDiffusion
        module.losses(batch, batch.positions.tolist()).mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.backbone.unet.parameters())
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"backbone", "average"}
        module.on_load_checkpoint(checkpoint)

    def test_a_loss_of_the_method_is_added_in_training_alone_and_logged(self, short, fit, tmp_path):
        boxes = ("conditioning=boxes", "conditioning.boxes.closed_by=projections")
        taught = short(tmp_path / "taught", *boxes, "conditioning.boxes.attention_loss=0.5", without=["conditioning"])
        module = fit(taught)
        own, whole = (dict(logged(taught, f"train/{name}")) for name in ("boxes", "loss"))
        assert len(own) == 4
        assert all(0 < own[step] < value for step, value in whole.items())
        plain = fit(short(tmp_path / "plain", *boxes, without=["conditioning"]))
        plain.load_state_dict(module.state_dict())
        assert "train/boxes" not in plain.trainer.callback_metrics
        samples = batch_of(taught, 3, 17, 40)
        for training in (True, False):
            module.train(training), plain.train(training)
            with torch.no_grad():
                with_it, without = (each.losses(samples, samples.positions.tolist()) for each in (module, plain))
            assert torch.equal(with_it, without) is not training

    def test_a_unet_that_inpaints_is_refused_before_the_first_batch(self, short, backbone_named, tmp_path):
        parts = backbone_named("tiny_sd15")
        unet = UNet2DConditionModel.from_config({**parts.unet.config, "in_channels": 9})
        given = {"vae": parts.vae, "towers": list(parts.text.towers), "scheduler_config": parts.scheduler_config}
        cfg = short(tmp_path / "run", "callback=[]", "logger=[csv]", without=["callback"])
        module, trainer = build_module(cfg, backbone=StableDiffusion(unet=unet, **given)), build_trainer(cfg)
        with pytest.raises(ValueError, match=r"^backbone: [^\n]*inpaint[^\n]*$"):
            trainer.fit(module, datamodule=build_data(cfg))
        assert trainer.global_step == 0


class TestCheckpoint:
    def test_it_holds_adapter_average_optimizer_loop_and_position_but_nothing_frozen(self, short_run):
        cfg, module = short_run
        checkpoint = stored(cfg, 4)
        assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"adapters", "average"}
        adapter = {key for key in checkpoint["state_dict"] if key.startswith("adapters.regions.")}
        assert len(adapter) == len(module.adapters["regions"].state_dict())
        assert checkpoint["global_step"] == 4
        assert checkpoint["SceneDataModule"] == {"batch_size": 8, "position": 32}
        trained = sum(p.numel() for p in module.conditioning.parameters())
        assert sum(state["exp_avg"].numel() for state in moments(checkpoint).values()) == trained

    def test_it_is_loaded_whole(self, short_run):
        cfg, module = short_run
        loaded, path = load_module(cfg, None)
        assert path.name == "step=4.ckpt"
        assert equal(loaded.state_dict(), module.state_dict())
        assert not loaded.training

    @pytest.mark.parametrize("prefix", ["adapters.", "average."])
    def test_a_missing_key_is_refused(self, prefix, short_run):
        checkpoint = stored(short_run[0], 4)
        key = min(key for key in checkpoint["state_dict"] if key.startswith(prefix))
        del checkpoint["state_dict"][key]
        refused(short_run[1], checkpoint, f"1 keys, first {key}")

    def test_an_unexpected_key_is_refused(self, short_run):
        checkpoint = stored(short_run[0], 4)
        checkpoint["state_dict"]["backbone.unet.conv_in.bias"] = torch.zeros(16)
        refused(short_run[1], checkpoint, "1 keys, first backbone.unet.conv_in.bias")

    @pytest.mark.parametrize(
        ("overrides", "without", "named"),
        [
            (("conditioning.regions.width=20",), (), ("(24, ", "(20, ")),
            (("conditioning=none",), ("conditioning",), ("conditioning", "['regions']", "[]")),
        ],
        ids=["widths", "method"],
    )
    def test_those_of_another_method_are_refused(self, short_run, short, tmp_path, overrides, without, named):
        refused(build_module(short(tmp_path, *overrides, without=without)), stored(short_run[0], 4), *named)

    def test_that_of_another_backbone_is_refused(self, short_run, backbone_named):
        backbone = backbone_named("tiny_sd15")
        other = build_module(short_run[0], backbone=backbone)
        try:
            named = ("backbone", "['ShapesBackbone', 12, 32]", "['StableDiffusion', 4, 24]")
            refused(other, stored(short_run[0], 4), *named)
        finally:
            other.conditioning.detach(backbone.unet)


def refused(module, checkpoint, *named):
    with pytest.raises(ValueError, match="^checkpoint: .*" + ".*".join(map(re.escape, named))) as refusal:
        module.on_load_checkpoint(checkpoint)
    assert "\n" not in str(refusal.value)


def test_resumed_at_step_2_of_4_it_ends_as_if_unbroken(short_run, short, fit, tmp_path):
    cfg, unbroken = short_run
    broken_off(cfg, tmp_path / "resumed", 2)
    resumed_cfg = short(tmp_path / "resumed")
    assert RunDirectory(resumed_cfg.run).inspect(resumed_cfg).step == 2
    resumed = fit(resumed_cfg)
    assert equal(resumed.state_dict(), unbroken.state_dict())
    for name in ("train/loss", "validation/loss", "gradient_norm"):
        assert logged(resumed_cfg, name) == logged(cfg, name)
        assert shown(resumed_cfg, name) == shown(cfg, name)
    assert equal_moments(stored(cfg, 4), stored(resumed_cfg, 4))
    assert RunDirectory(resumed_cfg.run).finished_step() == 4


class TestNonFinite:
    """Of two steps of 8 samples one has a scene whose loss is NaN."""

    def fit(self, run, **given):
        cfg, module, _ = run
        trainer = build_trainer(cfg)
        trainer.fit(module, datamodule=build_data(cfg), **given)
        return trainer

    def lines(self, run):
        return [json.loads(line) for line in (folder_of(run[0]) / "nonfinite.jsonl").read_text().splitlines()]

    def test_the_run_stops_and_names_the_scene(self, poisoned, tmp_path):
        run = poisoned(tmp_path / "run")
        with pytest.raises(FloatingPointError) as stop:
            self.fit(run)
        [scene] = run[2]
        step, rest = self.lines(run)[0]["step"], r"[^\n]*nonfinite\.jsonl[^\n]*trainer\.max_nonfinite=0[^\n]*"
        assert re.fullmatch(rf"the loss at step {step} [^\n]*{re.escape(scene)} {rest}", str(stop.value))

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_the_step_is_left_out_whole_and_written_down(self, poisoned, tmp_path, accumulate):
        run = poisoned(tmp_path / "run", "trainer.max_nonfinite=1", f"trainer.accumulate={accumulate}")
        cfg, module, [scene] = run
        before = {name: p.clone() for name, p in module.conditioning.named_parameters()}
        with pytest.warns(UserWarning, match="left out, number 1 of 1"):
            trainer = self.fit(run)
        [line] = self.lines(run)
        draws = draw(cfg.seed, [line["position"]], (12, 8, 8))
        level = float(module.objective.times(draws))
        expected = {"scene": scene, "rank": 0, "not_finite": "loss", "loss": "nan", "noise_level": level}
        assert line == expected | {"step": line["position"] // 8, "position": line["position"]}
        assert trainer.global_step == 2
        assert int(module.average.average.n_averaged) == 1
        assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {1}
        moved = dict(module.conditioning.named_parameters())
        assert all(p.isfinite().all() for p in moved.values())
        assert not all(torch.equal(p, before[name]) for name, p in moved.items())  # the other step was taken
        losses = dict(logged(cfg, "train/loss"))
        assert [math.isnan(losses[step]) for step in (0, 1)] == [line["step"] == 0, line["step"] == 1]

    def test_only_steps_in_a_row_count(self, poisoned, tmp_path):
        run = poisoned(tmp_path / "run", "trainer.max_nonfinite=2", "trainer.max_steps=6")
        with pytest.warns(UserWarning, match="left out"):
            assert self.fit(run).global_step == 6  # each of three passes has one such step
        assert len({line["step"] for line in self.lines(run)}) == 3
        everywhere = poisoned(tmp_path / "everywhere", "trainer.max_nonfinite=1", scenes=range(16))
        with pytest.raises(FloatingPointError, match=": 2 steps"), pytest.warns(UserWarning, match="left out"):
            self.fit(everywhere)
        assert {line["step"] for line in self.lines(everywhere)} == {0, 1}

    def test_a_gradient_that_is_not_finite_leaves_the_step_out_too(self, poisoned, tmp_path):
        run = poisoned(tmp_path / "run", "trainer.max_nonfinite=1", scenes=())
        module = run[1]
        first = next(iter(module.conditioning.parameters()))
        first.register_hook(lambda gradient: gradient * (torch.nan if module.global_step == 1 else 1))
        with pytest.warns(UserWarning, match="the gradient at step 1 .*left out"):
            self.fit(run)
        lines = self.lines(run)
        assert sorted(line["position"] for line in lines) == list(range(8, 16))
        assert {line["not_finite"] for line in lines} == {"gradient"}
        assert all(math.isfinite(float(line["loss"])) for line in lines)
        assert all(p.isfinite().all() for p in module.conditioning.parameters())

    @pytest.mark.filterwarnings("ignore:the loss at step:UserWarning")
    def test_a_resumed_run_writes_each_step_down_once(self, poisoned, tmp_path):
        settings = ("trainer.max_nonfinite=2", "trainer.max_steps=4", "callback=[checkpoint]", "trainer.save_every=1")
        whole = poisoned(tmp_path / "run", *settings)
        self.fit(whole)
        written = self.lines(whole)
        run = poisoned(tmp_path / "run", *settings)
        middle = RunDirectory(run[0].run).checkpoints / "step=2.ckpt"
        self.fit(run, ckpt_path=middle, weights_only=True)
        assert self.lines(run) == written
        assert equal(run[1].conditioning.state_dict(), whole[1].conditioning.state_dict())
