"""`trainer=fsdp`: frozen weights in parts, and on two processes what one process trains, in the same checkpoints."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from runtime.composition import compose
from runtime.launch.sharding import share_out
from runtime.run_directory import RunDirectory
from tests.cluster.runs import SMALL
from tests.forked import Forked
from tests.ranks import free_port, place


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
    fit(compose("train", [*settings, f"run={tmp_path / 'one'}", "trainer.max_steps=6", "trainer.save_every=4"]))
    shared = ["trainer.devices=2", "trainer.strategy=fsdp", f"run={tmp_path / 'two'}", "trainer.max_steps=4"]
    port = free_port()
    ranks = [
        Forked("train.py", *settings, *shared, environment={**os.environ, "OMP_NUM_THREADS": "1", **place(rank, port)})
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    fit(compose("train", [*settings, f"run={tmp_path / 'two'}", "trainer.max_steps=6"]))
    for step in (4, 6):
        one, two = (stored(tmp_path / name, step) for name in ("one", "two"))
        assert one["state_dict"].keys() == two["state_dict"].keys()
        torch.testing.assert_close(two["state_dict"], one["state_dict"], atol=1e-5, rtol=0)
        moments = [end["optimizer_states"][0]["state"] for end in (one, two)]  # those of both ranks
        assert moments[0].keys() == moments[1].keys() != set()
        torch.testing.assert_close(moments[1], moments[0], atol=1e-5, rtol=0)


def stored(run, step):
    return torch.load(RunDirectory(run).checkpoints / f"step={step}.ckpt", weights_only=True)
