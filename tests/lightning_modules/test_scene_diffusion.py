"""The shared step under a real Trainer: what trains, what a checkpoint holds, what loading refuses, how a run resumes."""

import math
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.batch import collate
from datamodules.loaders import PositionDataset
from datamodules.shards import write_shards
from datamodules.sources.base import Source
from datamodules.sources.shapes import Shapes
from lightning_modules.regions import Regions
from lightning_modules.scene_diffusion import SceneDiffusion
from loggers.metrics_csv import read_metrics
from models.backbones.stable_diffusion import StableDiffusion
from runtime.build import build_backbone, build_data, build_module, build_trainer
from runtime.restoring import load_module
from runtime.run_directory import RunDirectory

RARE = "surrounding"  # the backbone knows the word, and no caption of the shapes has it


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


class Marked(Source):
    """16 pictures of shapes; the caption of one has a word that no other has."""

    provides = Shapes.provides
    image_format = "png"
    chosen = 5

    def __len__(self):
        return 16

    def __iter__(self):
        for place, (scene, picture) in enumerate(Shapes(count=16)):
            if place == self.chosen:
                scene = type(scene).from_json({**scene.to_json(), "caption": f"{scene.caption} {RARE}"})
            yield scene, picture


class TestNonFinite:
    @pytest.fixture
    def training(self, short, tmp_path):
        """training(max_nonfinite): trainer, data and module of two batches, of which one has a scene that gives NaN."""
        write_shards(Marked(), tmp_path / "marked")

        def build(max_nonfinite):
            cfg = short(
                tmp_path / "run",
                f"data.shards={tmp_path / 'marked'}",
                "data.make=null",
                "callback=[]",
                "logger=[csv]",
                "trainer.max_steps=2",
                f"trainer.max_nonfinite={max_nonfinite}",
                "drops.keep=1",
                "drops.scene_only=0",
                "drops.caption_only=0",
                "drops.none=0",
                without=["callback", "data.make"],
            )
            module = build_module(cfg, backbone=build_backbone(cfg))
            tower = module.backbone.text.towers[0]
            [_, word, _] = tower.tokenizer(RARE)["input_ids"]
            with torch.no_grad():
                tower.encoder.get_input_embeddings().weight[word] = torch.nan
            return build_trainer(cfg), build_data(cfg), module

        return build

    def test_the_run_stops_and_names_the_scene(self, training):
        trainer, data, module = training(0)
        with pytest.raises(FloatingPointError) as stop:
            trainer.fit(module, datamodule=data)
        chosen = list(Shapes(count=16))[Marked.chosen][0].id
        assert f"is not finite for the scenes {chosen} (batch 1 of this kind, trainer.max_nonfinite=0)" in str(
            stop.value
        )
        assert "\n" not in str(stop.value)

    def test_as_many_batches_as_allowed_are_left_out_and_counted(self, training):
        trainer, data, module = training(1)
        with pytest.warns(UserWarning, match="the batch is left out, number 1 of 1"):
            trainer.fit(module, datamodule=data)
        assert trainer.global_step == 2
        assert module.nonfinite == 1
        assert all(value.isfinite().all() for value in module.average.state_dict().values())
        assert all(p.isfinite().all() for p in module.conditioning.parameters())
        losses = [value for _, name, value in read_metrics(trainer.loggers[0].file) if name == "train/loss"]
        assert sorted(map(math.isnan, losses)) == [False, True]
