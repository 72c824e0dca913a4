"""Writing a file so that a reader finds the old content or the new one, and never half of it.

Only this: what is written, and what a torn file means, is its caller's business.
"""

import contextlib
import os
from pathlib import Path


def write_atomically(
    path: str | Path, content: bytes, *, temporary: str | None = None, sync: bool = True, replace: bool = True
) -> None:
    """Writes to a temporary name beside `path`, then renames.

    Args:
        path: The file; its folder is made where it is missing.
        content: All of the file.
        temporary: Name of the temporary file; default one of this process.
        sync: Whether to wait for the disk. Without it a power cut can leave the new name on an empty
            file, which is enough where the caller would notice.
        replace: Whether a file that is there gives way; else it stays, also where it came in the meantime.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(temporary or f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    if not replace:
        with contextlib.suppress(OSError):  # there already; or a file system without links, where a look must do
            os.link(beside, path)
        if path.exists():
            beside.unlink()
            return
    os.replace(beside, path)
