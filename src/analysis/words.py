"""What texts call the things that a model tells apart: digits, other characters, pictures."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from data.catalog import DIGITS


class Words(NamedTuple):
    """What one and many of them are called; `strange`, what is said of an image unlike every
    class; `strange_key`, its name in JSON and CSV."""

    one: str
    many: str
    strange: str
    strange_key: str


NONE_OF_THESE = "may be none of these classes", "may_be_none_of_these"
DIGIT = Words("digit", "digits", "may be no digit", "may_be_no_digit")
CHARACTER = Words("character", "characters", *NONE_OF_THESE)
PICTURE = Words("picture", "pictures", *NONE_OF_THESE)


# How a picture is brought to an image's square, by the checkpoint's `preparation`.
PREPARED = {
    "digit": "scaled to fit 20x20, centred by mass in 28x28, light on black",
    "crop": "its middle square, resized (bicubic)",
    "pad": "padded to a square in its border's mean colour, resized (bicubic)",
    "stretch": "resized to a square (bicubic)",
}


def words_for(checkpoint: Mapping[str, Any]) -> Words:
    """The words for a checkpoint's `class_names`, by its `preparation`."""
    if checkpoint["preparation"] != "digit":
        return PICTURE
    return DIGIT if set(checkpoint["class_names"]) <= set(DIGITS) else CHARACTER
