"""Where a run starts, and with which optimizer, on real short runs."""

import pytest
import torch

from runtime.build import build_module
from runtime.run_directory import RunDirectory, RunError


def stored(cfg):
    return torch.load(RunDirectory(cfg.run).newest_checkpoint(), weights_only=True)


class TestStartFrom:
    def test_the_first_step_has_the_other_runs_weights_and_average(self, short, fit, short_run, tmp_path):
        before = stored(short_run[0])
        cfg = short(
            tmp_path / "next", f"start_from={short_run[0].run}", "trainer.max_steps=1", "optimizer.learning_rate=0"
        )
        fit(cfg)
        after = stored(cfg)
        weights = [key for key in before["state_dict"] if key.startswith("adapters.")]
        assert weights
        assert all(torch.equal(before["state_dict"][key], after["state_dict"][key]) for key in weights)
        assert after["global_step"] == 1

    @pytest.mark.parametrize("taken", [True, False])
    def test_the_optimizer_comes_along_on_request(self, short, fit, short_run, tmp_path, taken):
        settings = [f"start_from={short_run[0].run}", "trainer.max_steps=1", "optimizer.learning_rate=1e-9"]
        cfg = short(tmp_path / "next", *settings, *(["start_optimizer=true"] if taken else []))
        fit(cfg)
        optimizer = stored(cfg)["optimizer_states"][0]
        steps = stored(short_run[0])["global_step"] + 1 if taken else 1
        assert {float(state["step"]) for state in optimizer["state"].values()} == {steps}
        assert optimizer["param_groups"][0]["initial_lr"] == 1e-9

    def test_a_resumed_run_goes_on_from_its_own_checkpoint(self, short, fit, short_run, tmp_path):
        cfg = short(tmp_path / "next", f"start_from={short_run[0].run}", "trainer.max_steps=2", "trainer.save_every=1")
        fit(cfg)
        (last,) = (tmp_path / "next" / "checkpoints").glob("step=2.ckpt")
        whole = torch.load(last, weights_only=True)["state_dict"]
        last.unlink()
        (tmp_path / "next" / "finished.json").unlink()
        fit(cfg)
        again = stored(cfg)["state_dict"]
        assert all(torch.equal(whole[key], again[key]) for key in whole)

    def test_a_folder_without_a_run_is_refused_before_anything_is_made(self, short, fit, tmp_path):
        with pytest.raises(RunError, match=r"start_from=\S+nothing: no run with a checkpoint"):
            fit(short(tmp_path / "next", f"start_from={tmp_path / 'nothing'}"))
        assert not (tmp_path / "next").exists()

    def test_another_method_is_refused(self, short, fit, short_run, tmp_path):
        cfg = short(
            tmp_path / "next", f"start_from={short_run[0].run}", "conditioning=[boxes]", without=("conditioning",)
        )
        with pytest.raises(
            ValueError, match=r"start_from: .*its conditioning is \['regions'\], this run's is \['boxes'\]"
        ):
            fit(cfg)


class TestOptimizer:
    def test_a_fused_one_trains(self, short, fit, tmp_path):
        module = fit(short(tmp_path / "run", "optimizer=adamw_fused", "trainer.max_steps=1"))
        assert module.trainer.optimizers[0].defaults["fused"]

    def test_a_package_that_is_not_there_is_named(self, short, tmp_path):
        with pytest.raises(ValueError, match=r"no_such_package.Adam cannot be imported; install no_such_package"):
            build_module(short(tmp_path / "run", "optimizer._target_=no_such_package.Adam"))
