"""What tests read out of the documents."""

import re
import shlex


def blocks(text: str, language: str) -> list[str]:
    """The contents of a document's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def words_of(line: str) -> list[str]:
    """A command line as the shell takes it apart."""
    return shlex.split(line, comments=True)
