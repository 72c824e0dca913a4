"""What tests read out of the documents."""

import re
import shlex
from pathlib import Path


def blocks(text: str, language: str) -> list[str]:
    """The contents of a document's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines_of(block: str) -> list[str]:
    """The commands of a block, one a line: without comments, and put together where they are broken."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words_of(line: str) -> list[str]:
    """A command line as the shell takes it apart."""
    return shlex.split(line, comments=True)


def header(path: Path) -> dict[str, list[list[str]]]:
    """The commands in a YAML file's header, as words, by what they are for: `prepare`, `command`."""
    found: dict[str, list[list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#   (prepare|command) +(python .*)", line):
            found.setdefault(match[1], []).append(words_of(match[2].partition("   ")[0]))
    return found
