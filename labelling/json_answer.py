"""The JSON in a model's answer: read strictly, with one repair. What the values mean is the asker's."""

from __future__ import annotations

import json
from typing import Any

from labelling.vision_language import NoAnswer

UNPARSABLE = "unparsable answer"


def json_of(text: str) -> dict[str, Any]:
    """The JSON mapping that an answer is.

    Models put it in a code fence or between sentences although they are told not to. So what is not JSON as it stands is cut once
    from its first opening to its last closing brace, and read again; nothing within is changed.

    Args:
        text: The answer.

    Returns:
        The mapping.

    Raises:
        NoAnswer: It is none, neither as it stands nor after the cut.
    """
    try:
        value = _strict(text)
    except ValueError:
        begin, end = text.find("{"), text.rfind("}")
        try:
            value = _strict(text[begin : end + 1])
        except ValueError as error:
            raise unparsable(text, f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise unparsable(text, f"a {type(value).__name__}, no mapping")
    return value


def unparsable(text: str, what: str) -> NoAnswer:
    """The failure of an answer that cannot be read; the message shows how it begins."""
    begin = " ".join(text.split())
    shown = begin if len(begin) <= 80 else begin[:77] + "..."
    return NoAnswer(f"the answer is {what}: {shown!r}", reason=UNPARSABLE, is_fault=False)


def _strict(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
