"""`trainer=fsdp`: frozen weights in parts, and on two processes what one process trains, in the same checkpoints."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from runtime.composition import compose
from runtime.run_directory import RunDirectory
from runtime.sharding import share_out
from tests.cluster.runs import REPO, SMALL, logged


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_denoiser_in_parts_computes_the_same(mesh, short):
    from runtime.build import build_backbone

    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(short("unused"))
    backbone.freeze()
    unet = backbone.unet
    noised, times, prompt = (
        torch.randn(2, unet.config.in_channels, 8, 8),
        torch.tensor([3, 7]),
        backbone.encode_captions(["a", "b"]),
    )
    before = unet(noised, times, prompt.tokens).sample
    share_out(unet, mesh)
    assert all(isinstance(parameter, DTensor) for parameter in unet.parameters())
    assert torch.equal(unet(noised, times, prompt.tokens).sample, before)


def test_a_backbone_that_trains_is_refused(mesh):
    with pytest.raises(ValueError, match=r"trainer.strategy=fsdp: shares out what is frozen, .* take trainer=ddp"):
        share_out(torch.nn.Linear(2, 2), mesh)


def test_two_processes_train_what_one_does_and_one_goes_on(fit, tmp_path):
    settings = [*SMALL, f"paths.data={tmp_path / 'data'}", "optimizer.schedule=constant", "trainer.validate_every=2"]
    fit(compose("train", [*settings, f"run={tmp_path / 'one'}", "trainer.max_steps=6"]))
    shared = ["trainer.devices=2", "trainer.strategy=fsdp", f"run={tmp_path / 'two'}", "trainer.max_steps=4"]
    subprocess.run(
        [sys.executable, "train.py", *settings, *shared],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    stored = torch.load(RunDirectory(tmp_path / "two").newest_checkpoint(), weights_only=True)
    moments = stored["optimizer_states"][0]["state"]
    assert len(moments) == len(stored["optimizer_states"][0]["param_groups"][0]["params"])
    fit(compose("train", [*settings, f"run={tmp_path / 'two'}", "trainer.max_steps=6"]))
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, abs=1e-5)
