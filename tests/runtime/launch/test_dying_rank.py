"""A rank that dies takes the other with it, also where no launcher ends it; `make test-kill` kills one of torchrun's."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import pytorch_lightning as pl
import torch

from tests.ranks import free_port, place


class Step(pl.LightningModule):
    """One weight; rank 1 dies in its second step, while rank 0 goes on to where it waits for its gradient."""

    def __init__(self, death, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.death, self.folder = death, folder

    def training_step(self, batch, batch_index):
        if batch_index == 1 and self.global_rank == 1:
            (self.folder / "died").write_text(repr(time.time()))
            if self.death == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("of its own")
        return (self.weight - batch.mean()) ** 2

    def train_dataloader(self):
        # a worker holds copies of its rank's connections
        workers = {"num_workers": 1, "multiprocessing_context": "fork"} if self.death == "killed" else {}
        return torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, **workers)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(rank, port, death, folder):
    sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
    os.environ.update(place(rank, port))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    pl.Trainer(**two, **quiet, max_steps=4, default_root_dir=folder).fit(Step(death, folder))


@pytest.mark.parametrize("death", ["killed", "raised"])
def test_a_rank_that_dies_takes_the_other_with_it(death, tmp_path):
    port, context = free_port(), multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(rank, port, death, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    ended, codes = time.time(), [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [1, -signal.SIGKILL if death == "killed" else 1]
    assert ended - float((tmp_path / "died").read_text()) < 30
    assert ("RuntimeError: of its own" in (tmp_path / "1.err").read_text()) is (death == "raised")
