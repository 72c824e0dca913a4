"""What `evaluate.py` does once its configuration is checked: restore the weights, draw, measure, report.

Each arm is a set of pictures for the same scenes: drawn with the scene, drawn without it, the true pictures (ceiling) and
true pictures of other scenes (floor), or pictures that something else made. Any number of processes share the work and none waits
for another: each draws and measures its batches of scenes, and whichever finds everything there at its end writes the report.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from evaluation.generation import NOT_REFINED, generate, refine
from evaluation.manifest import Manifest
from evaluation.measuring import RowStore, batches_of, gathered, measure, row_keys, scene_marks, store_name, unmeasured
from evaluation.picture_sets import Folder, Generated, PictureSet, Turned
from evaluation.scene_scores import SceneScores
from metrics.base import Metric, NotAvailable, Row
from runtime.build import build_refiner
from runtime.device import device_of, place_rank, placed
from runtime.evaluation_report import About, write_outcome
from runtime.evaluation_settings import Places, places_of, protocol_of
from runtime.ranks import Ranks, ranks_of
from runtime.restoring import load_module, picture_settings, weights_hash
from runtime.scene_split import SceneSplit, made_shards, split_of_files, split_of_shards, square_transform

if TYPE_CHECKING:
    from scenes import Scene

__all__ = ["evaluate", "load_module", "open_split"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Pictures of all scenes of a split.

    Attributes:
        name: One of `evaluation.wording.ARMS`.
        sets: The pictures, a set a seed.
        rows: Folder of what metrics keep of them.
    """

    name: str
    sets: tuple[PictureSet, ...]
    rows: Path

    def scored(self, metric: Metric) -> list[tuple[PictureSet, ...]]:
        """What the metric takes row by row: a set, or two of them."""
        return [self.sets[:2]] if metric.pairs else [(pictures,) for pictures in self.sets]


@dataclass(kw_only=True)
class Evaluation:
    """One evaluation, as one process sees it.

    Attributes:
        protocol: As `protocol_of` gives it.
        split: The scenes.
        ranks: Which process this is.
        places: Where things go.
        device: Where metrics work.
        nodes: The metrics' configuration by name.
        not_measured: Why a metric gives no value, by name.
        seconds: What took how long in this process.
    """

    protocol: Mapping[str, Any]
    split: SceneSplit
    ranks: Ranks
    places: Places
    device: torch.device
    nodes: Mapping[str, Any]
    not_measured: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def batches(self) -> list[range]:
        """This process's batches of places."""
        return self.ranks.share(batches_of(len(self.split.scenes), self.protocol["batch_size"]))

    def metric(self, name: str) -> Metric:
        """A metric as its configuration says; its models are not loaded yet."""
        try:
            return instantiate(self.nodes[name], _convert_="all")
        except InstantiationException as error:
            if isinstance(error.__cause__, NotAvailable):
                raise error.__cause__ from error
            raise

    def leave_out(self, name: str, reason: object) -> None:
        """Notes and says that a metric gives no value."""
        self.not_measured[name] = " ".join(str(reason).split())
        print(f"{name}: not measured: {self.not_measured[name]}", flush=True)

    def bar(self, total: int, what: str, unit: str) -> tqdm:
        """A progress bar, of the first process alone."""
        return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=self.ranks.rank > 0)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds that the block takes."""
        start = time.monotonic()
        yield
        self.seconds[what] = round(self.seconds.get(what, 0.0) + time.monotonic() - start, 2)


def evaluate(
    cfg: DictConfig,
    run_cfg: DictConfig | None,
    *,
    job: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Draws or reads pictures, scores them beside ceiling and floor, and writes `metrics.json` and `report.html`.

    Args:
        cfg: What `evaluate.py` was asked for.
        run_cfg: What pictures are drawn with, as `evaluated_config` gives it; None where pictures are given.
        job: The name of a sweep's job.
        environment: Tells this process's rank.

    Returns:
        What `metrics.json` has, and "out", its folder; where other processes still have something to make, "out" and
        "pending", how many pictures or rows.

    Raises:
        ValueError: The split cannot be read, or pictures are missing or of other settings.
    """
    ranks = ranks_of(environment)
    if run_cfg is not None:
        place_rank(run_cfg, ranks)
    protocol = protocol_of(cfg)
    if cfg.images is not None and cfg.refiner is not None:
        raise ValueError(f"refiner: images={cfg.images} are scored as they are; leave the refiner out")
    job_of = Evaluation(
        protocol=protocol,
        split=open_split(cfg, run_cfg, ranks),
        ranks=ranks,
        places=places_of(cfg, job),
        device=_device(run_cfg, ranks),
        nodes=cfg.metric,
    )
    _leave_out_at_once(job_of, one_seed=cfg.images == "real")
    arms, about = _arms(cfg, run_cfg, job_of)
    with job_of.timed("measuring"):
        for name in cfg.metric:
            if name not in job_of.not_measured:
                _measure(job_of, name, arms)
    pending = _reloaded(arms, job_of)
    if pending:
        return {"out": job_of.places.out, "pending": pending}
    with job_of.timed("computing"):
        values, scores, failures, pending = _values(job_of, arms)
    if pending:
        return {"out": job_of.places.out, "pending": pending}
    for arm in arms.values():
        for pictures in arm.sets:
            if isinstance(pictures, Generated):
                pictures.manifest.finish()
    if cfg.references is not None:
        _keep_references(Path(cfg.references), job_of, arms)
    shown = {name: arm.sets[0] for name, arm in arms.items()}
    return write_outcome(cfg, run_cfg, job_of, about, values=values, scores=scores, failures=failures, pictures=shown)


