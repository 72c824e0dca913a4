"""What TensorBoard itself reads from the event files of a run that was killed and resumed."""

import time

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loggers import TensorBoard


def log(folder, steps, *, rewind=None):
    """An attempt as a run makes it: the loss before a step, a score and a picture after every second one."""
    if folder.exists():
        time.sleep(1.01)  # TensorBoard orders files by the second, as another start of a run has it
    logger = TensorBoard(save_dir=folder, name="", version="tensorboard")
    if rewind is not None:
        logger.rewind(rewind)
    for step in steps:
        logger.log_metrics({"loss": 0.5**step}, step=step)
        if step % 2 == 1:
            logger.log_metrics({"score": float(step + 1)}, step=step + 1)
            logger.experiment.add_image("pictures", np.zeros((3, 2, 2)), step + 1)
    logger.experiment.flush()
    logger.experiment.close()


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in ("loss", "score")}
    return {**found, "pictures": [event.step for event in events.Images("pictures")]}


def test_a_resumed_run_has_each_point_once(tmp_path):
    log(tmp_path / "whole", range(8))
    log(tmp_path / "killed", range(6), rewind=0)  # a new run has nothing to rewind
    log(tmp_path / "killed", range(4, 7), rewind=4)
    log(tmp_path / "killed", range(2, 8), rewind=2)
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    assert [step for step, _ in read(tmp_path / "whole")["loss"]] == list(range(8))


def test_a_torn_end_is_passed_over(tmp_path):
    log(tmp_path / "whole", range(6))
    log(tmp_path / "killed", range(5))
    [file] = (tmp_path / "killed" / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    log(tmp_path / "killed", range(2, 6), rewind=2)
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
