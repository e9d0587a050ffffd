"""Writes what `predict` answered as text, JSON or CSV.

Needs no PyTorch: flags.py names the formats in its help.
"""

import csv
import io
import json
import sys
from typing import Any

from analysis.words import PICTURE, Words
from common.text import printable, without_surrogates

SHOWN = 3  # classes that a picture's line names, the likeliest


def as_text(result: dict[str, Any], words: Words) -> str:
    """A line for each picture that was read: `42.jpg: 42: 4 (99.1 %) 2 (98.0 %)`, or with the
    likeliest classes, `cat.jpg: cat (93.1 %), dog (4.0 %), deer (1.2 %)`.
    """

    def share(name: str, probability: float) -> str:
        return f"{name} ({100 * probability:.1f} %)"

    lines = []
    for row in (row for row in result["images"] if "error" not in row):
        if words is not PICTURE:
            shown = f"{row['prediction']}:"
            for digit in row[words.many]:
                note = f" ({words.strange})" if digit[words.strange_key] else ""
                shown += f" {share(digit['prediction'], digit['confidence'])}{note}"
        else:
            likeliest = sorted(row["probabilities"].items(), key=lambda each: -each[1])[:SHOWN]
            shown = ", ".join(share(*each) for each in likeliest)
            shown += f": {words.strange}" if row[words.strange_key] else ""
        lines.append(f"{printable(without_surrogates(row['image']))}: {shown}\n")
    return "".join(lines)


def as_json(result: dict[str, Any], _: Words) -> str:
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def as_csv(result: dict[str, Any], words: Words) -> str:
    """A header, then a row for each picture, or for each of its digits, counted from 1."""
    is_read = words is not PICTURE  # its digits or letters are found, each with its place
    box = ["left", "top", "right", "bottom"]
    columns = [words.one, "prediction", *box] if is_read else ["prediction", "confidence"]
    columns = ["image", *columns, words.strange_key]
    taken = (*columns, "error")  # a class may be called as one of these
    columns += [f"class {name}" if name in taken else name for name in result["class_names"]]
    columns.append("error")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in result["images"]:
        if "error" in row:
            writer.writerow([row["image"], *[""] * (len(columns) - 2), row["error"]])
            continue
        for i, each in enumerate(row[words.many] if is_read else [row], start=1):
            about = [each["prediction"], f"{each['confidence']:.6f}"]
            about = [i, each["prediction"], *each["box"]] if is_read else about
            strange = str(each[words.strange_key]).lower()
            shares = [f"{probability:.6f}" for probability in each["probabilities"].values()]
            writer.writerow([row["image"], *about, strange, *shares, ""])
    return text.getvalue()


FORMATS = {"text": as_text, "json": as_json, "csv": as_csv}


def show(result: dict[str, Any], form: str, words: Words) -> bool:
    """Print the answers to stdout and the errors to stderr. Returns whether all were read."""
    print(without_surrogates(FORMATS[form](result, words)), end="", flush=True)
    errors = [row["error"] for row in result["images"] if "error" in row]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return not errors
