"""Real processes that train together over gloo, as torchrun would start them: forked, so that nothing is imported again."""

import multiprocessing
import os
import socket
import traceback

from metrics.base import SceneMetric


class Brightness(SceneMetric):
    """A metric that tells any two pictures apart, also those of a backbone that draws nothing yet."""

    name = "brightness"
    columns = ("brightness",)

    def score(self, image, scene):
        return {"brightness": float(image.mean())}


def on_ranks(work, count=2, *, timeout=1500):
    """What `work(rank)` gives in each of some processes that share a process group; the first error of any is raised.

    Args:
        work: called in all; what it gives is pickled.
        count: of processes.
        timeout: s for all of it.

    Returns:
        The results by rank.
    """
    port = free_port()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(place(rank, port, count), work, results)) for rank in range(count)]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < count:
            rank, error, result = results.get(timeout=timeout)
            if error is not None:
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == count else 0.1)
            process.kill()
    return [found[rank] for rank in range(count)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def place(rank, port, count=2):
    """What torchrun tells a process of some on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }


def _rank(said, work, results):
    os.environ.update(said)
    rank = int(said["RANK"])
    try:
        results.put((rank, None, work(rank)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
