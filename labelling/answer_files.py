"""Files of answers: lines of JSON that any number of processes add to at the same time.

Each process writes a file of its own and reads all of them, so that none waits for another and a shared network folder will do.
What a question and an answer are is in `vision_language.py`; here they are hashes and a mapping.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labelling.parts import PartMissing
from scenes.json_form import parse_json

Key = tuple[str, str, str]


class AnswerFiles:
    """A folder of answers.

    A line is written at once and only whole lines are read, so that a kill costs at most the answer that was being written.

    Args:
        folder: Where the files are; made with the first answer.

    Attributes:
        unreadable: Lines that are no answers (a disk that was full, a crash); their questions are asked again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.unreadable = 0
        self._places: dict[Key, tuple[Path, int]] = {}  # where a line begins: answers stay on the disk
        self._read: dict[Path, int] = {}
        self._own: tuple[int, Path] | None = None

    def find(self, picture: str, prompt: str, asked_with: str) -> dict[str, Any] | None:
        """The answer to a question, what other processes have added by now included.

        Args:
            picture: Hash of the picture.
            prompt: Hash of the prompt.
            asked_with: Hash of the model and its settings.

        Returns:
            The line that `add` was given; None where there is none.
        """
        key = picture, prompt, asked_with
        if key not in self._places:
            self._refresh()
        place = self._places.get(key)
        if place is None:
            return None
        with place[0].open("rb") as file:
            file.seek(place[1])
            return parse_json(file.readline())

    def add(self, picture: str, prompt: str, asked_with: str, answer: dict[str, Any]) -> None:
        """Keep an answer, in one write to this process's own file."""
        record = {"picture": picture, "prompt": prompt, "asked_with": asked_with, **answer}
        line = json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
        path = self._own_file()
        begin = path.stat().st_size
        with path.open("ab", buffering=0) as file:
            file.write(line)
        self._places.setdefault((picture, prompt, asked_with), (path, begin))
        self._read[path] = begin + len(line)

    @staticmethod
    def read(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """The lines of a file, or of all `.jsonl` files of a folder, each with its place for a message.

        Args:
            path: The file or folder.

        Yields:
            The place, and the mapping.

        Raises:
            PartMissing: It is not there, or a line is no mapping.
        """
        path = Path(path)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise PartMissing(f"{path}: no answers there; give a file of JSON lines, or a folder of .jsonl files")
        for file in files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    where = f"{file}: line {number}"
                    record = _record(line)
                    if record is None:
                        raise PartMissing(f"{where}: no JSON mapping; fix the line or leave it out")
                    yield where, record

    def _own_file(self) -> Path:
        """This process's file, made when the first answer comes; a forked process makes another."""
        if self._own is not None and self._own[0] == os.getpid():
            return self._own[1]
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self.folder.glob("answers-*.jsonl")))
        while True:
            path = self.folder / f"answers-{number:05d}.jsonl"
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                number += 1
                continue
            self._own = os.getpid(), path
            return path

    def _refresh(self) -> None:
        """Take in the lines that were added since."""
        for path in sorted(self.folder.glob("*.jsonl")):
            begin = self._read.get(path, 0)
            if path.stat().st_size <= begin:
                continue
            with path.open("rb") as file:
                file.seek(begin)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written
                    record = _record(line)
                    try:
                        assert record is not None
                        key = record["picture"], record["prompt"], record["asked_with"]
                        assert isinstance(record["answer"], str)
                        self._places.setdefault(key, (path, begin))
                    except (AssertionError, KeyError, TypeError):
                        self.unreadable += 1
                    begin += len(line)
            self._read[path] = begin


def _record(line: bytes) -> dict[str, Any] | None:
    """The mapping of a line; None where it is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
