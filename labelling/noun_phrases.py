"""Noun phrases of a caption, by rules over closed lists of words: no model and no package.

A phrase is a run of words that none of the lists ends: what is left between prepositions, conjunctions, verbs, pronouns and
punctuation, without the articles and numbers before it. It is right for the short plain sentences of captions and makes no
claim beyond them.
"""

import re

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")

DETERMINERS = frozenset(
    """a an the this that these those my your his her its our their some any each every another other both all several many
    few more most much no one two three four five six seven eight nine ten eleven twelve dozen dozens hundreds various
    numerous multiple different certain own same such what whose first second third next last single""".split()
)
BREAKS = frozenset(
    """aboard about above across after against along alongside amid among amongst around as at atop away back behind below
    beneath beside besides between beyond by despite down during except for forward from in inside into like near nearby next
    of off on onto opposite out outside over past per since than through throughout till to toward towards under underneath
    until up upon via while with within without
    and or but nor so yet because although though if when where which who whom while whereas however also too
    i you he she it we they me him us them himself herself itself themselves someone something anyone there here
    is are was were be been being am has have had having do does did doing can could may might must shall should will would
    not very just only quite rather really still already together apart ahead maybe perhaps possibly likely
    wears wear wore holds hold held stands stood sits sit sat lies lay rides ride rode walks walked runs ran looks looked look
    appears appear seems seem shows show showed shown features feature featured contains contain includes include consists
    consist displays depicts depict makes make made takes take took gets get got gives give gave goes go went comes come came
    eats eat ate drinks drinking plays played play flies flew hangs hung leans leaned covers covered fills filled filled
    surrounds surround carries carry carried uses use used wants want tries try enjoys enjoy poses posed prepares prepare
    adds add creates create created provides provide suggests suggest gives indicates indicate allows allow helps help
    smiles smiled inhales jumps jumped watches watched sleeps slept talks talked reads works waits waited performs performed
    attempts attempt approaches leads lead follows stretches rests crosses crossed faces grazes graze
    located seen situated based taken placed set visible available full close able ready""".split()
)
# Words that look like participles and are nouns or colours.
NOUNS_IN_ING = frozenset(
    """awning being building buildings ceiling ceilings clothing cooling covering duckling dumpling dumplings earring earrings
    evening fencing flooring frosting hearing icing king lightning lighting morning nothing offspring opening painting
    paintings parking paving piping plumbing pudding railing railings ring rings seating setting shopping siding sibling sling
    spring stocking stuffing string swing swings thing things topping toppings tubing wedding wing wings writing""".split()
)
NOT_IN_ED = frozenset("bed beds breed feed moped naked red reed sacred seed shed sled speed weed wicked".split())
# Heads that name no thing in the picture: a part of the picture, or an amount of what follows "of".
PLACES = frozenset(
    """image picture photo photograph photography view scene shot front back top bottom left right side sides middle center
    centre background foreground distance way corner edge end rest part parts day time order lot lots place area air
    atmosphere addition overall total presence sense moment""".split()
)
AMOUNTS = frozenset(
    """bunch couple group groups kind kinds lot lots number pair pairs piece pieces row rows set sets slice slices sort sorts
    stack series type types variety collection amount array handful assortment image picture photo view
    close-up closeup""".split()
)
# A run of these alone names nothing: it goes on behind a comma, and is left out where nothing follows.
ADJECTIVES = frozenset(
    """big black blue bright brown colorful colourful cute dark empty golden gray green grey happy huge large little
    long modern narrow new old pink plain purple red round short silver small striped tall thick thin tiny white
    wide yellow young""".split()
)


def noun_phrases(caption: str) -> list[str]:
    """The noun phrases of a caption.

    Args:
        caption: English text.

    Returns:
        The phrases in lower case, in the order of the text, without repetition; what they stand for is not looked at.
    """
    words = _WORD.findall(caption.lower())
    phrases: list[str] = []
    run: list[str] = []
    for place, word in enumerate([*words, "."]):
        follower = words[place + 1] if place + 1 < len(words) else "."
        if word == "," and run and ADJECTIVES.issuperset(run):
            continue
        if _ends(word, follower, run):
            if run and not _names_no_thing(run, word):
                phrases.append(" ".join(run))
            run = []
        elif not (word in DETERMINERS and not run):
            run.append(word)
    return list(dict.fromkeys(phrases))


def _ends(word: str, follower: str, run: list[str]) -> bool:
    """Return whether a phrase ends before this word."""
    if not word[0].isalnum() or word in BREAKS or (word in DETERMINERS and run):
        return True
    if word.endswith("ing") and len(word) > 4 and word not in NOUNS_IN_ING:
        return bool(run) or _is_function(follower)  # "a smiling woman" keeps it, "a woman smiling" ends
    if word.endswith("ed") and len(word) > 3 and word not in NOT_IN_ED:
        return _is_function(follower)  # "a parked car" keeps it, "a man dressed in" ends
    return word.endswith("ly") and len(word) > 4 and word not in ("family", "butterfly", "jelly", "lily", "belly")


def _is_function(word: str) -> bool:
    return not word[0].isalnum() or word in BREAKS or word in DETERMINERS


def _names_no_thing(run: list[str], ender: str) -> bool:
    head = run[-1]
    return ADJECTIVES.issuperset(run) or head in PLACES or (ender == "of" and head in AMOUNTS) or head.isdigit()
