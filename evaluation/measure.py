"""The third stage of an evaluation: the rows of its metrics, each process its share, one metric's models at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from evaluation.conditions import Arm, measured_arms
from evaluation.image_sets import PictureSet
from evaluation.plan import Evaluation
from evaluation.rows import RowStore, row_keys, scene_marks, store_name, unmeasured
from metrics.base import Metric, NotAvailable
from scenes import Scene


def measure_arms(evaluation: Evaluation, arms: Mapping[str, Arm]) -> None:
    """Measure what is this process's share of all metrics' rows and is not on disk.

    Args:
        evaluation: What is measured; a metric whose model cannot be had is noted in it.
        arms: The pictures by arm.
    """
    with evaluation.timed("measuring"):
        for name in evaluation.nodes:
            if name not in evaluation.not_measured:
                _measure_one(evaluation, name, arms)


def measure(
    metric: Metric,
    scenes: Sequence[Scene],
    sets: Sequence[PictureSet],
    store: RowStore,
    *,
    keys: Sequence[str | None],
    batches: Sequence[range],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Makes the rows of some batches, each measured whole: its rounding then does not depend on what was there before.

    Args:
        metric: On its device.
        scenes: All scenes.
        sets: As `row_keys` takes them.
        store: Where the rows go.
        keys: Of all scenes; one without a key, whose pictures are not there, is passed over.
        batches: The places to see to.
        progress: Called with the number of places of each batch that is done.

    Raises:
        ValueError: The metric gave another number of rows than pictures.
    """
    for batch in batches:
        places = [place for place in batch if keys[place] is not None]
        images, *again = ([pictures.read(place) for place in places] for pictures in sets)
        rows = metric.measure(images, [scenes[place] for place in places], again=again[0] if again else ())
        if len(rows) != len(places):
            raise ValueError(f"metric {metric.name}: {len(rows)} rows for {len(places)} pictures; give one for each")
        store.append({str(keys[place]): row for place, row in zip(places, rows, strict=True)})
        if progress is not None:
            progress(len(batch))


def _measure_one(evaluation: Evaluation, name: str, arms: Mapping[str, Arm]) -> None:
    """Makes the rows of a metric that are this process's share and are not on disk."""
    scenes, marks = evaluation.split.scenes, scene_marks(evaluation.split.scenes)
    try:
        metric = evaluation.metric(name)
        for arm in measured_arms(metric, arms, evaluation.protocol["arms"]):
            store = RowStore(arm.rows / store_name(name, metric), writer=str(evaluation.ranks.rank))
            for sets in arm.scored(metric):
                keys = row_keys(marks, sets)
                todo = unmeasured(store, keys, evaluation.batches)
                if not todo:
                    continue
                metric = metric.to(evaluation.device)
                with evaluation.bar(sum(map(len, todo)), f"{name} {arm.name}", "picture") as bar:
                    measure(metric, scenes, sets, store, keys=keys, batches=todo, progress=bar.update)
    except NotAvailable as error:
        evaluation.leave_out(name, error)
    finally:
        metric = None  # its models go before those of the next come
        if evaluation.device.type == "cuda":
            torch.cuda.empty_cache()
