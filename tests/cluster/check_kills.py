"""Kills at random moments: `make test-kill`, not part of `make test`. KILLS=N sets how many, 20 by default; SEED=N other moments.

Each attempt is killed with SIGKILL some steps after it has begun to train. The next has to go on from the newest checkpoint, and
the end has to be that of a run that nobody killed. And of two processes that torchrun has started one is killed, which ends both.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.runs import REPO, SMALL, difference, environment, steps_of, until

EVERY = 50
KILLS = int(os.environ.get("KILLS", 20))
SEED = int(os.environ.get("SEED", 0))
STEPS = EVERY * (KILLS + 2)  # an attempt passes one checkpoint, seldom two and as often none


def start(run: Path, data: Path, *more: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    settings = (f"run={run}", f"paths.data={data}", f"trainer.max_steps={STEPS}", f"trainer.save_every={EVERY}")
    return subprocess.Popen(
        [sys.executable, "train.py", *SMALL, *settings, "trainer.validate_every=70", "trainer.keep=2", *more],
        cwd=REPO,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def newest(run: Path) -> int:
    return max((int(file.stem.partition("=")[2]) for file in run.glob("checkpoints/step=*.ckpt")), default=0)


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    chosen = random.Random(SEED)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out, _ = start(whole, tmp_path / "data").communicate(timeout=1800)
    assert f"finished at step {STEPS}" in out, out
    for number in range(KILLS):
        before = newest(killed)
        process = start(killed, tmp_path / "data")
        target = before + chosen.randint(1, 2 * EVERY - 10)
        has_begun = False
        while process.poll() is None and not (has_begun and steps_of(killed) >= target):
            has_begun = (
                has_begun or steps_of(killed) <= before + 1
            )  # what was logged after the checkpoint is dropped first
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        time.sleep(chosen.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        went_on = re.search(r"goes on from step=(\d+)\.ckpt", out)
        assert (int(went_on[1]) if went_on else 0) == before, out
        lost = steps_of(killed) - newest(killed)
        assert lost <= EVERY + 1  # the checkpoint of a step is written when the next begins
        print(
            f"kill {number + 1}: went on from {before}, killed at {steps_of(killed)}, newest {newest(killed)}",
            flush=True,
        )
    before = newest(killed)
    out, _ = start(killed, tmp_path / "data").communicate(timeout=1800)
    assert f"goes on from step={before}.ckpt" in out
    assert f"finished at step {STEPS}" in out
    assert difference(whole, killed, STEPS) == ""
    print(
        f"{KILLS} kills, {KILLS} resumes from the newest checkpoint; figures, weights and moments equal at step {STEPS}"
    )


def rank_of(agent: int, rank: int) -> int:
    """The process that torchrun has started as this rank."""
    [found] = [
        int(child)
        for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text()
    ]
    return found


def test_a_rank_that_is_killed_takes_the_run_down_and_the_same_command_goes_on(tmp_path):
    run, two = tmp_path / "run", ("trainer.devices=2", "batch_size=4")
    process = start(run, tmp_path / "data", *two, stderr=subprocess.PIPE)
    until(process, lambda: steps_of(run) > EVERY)
    dying, left = rank_of(process.pid, 1), rank_of(process.pid, 0)
    began = time.monotonic()
    os.kill(dying, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode not in (0, 75)
    assert f"Signal 9 (SIGKILL) received by PID {dying}" in error
    assert not Path(f"/proc/{left}").exists()
    print(f"a killed rank ended the run in {time.monotonic() - began:.0f} s")
    process = start(run, tmp_path / "data", *two)
    until(process, lambda: steps_of(run) > EVERY + 20)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert f"goes on from step={EVERY}.ckpt" in out
    assert "(SIGTERM); the same command goes on" in out  # the status is torchrun's own