def open_split(cfg: DictConfig, run_cfg: DictConfig | None, ranks: Ranks | None = None) -> SceneSplit:
    """The scenes of an evaluation: those of `scenes`, else of the protocol's shards, which are made where it says how.

    Args:
        cfg: What `evaluate.py` was asked for.
        run_cfg: What pictures are drawn with: scenes become square as its data did, at its pictures' size. None: as the
            protocol says.
        ranks: Which process this is; None is the only one.

    Returns:
        The split.

    Raises:
        ValueError: There are fewer scenes than are asked for, or more than the protocol's filter leaves.
    """
    protocol = protocol_of(cfg)
    data = {} if run_cfg is None else run_cfg.data
    size = protocol["size"] if run_cfg is None else run_cfg.backbone.get("resolution")
    transform = square_transform(data, size, protocol["transform"])
    if cfg.scenes is not None:
        return split_of_files(cfg.scenes, transform, count=protocol["scenes"])
    made_shards(instantiate(cfg.protocol, _convert_="all"), ranks or Ranks())
    split = split_of_shards(protocol["shards"], transform, count=protocol["scenes"])
    if protocol["expected"] is not None and split.whole > protocol["expected"]:
        raise ValueError(
            f"protocol.expected: {protocol['shards']} holds {split.whole} scenes, and {protocol['name']} has "
            f"{protocol['expected']}; prepare it with its filter, or set protocol.expected=null"
        )
    return split


def _device(run_cfg: DictConfig | None, ranks: Ranks) -> torch.device:
    """Where metrics work: the run's device, else a GPU where there is one."""
    if run_cfg is not None:
        return device_of(run_cfg.trainer)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", ranks.local % count) if count else torch.device("cpu")


def _leave_out_at_once(job: Evaluation, *, one_seed: bool) -> None:
    """Notes the metrics of which it is known before anything is drawn that they cannot be measured."""
    one_seed = one_seed or len(job.protocol["seeds"]) < 2
    for name in job.nodes:
        try:
            metric = job.metric(name)
            metric.settings()
        except NotAvailable as error:
            job.leave_out(name, error)
            continue
        missing = sorted(metric.requires - job.split.provides - ({"image"} if job.split.true else set()))
        if missing:
            have = ", ".join(sorted(job.split.provides))
            job.leave_out(
                name, f"requires {', '.join(missing)}, and {job.split.name} has only {have}; take another split"
            )
        elif metric.compares and job.split.true is None:
            job.leave_out(
                name, f"compares with true pictures, and {job.split.name} has none; give shards with pictures"
            )
        elif metric.pairs and one_seed:
            job.leave_out(name, "needs two pictures of a scene; give protocol.seeds=[0,1]")


def _arms(cfg: DictConfig, run_cfg: DictConfig | None, job: Evaluation) -> tuple[dict[str, Arm], About]:
    """The arms of an evaluation, their pictures drawn as far as they are this process's share, and what drew them."""
    wanted, true, scenes = job.protocol["arms"], job.split.true, job.split.scenes
    rows = job.places.out / "rows"
    ids = [scene.id for scene in scenes]
    about = About(checkpoint=f"images={cfg.images}")
    arms: dict[str, Arm] = {}
    if cfg.images == "real":
        assert true is not None
        arms["real"] = Arm(name="real", sets=(true,), rows=job.places.true_rows / "ceiling")
    elif cfg.images is not None:
        seeds = [Path(cfg.images) / str(seed) for seed in job.protocol["seeds"]]
        folders = seeds if seeds[0].is_dir() else [Path(cfg.images)]
        fit = job.split.framing.fitting(cfg.images_are)
        sets = tuple(Folder(folder, ids, fit=fit, how=f":{cfg.images_are}") for folder in folders)
        arms["pictures"] = Arm(name="pictures", sets=sets, rows=rows / "pictures")
    else:
        assert run_cfg is not None
        with job.timed("drawing"):
            drawn, about = _drawn(cfg, run_cfg, job)
        arms |= {name: Arm(name=name, sets=sets, rows=rows / name) for name, sets in drawn.items()}
    compares = any(job.metric(name).compares for name in job.nodes if name not in job.not_measured)
    if true is not None and ("ceiling" in wanted or compares):
        arms["ceiling"] = Arm(name="ceiling", sets=(true,), rows=job.places.true_rows / "ceiling")
    if true is not None and "floor" in wanted and len(scenes) > 1:
        arms["floor"] = Arm(name="floor", sets=(Turned(true, len(scenes)),), rows=job.places.true_rows / "floor")
    return arms, about


