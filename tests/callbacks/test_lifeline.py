"""A rank that dies takes the others with it, whatever they wait for; one that ends well does not."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import pytorch_lightning as pl
import torch

from callbacks.lifeline import Lifeline
from tests.ranks import free_port, place

GRACE = 1.0


class Step(pl.LightningModule):
    """One weight; in its second step rank 1 does what it is told, while rank 0 waits for nobody and would go on for minutes."""

    def __init__(self, death, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.death, self.folder = death, folder

    def training_step(self, batch, batch_index):
        if batch_index == 1 and self.death is not None:
            if self.global_rank == 0:
                time.sleep(120)
            (self.folder / "died").write_text(repr(time.time()))
            if self.death == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("of its own")
        return (self.weight - batch.mean()) ** 2

    def train_dataloader(self):
        workers = {"num_workers": 1, "multiprocessing_context": "fork"} if self.death == "killed" else {}
        return torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, **workers)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(rank, port, death, folder):
    sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
    os.environ.update(place(rank, port))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Lifeline(grace=GRACE)],
        default_root_dir=folder,
    )
    trainer.fit(Step(death, folder))


def run(folder, death):
    """Exit codes of both ranks, and when both had ended."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train, args=(rank, port, death, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    codes = [process.exitcode for process in processes]
    ended = time.time()
    for process in processes:
        process.kill()
    return codes, ended


@pytest.mark.parametrize("death", ["killed", "raised"])
def test_a_rank_that_dies_takes_the_other_with_it(death, tmp_path):
    codes, ended = run(tmp_path, death)
    assert codes == [1, -signal.SIGKILL if death == "killed" else 1]
    assert ended - float((tmp_path / "died").read_text()) < 30
    assert "rank 0: rank 1 has ended in the middle of the run, and says itself why" in (tmp_path / "0.err").read_text()
    own = (tmp_path / "1.err").read_text()
    assert ("RuntimeError: of its own" in own) is (death == "raised")
    assert "rank 0 has ended" not in own


def test_ranks_that_end_well_let_one_another_be(tmp_path):
    codes, _ = run(tmp_path, None)
    assert codes == [0, 0]
    assert not any("has ended" in file.read_text() for file in tmp_path.glob("*.err"))
