"""Real and generated pictures in the form in which LAION-SG's scripts score them: one `.npz` for each scene.

`npz_files_<rank>/batch_<i>.npz` holds `real_images` and `fake_images`, uint8 (1, H, W, 3) each; the i-th file of a rank is the
i-th scene of its share. Which pictures these are is the caller's to say.
"""

import io
import json
from pathlib import Path

import numpy as np

from files.atomic import write_atomically

RECORD = "npz_files.json"


class Pairs:
    """The files of one rank; those that are there are whole and stay.

    Args:
        folder: Where `npz_files_<rank>` goes.
        rank: Of this process.
        ranks: How many there are; the files of another number would name other scenes.
        scenes: How many scenes there are.

    Raises:
        ValueError: The folder holds files of other ranks or scenes.
    """

    def __init__(self, folder: str | Path, *, rank: int, ranks: int, scenes: int) -> None:
        folder = Path(folder)
        wanted = {"ranks": ranks, "scenes": scenes}
        record = folder / RECORD
        content = json.dumps(wanted).encode() + b"\n"
        write_atomically(record, content, temporary=f".{rank}.{RECORD}.tmp", replace=False)
        found = json.loads(record.read_bytes())
        if found != wanted:
            raise ValueError(
                f"{folder}: npz_files_* are of {found['scenes']} scenes over {found['ranks']} ranks, asked for are {scenes} over "
                f"{ranks}; remove them with {RECORD}, or start as many ranks"
            )
        self.folder = folder / f"npz_files_{rank}"

    def path(self, number: int) -> Path:
        """The file of the scene at a place of the share."""
        return self.folder / f"batch_{number}.npz"

    def write(self, number: int, real: np.ndarray, fake: np.ndarray) -> None:
        """Writes the file of a scene.

        Args:
            number: Place of the scene in the rank's share.
            real: (H, W, 3) uint8, the true picture.
            fake: (H, W, 3) uint8, the generated one.

        Raises:
            ValueError: They are not of one size.
        """
        if real.shape != fake.shape:
            raise ValueError(
                f"{self.path(number)}: real {real.shape} and fake {fake.shape} differ; bring them to one size"
            )
        buffer = io.BytesIO()
        np.savez(buffer, real_images=real[None], fake_images=fake[None])
        write_atomically(self.path(number), buffer.getvalue(), sync=False)