def _drawn(cfg: DictConfig, run_cfg: DictConfig, job: Evaluation) -> tuple[dict[str, tuple[Generated, ...]], About]:
    """Pictures with the scene and without it, a set a seed; of those that are this process's share none is missing."""
    module, checkpoint = load_module(run_cfg, cfg.checkpoint)
    step = module.loaded_step
    about = About(
        step=step,
        samples_seen=None if step is None else step * run_cfg.batch_size,
        weights_sha256=weights_hash(module),
        checkpoint=checkpoint.name,
        device=torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else job.device.type,
    )
    refiner = build_refiner(cfg)
    scenes = job.split.drawn
    asked = {"with_scene": scenes}
    if module.conditioning.adapters and "without_scene" in job.protocol["arms"]:
        asked["without_scene"] = [scene.without_layout() for scene in scenes]
    picture_format, seeds = job.protocol["picture_format"], job.protocol["seeds"]
    drawn: dict[str, tuple[Generated, ...]] = {}
    for arm, of_arm in asked.items():
        sets = []
        for seed in seeds:
            settings = picture_settings(cfg, run_cfg, weights=str(about.weights_sha256), seed=seed, arm=arm)
            if picture_format != "png":
                settings["picture_format"] = picture_format
            folder = job.places.out / (arm if seed == seeds[0] else f"{arm}.seed={seed}")
            manifest = Manifest(folder, settings, writer=str(job.ranks.rank), picture_format=picture_format)
            manifest.check_ids([scene.id for scene in scenes])
            _draw(job, module, refiner, run_cfg, _share(job, of_arm), manifest, seed=seed, what=folder.name)
            sets.append(Generated(manifest, [scene.id for scene in scenes], job.split.framing.cut))
        drawn[arm] = tuple(sets)
    return drawn, about


def _share(job: Evaluation, scenes: Sequence[Scene]) -> list[Scene]:
    """This process's scenes: whole batches, so that a scene is drawn in the same batch by whichever process."""
    return [scenes[place] for batch in job.batches for place in batch]


def _draw(
    job: Evaluation,
    module: Any,
    refiner: Any,
    run_cfg: DictConfig,
    scenes: list[Scene],
    manifest: Manifest,
    *,
    seed: int,
    what: str,
) -> None:
    """Draws, and refines where asked, what is missing of some scenes."""
    suffix = "" if refiner is None else NOT_REFINED
    with placed(module, run_cfg.trainer), job.bar(len(scenes), f"generating {what}", "picture") as bar:
        done = len(scenes) - len(manifest.missing([scene.id + suffix for scene in scenes]))
        bar.update(done)
        generate(
            module,
            scenes,
            manifest,
            seed=seed,
            batch_size=job.protocol["batch_size"],
            suffix=suffix,
            progress=lambda count, _total: bar.update(done + count - bar.n),
        )
    if refiner is not None:
        with job.bar(len(scenes), f"refining {what}", "picture") as bar:
            bar.update(len(scenes) - len(manifest.missing([scene.id for scene in scenes])))
            refine(refiner.to(job.device), scenes, manifest, seed=seed, progress=lambda *_: bar.update())


def _measured_arms(metric: Metric, arms: Mapping[str, Arm], wanted: Sequence[str]) -> list[Arm]:
    """The arms of which a metric needs rows: one that compares also of the true pictures, one with pairs of two sets alone.

    One without bounds measures neither the true pictures nor those of other scenes beside the generated ones.
    """
    names = [name for name in arms if name != "ceiling" or "ceiling" in wanted or metric.compares]
    if not (metric.bounds or metric.compares):
        names = [name for name in names if name not in ("ceiling", "floor")]
    return [arms[name] for name in names if not metric.pairs or len(arms[name].sets) > 1]


