"""Two real processes that train together over gloo, as torchrun would start them: forked, so that nothing is imported again."""

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


def on_two_ranks(work, *, timeout=1500):
    """What `work(rank)` gives in each of two processes that share a process group; the first error of either is raised.

    Args:
        work: called in both; what it gives is pickled.
        timeout: s for all of it.

    Returns:
        The results of rank 0 and rank 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, work, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < 2:
            rank, error, result = results.get(timeout=timeout)
            if error is not None:
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == 2 else 0.1)
            process.kill()
    return found[0], found[1]


def place(rank, port):
    """What torchrun tells a process of two on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }


def _rank(rank, port, work, results):
    os.environ.update(place(rank, port))
    try:
        results.put((rank, None, work(rank)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
