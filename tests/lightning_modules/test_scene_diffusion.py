"""The shared step under a real Trainer: what trains, what a checkpoint holds, what loading refuses, how a run resumes."""

import json
import math
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.batch import collate
from datamodules.loaders import PositionDataset
from lightning_modules.regions import Regions
from lightning_modules.scene_diffusion import SceneDiffusion
from loggers.metrics_csv import read_metrics
from models.backbones.stable_diffusion import StableDiffusion
from models.objectives import draw
from runtime.build import build_data, build_module, build_trainer
from runtime.restoring import load_module
from runtime.run_directory import RunDirectory


def stored(cfg, step=4):
    return torch.load(RunDirectory(cfg.run).checkpoints / f"step={step}.ckpt", weights_only=True)


def logged(cfg, name):
    rows = read_metrics(RunDirectory(cfg.run).path / "metrics.csv")
    return [(step, value) for step, metric, value in rows if metric == name]


def shown(cfg, name):
    """The points of a figure as TensorBoard shows them."""
    events = EventAccumulator(str(RunDirectory(cfg.run).path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def batch(short_run):
    """6 training samples at positions of their own."""
    cfg, _ = short_run
    data = build_data(cfg)
    dataset = PositionDataset(data.training_set, data._transform)
    return collate([dataset[place] for place in (3, 17, 40, 41, 8, 60)])


class TestStep:
    def test_the_method_names_its_module(self, short_run):
        assert type(short_run[1]) is Regions

    def test_the_adapter_has_learnt_and_the_backbone_has_not(self, short_run):
        cfg, module = short_run
        fresh = build_module(cfg)
        assert equal(fresh.backbone.state_dict(), module.backbone.state_dict())
        before = dict(fresh.conditioning.named_parameters())
        unmoved = [name for name, p in module.conditioning.named_parameters() if torch.equal(p, before[name])]
        assert not unmoved

    def test_the_loss_of_a_sample_does_not_depend_on_its_batch(self, short_run, batch):
        _, module = short_run
        keys = batch.positions.tolist()
        with torch.no_grad():
            together = module.losses(batch, keys)
            assert together.shape == (6,)
            for place in range(6):
                one = type(batch)(
                    batch.images[[place]], scenes=batch.scenes[[place]], positions=batch.positions[[place]]
                )
                torch.testing.assert_close(module.losses(one, keys[place : place + 1])[0], together[place])
            assert not torch.allclose(module.losses(batch, [key + 1 for key in keys]), together)

    def test_every_step_and_validation_are_logged(self, short_run):
        cfg, _ = short_run
        assert [step for step, _ in logged(cfg, "train/loss")] == [0, 1, 2, 3]
        assert len(logged(cfg, "validation/loss")) == 2

    def test_validation_draws_the_same_noise_every_time_and_drops_nothing(self, short_run, batch):
        _, module = short_run
        with torch.no_grad():
            keys = list(range(2**63, 2**63 + 6))
            first = module.losses(batch, keys, drop=False)
            assert torch.equal(module.losses(batch, keys, drop=False), first)
            module.drops, drops = type(module.drops)(keep=0.0, none=1.0), module.drops
            try:
                assert torch.equal(module.losses(batch, keys, drop=False), first)
                assert not torch.allclose(module.losses(batch, keys), first)
            finally:
                module.drops = drops

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
        boxes = (
            "conditioning=boxes",
            "conditioning.boxes.attention_loss=0.5",
            "conditioning.boxes.closed_by=projections",
        )
        cfg = short(tmp_path / "taught", *boxes, without=["conditioning"])
        module = fit(cfg)
        own, whole = (dict(logged(cfg, f"train/{name}")) for name in ("boxes", "loss"))
        assert len(own) == 4
        assert all(0 < own[step] < value for step, value in whole.items())
        plain = fit(short(tmp_path / "plain", *boxes[::2], without=["conditioning"]))
        plain.load_state_dict(module.state_dict())
        assert plain.trainer.callback_metrics.keys() & {"train/boxes"} == set()
        data = build_data(cfg)
        dataset = PositionDataset(data.training_set, data._transform)
        samples = collate([dataset[place] for place in (3, 17, 40)])
        keys = samples.positions.tolist()
        for training in (True, False):
            module.train(training), plain.train(training)
            with torch.no_grad():
                assert torch.equal(module.losses(samples, keys), plain.losses(samples, keys)) is not training

    def test_a_unet_that_inpaints_is_refused_before_the_first_batch(self, short, backbone_named, tmp_path):
        parts = backbone_named("tiny_sd15")
        unet = UNet2DConditionModel.from_config({**parts.unet.config, "in_channels": 9})
        towers = list(parts.text.towers)
        backbone = StableDiffusion(unet=unet, vae=parts.vae, towers=towers, scheduler_config=parts.scheduler_config)
        cfg = short(tmp_path / "run", "callback=[]", "logger=[csv]", without=["callback"])
        module, trainer = build_module(cfg, backbone=backbone), build_trainer(cfg)
        with pytest.raises(ValueError, match="^backbone: this UNet was trained to inpaint") as caught:
            trainer.fit(module, datamodule=build_data(cfg))
        assert "\n" not in str(caught.value)
        assert trainer.global_step == 0


class TestCheckpoint:
    def test_it_holds_adapter_average_optimizer_loop_and_position_but_nothing_frozen(self, short_run):
        cfg, module = short_run
        checkpoint = stored(cfg)
        assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"adapters", "average"}
        adapter = {key for key in checkpoint["state_dict"] if key.startswith("adapters.regions.")}
        assert len(adapter) == len(module.adapters["regions"].state_dict())
        assert checkpoint["global_step"] == 4
        assert checkpoint["SceneDataModule"] == {"batch_size": 8, "position": 32}
        trained = sum(p.numel() for p in module.conditioning.parameters())
        [optimizer] = checkpoint["optimizer_states"]
        assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == trained

    def test_it_is_loaded_whole(self, short_run):
        cfg, module = short_run
        loaded, path = load_module(cfg, None)
        assert path.name == "step=4.ckpt"
        assert equal(loaded.state_dict(), module.state_dict())
        assert not loaded.training

    @pytest.mark.parametrize("prefix", ["adapters.", "average."])
    def test_a_missing_key_is_refused(self, prefix, short_run):
        cfg, module = short_run
        checkpoint = stored(cfg)
        key = min(key for key in checkpoint["state_dict"] if key.startswith(prefix))
        del checkpoint["state_dict"][key]
        self.refused(module, checkpoint, f"checkpoint: misses 1 keys, first {key}; give")

    def test_an_unexpected_key_is_refused(self, short_run):
        cfg, module = short_run
        checkpoint = stored(cfg)
        checkpoint["state_dict"]["backbone.unet.conv_in.bias"] = torch.zeros(16)
        self.refused(module, checkpoint, "checkpoint: has unexpected 1 keys, first backbone.unet.conv_in.bias; give")

    def test_other_widths_are_refused(self, short_run, short, tmp_path):
        other = build_module(short(tmp_path / "wide", "conditioning.regions.width=20"))
        self.refused(other, stored(short_run[0]), r"(24, ")

    def test_another_method_is_refused(self, short_run, short, tmp_path):
        other = build_module(short(tmp_path / "none", "conditioning=none", without=["conditioning"]))
        message = (
            "checkpoint: its conditioning is ['regions'], this run's is []; give a checkpoint of this conditioning"
        )
        self.refused(other, stored(short_run[0]), message)

    def test_another_backbone_is_refused(self, short_run, backbone_named):
        backbone = backbone_named("tiny_sd15")
        other = build_module(short_run[0], backbone=backbone)
        try:
            message = "checkpoint: its backbone is ['ShapesBackbone', 12, 32], this run's is ['StableDiffusion', 4, 24]"
            self.refused(other, stored(short_run[0]), message)
        finally:
            other.conditioning.detach(backbone.unet)

    @staticmethod
    def refused(module, checkpoint, message):
        with pytest.raises(ValueError, match="^checkpoint: ") as refusal:
            module.on_load_checkpoint(checkpoint)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_resumed_at_step_2_of_4_it_ends_as_if_unbroken(short_run, short, fit, tmp_path):
    cfg, unbroken = short_run
    folder = tmp_path / "resumed"
    shutil.copytree(cfg.run, folder)
    (folder / "finished.json").unlink()
    for step in (3, 4):
        (folder / "checkpoints" / f"step={step}.ckpt").unlink()
    resumed_cfg = short(folder)
    assert RunDirectory(folder).inspect(resumed_cfg).step == 2
    resumed = fit(resumed_cfg)
    assert equal(resumed.state_dict(), unbroken.state_dict())
    for name in ("train/loss", "validation/loss", "gradient_norm"):
        assert logged(resumed_cfg, name) == logged(cfg, name)
        assert shown(resumed_cfg, name) == shown(cfg, name)
    ends = [stored(one)["optimizer_states"][0]["state"] for one in (cfg, resumed_cfg)]
    assert all(equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert RunDirectory(folder).finished_step() == 4


class TestNonFinite:
    """Of two steps of 8 samples one has a scene whose loss is NaN."""

    def fit(self, run):
        cfg, module, _ = run
        trainer = build_trainer(cfg)
        trainer.fit(module, datamodule=build_data(cfg))
        return trainer

    def lines(self, run):
        file = RunDirectory(run[0].run).path / "nonfinite.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def test_the_run_stops_and_names_the_scene(self, poisoned, tmp_path):
        run = poisoned(tmp_path / "run")
        with pytest.raises(FloatingPointError) as stop:
            self.fit(run)
        [scene] = run[2]
        message = str(stop.value)
        assert f"the loss at step {self.lines(run)[0]['step']} is not finite for the scenes {scene} (" in message
        assert "nonfinite.jsonl): 1 steps in a row, trainer.max_nonfinite=0; look at these scenes" in message
        assert "\n" not in message

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_the_step_is_left_out_whole_and_written_down(self, poisoned, tmp_path, accumulate):
        run = poisoned(tmp_path / "run", "trainer.max_nonfinite=1", f"trainer.accumulate={accumulate}")
        cfg, module, [scene] = run
        before = {name: p.clone() for name, p in module.conditioning.named_parameters()}
        with pytest.warns(UserWarning, match="the step is left out, number 1 of 1 in a row"):
            trainer = self.fit(run)
        [line] = self.lines(run)
        assert line["scene"] == scene
        assert (line["rank"], line["not_finite"], line["loss"]) == (0, "loss", "nan")
        assert line["position"] // 8 == line["step"]
        draws = draw(cfg.seed, [line["position"]], (12, 8, 8))
        assert line["noise_level"] == float(module.objective.times(draws))
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
        with pytest.warns(UserWarning, match="is left out"):
            assert self.fit(run).global_step == 6  # each of three passes has one such step
        assert len({line["step"] for line in self.lines(run)}) == 3
        everywhere = poisoned(tmp_path / "everywhere", "trainer.max_nonfinite=1", scenes=range(16))
        with (
            pytest.raises(FloatingPointError, match=": 2 steps in a row"),
            pytest.warns(UserWarning, match="is left out"),
        ):
            self.fit(everywhere)
        assert {line["step"] for line in self.lines(everywhere)} == {0, 1}

    def test_a_gradient_that_is_not_finite_leaves_the_step_out_too(self, poisoned, tmp_path):
        run = poisoned(tmp_path / "run", "trainer.max_nonfinite=1", scenes=())
        module = run[1]
        first = next(iter(module.conditioning.parameters()))
        first.register_hook(lambda gradient: gradient * (torch.nan if module.global_step == 1 else 1))
        with pytest.warns(UserWarning, match="the gradient at step 1 is not finite for the scenes"):
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
        cfg, module, _ = run = poisoned(tmp_path / "run", *settings)
        middle = RunDirectory(cfg.run).checkpoints / "step=2.ckpt"
        build_trainer(cfg).fit(module, datamodule=build_data(cfg), ckpt_path=middle, weights_only=True)
        assert self.lines(run) == written
        assert equal(module.conditioning.state_dict(), whole[1].conditioning.state_dict())
