"""How often conversion reads its input: bytes that processes read for each byte of SA-1B's and IGLIGEN's files.

Every process is asked what it has read (`rchar` of Linux's /proc/self/io: all reads of files, cached or not) before and after it
converts its share. Pictures are noise and latents random, of the published shapes; what counts is the ratio.
"""

import argparse
import io
import json
import multiprocessing
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from datamodules.sources.base import Source
from datamodules.sources.igligen import Igligen
from datamodules.sources.sa1b import Sa1b
from preparation.conversion import convert_source
from runtime.launch.ranks import Ranks

SHAPE = (4, 64, 64)  # of a latent at 512 px
SIDE = 256  # px of the pictures


def make_igligen(root: Path, files: int, rows: int) -> Path:
    """Writes latents and boxes as they are published."""
    numbers = np.random.default_rng(0)
    for folder in ("latents", "boxes"):
        (root / folder).mkdir(parents=True)
    for file in range(files):
        indices = list(range(file * rows, (file + 1) * rows))
        latents = numbers.standard_normal((rows, *SHAPE), dtype=np.float32).astype(np.float16)
        content = np.array({"indices": indices, "latents": latents}, dtype=object)
        np.save(root / "latents" / f"sa_{file:06d}.npy", content, allow_pickle=True)
        np.save(root / "boxes" / f"sa_{file:06d}.npy", _boxes(indices), allow_pickle=True)
    return root


def make_sa1b(root: Path, files: int, rows: int) -> Path:
    """Writes tars of pictures with a table of captions, and boxes in a folder beside them."""
    numbers = np.random.default_rng(0)
    (root / "boxes").mkdir(parents=True)
    for file in range(files):
        indices = range(file * rows, (file + 1) * rows)
        np.save(root / "boxes" / f"sa_{file:06d}.npy", _boxes(indices), allow_pickle=True)
        with tarfile.open(root / f"sa_{file:06d}.tar", "w") as tar:
            for index in indices:
                picture = io.BytesIO()
                Image.fromarray(numbers.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(picture, "JPEG")
                told = {"image": {"height": SIDE, "width": SIDE}, "annotations": []}
                for suffix, data in (("jpg", picture.getvalue()), ("json", json.dumps(told).encode())):
                    member = tarfile.TarInfo(f"sa_{index}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    names = [f"sa_{index}" for index in range(files * rows)]
    captions = [
        f"The image features {name} and {number}"
        for name, number in zip(names, numbers.random(len(names)), strict=True)
    ]
    table = pyarrow.table({"key": names, "caption": captions})
    parquet.write_table(table, root / "captions.parquet", row_group_size=rows)
    return root


def _boxes(indices: list[int] | range) -> np.ndarray:
    """Rows of 6 columns."""
    rows = np.empty((len(indices), 6), object)
    for place, index in enumerate(indices):
        boxes = np.array([[0.5, 0.5, 0.25, 0.5]] * 7, np.float16)
        rows[place] = [index, f"picture {index}.", boxes, np.full(7, 0.5, np.float16), ["thing"] * 7, (SIDE, SIDE)]
    return rows


def bytes_read(make: Callable[[], Source], out: Path, processes: int, shard_size: int) -> int:
    """What all processes read that convert a source together, each its share.

    Args:
        make: Makes the source; each process makes its own.
        out: The folder to make.
        processes: How many.
        shard_size: As in `convert_source`.

    Returns:
        Bytes.
    """

    def work(rank: int, told: "multiprocessing.SimpleQueue[int]") -> None:
        before = _read_so_far()
        convert_source(make(), out, shard_size=shard_size, ranks=Ranks(rank=rank, count=processes))
        told.put(_read_so_far() - before)

    context = multiprocessing.get_context("fork")  # the libraries are imported once
    told = context.SimpleQueue()
    running = [context.Process(target=work, args=(rank, told)) for rank in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of {processes} ended with {process.exitcode}")
    return sum(told.get() for _ in running)


def _read_so_far() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def main() -> None:
    """Measures both sources with 1 and 4 processes, and compares what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rows", type=int, default=230, help="samples of a file, of which shards hold 100")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 4])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        latents = make_igligen(folder / "igligen", given.files, given.rows)
        tars = make_sa1b(folder / "sa1b", given.files, given.rows)
        sources = {
            "igligen": (latents, lambda: Igligen(root=str(latents))),
            "sa1b": (tars, lambda: Sa1b(root=str(tars), boxes=str(tars / "boxes"))),
        }
        for name, (root, make) in sources.items():
            size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
            made = set()
            for processes in given.processes:
                out = folder / f"{name}-{processes}"
                read = bytes_read(make, out, processes, 100)
                made.add((out / "index.json").read_bytes())
                print(
                    f"{name}: {processes} processes read {read / size:.2f} bytes for each byte of {given.files} files "
                    f"of {size / given.files / 1e6:.1f} MB",
                    flush=True,
                )
            print(f"{name}: shards {'are the same' if len(made) == 1 else 'DIFFER'}")


if __name__ == "__main__":
    main()