def _measure(job: Evaluation, name: str, arms: Mapping[str, Arm]) -> None:
    """Makes the rows of a metric that are this process's share and are not on disk."""
    scenes, marks = job.split.scenes, scene_marks(job.split.scenes)
    try:
        metric = job.metric(name)
        for arm in _measured_arms(metric, arms, job.protocol["arms"]):
            store = RowStore(arm.rows / store_name(name, metric), writer=str(job.ranks.rank))
            for sets in arm.scored(metric):
                keys = row_keys(marks, sets)
                todo = unmeasured(store, keys, job.batches)
                if not todo:
                    continue
                metric = metric.to(job.device)
                with job.bar(sum(map(len, todo)), f"{name} {arm.name}", "picture") as bar:
                    measure(metric, scenes, sets, store, keys=keys, batches=todo, progress=bar.update)
    except NotAvailable as error:
        job.leave_out(name, error)
    finally:
        metric = None  # its models go before those of the next come
        if job.device.type == "cuda":
            torch.cuda.empty_cache()


def _reloaded(arms: Mapping[str, Arm], job: Evaluation) -> int:
    """Looks what the other processes have drawn, and counts what is still to come."""
    count = 0
    for arm in arms.values():
        for pictures in arm.sets:
            if isinstance(pictures, Generated):
                pictures.manifest.reload()
                count += sum(pictures.stamp(place) is None for place in range(len(job.split.scenes)))
    return count


def _values(
    job: Evaluation, arms: Mapping[str, Arm]
) -> tuple[dict[str, dict[str, Any]], SceneScores, dict[str, dict[str, list[str]]], int]:
    """The values by arm and name, scores by scene, failures by arm and metric, and how many rows are still to come."""
    marks = scene_marks(job.split.scenes)
    wanted = job.protocol["arms"]
    shown = [name for name in arms if name != "ceiling" or "ceiling" in wanted]
    values: dict[str, dict[str, Any]] = {name: {} for name in shown}
    failures: dict[str, dict[str, list[str]]] = {}
    scores = SceneScores(job.split.scenes)
    pending = 0
    for name in job.nodes:
        try:
            metric = job.metric(name)
            rows, missing = _rows(job, name, metric, arms, marks)
        except NotAvailable:
            continue
        if missing:
            pending += 0 if name in job.not_measured else missing
        if missing or pending:
            continue
        true = rows.get("ceiling", [])
        try:
            found = {
                arm: metric.compute(of_arm, true=_repeated(true, len(of_arm)) if metric.compares else ())
                for arm, of_arm in rows.items()
                if arm in shown
            }
        except NotAvailable as error:
            job.leave_out(name, error)
            continue
        if found:
            job.not_measured.pop(name, None)  # measured before, when it could be
        for arm, of_metric in found.items():
            for key, value in of_metric.items():
                values[arm][key if key not in values[arm] else f"{name}.{key}"] = value
            scores.add(arm, metric, rows[arm])
            if failed := [f"{row['scene']}: {row['failure']}" for row in rows[arm] if "failure" in row]:
                failures.setdefault(arm, {})[name] = failed
    return values, scores, failures, pending


def _rows(
    job: Evaluation, name: str, metric: Metric, arms: Mapping[str, Arm], marks: Sequence[str]
) -> tuple[dict[str, list[Row]], int]:
    """The rows of a metric by arm, seed after seed, in the order of the scenes; and how many are missing."""
    found: dict[str, list[Row]] = {}
    missing = 0
    for arm in _measured_arms(metric, arms, job.protocol["arms"]):
        store = RowStore(arm.rows / store_name(name, metric))
        found[arm.name] = []
        for sets in arm.scored(metric):
            rows, absent = gathered(store, row_keys(marks, sets))
            found[arm.name] += rows
            missing += absent
    return found, missing


def _keep_references(folder: Path, job: Evaluation, arms: Mapping[str, Arm]) -> None:
    """Writes `PROTOCOL.METRIC.npz` for each metric that can compare with statistics of the true pictures."""
    marks = scene_marks(job.split.scenes)
    named = [name for name in job.nodes if name not in job.not_measured and job.metric(name).references]
    for name in named:
        metric = job.metric(name)
        path = folder / f"{job.protocol['name']}.{name}.npz"
        metric.save_reference(path, _rows(job, name, metric, arms, marks)[0]["ceiling"], split=job.split.name)
        print(f"{path}: statistics of {len(marks)} true pictures; compare with them by metric.{name}.reference={path}")
    if not named:
        print(
            f"references={folder}: none of {', '.join(job.nodes)} compares with statistics; name one, such as metric=[fid]"
        )


def _repeated(true: list[Row], count: int) -> list[Row]:
    """The rows of the true pictures as often as there are seeds."""
    return true * (count // len(true)) if true else true
