"""Endings for equal texts of a scene's objects, as the rich-context loader gives them to its sentences of CC3M and LAION."""

from collections.abc import Sequence

EQUAL_TEXTS = ("kept", "published", "numbered")


def told_apart(texts: Sequence[str], how: str) -> list[str]:
    """Texts of a scene's objects, with endings for those that are equal.

    Args:
        texts: One for each object, in the order of the file.
        how: "published": `_0` for all but the last of equal texts, which is what the released loader does to the sentences of
            CC3M and LAION; "numbered": `_0`, `_1`, … as it seems to have been meant; "kept": no endings.

    Returns:
        As many texts.
    """
    out = list(texts)
    if how == "published":
        # in place, so that a text with an ending equals the others no more: of three, two get _0 and the last none
        for place, text in enumerate(out):
            before = out[:place].count(text)
            if before or text in out[place + 1 :]:
                out[place] = f"{text}_{before}"
    elif how == "numbered":
        out = [f"{text}_{out[:place].count(text)}" if out.count(text) > 1 else text for place, text in enumerate(out)]
    return out
