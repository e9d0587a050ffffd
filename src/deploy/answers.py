"""Writes what `predict` answered as text, JSON or CSV.

Needs no PyTorch: flags.py names the formats in its help.
"""

import csv
import io
import json
import os
import sys
from typing import Any


def as_text(result: dict[str, Any]) -> str:
    """A line for each picture that was read: `42.jpg: 42: 4 (99.1 %) 2 (98.0 %)`."""
    lines = []
    for row in result["images"]:
        if "error" not in row:
            shown = []
            for digit in row["digits"]:
                note = " (may be no digit)" if digit["may_be_no_digit"] else ""
                shown.append(f"{digit['prediction']} ({100 * digit['confidence']:.1f} %){note}")
            lines.append(f"{row['image']}: {row['prediction']}: {' '.join(shown)}\n")
    return "".join(lines)


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def as_csv(result: dict[str, Any]) -> str:
    """A header, then a row for each digit, counted from 1, or for a picture with an error."""
    text = io.StringIO()
    box = ["left", "top", "right", "bottom"]
    columns = ["image", "digit", "prediction", *box, "may_be_no_digit", *result["class_names"]]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "error"])
    for row in result["images"]:
        if "error" in row:
            writer.writerow([row["image"], *[""] * (len(columns) - 1), row["error"]])
        for i, digit in enumerate(row.get("digits", ()), start=1):
            strange = str(digit["may_be_no_digit"]).lower()
            shares = [f"{probability:.6f}" for probability in digit["probabilities"].values()]
            cells = [i, digit["prediction"], *digit["box"], strange, *shares, ""]
            writer.writerow([row["image"], *cells])
    return text.getvalue()


FORMATS = {"text": as_text, "json": as_json, "csv": as_csv}


def show(result: dict[str, Any], form: str) -> bool:
    """Print the answers to stdout and the errors to stderr. Returns whether all were read."""
    text = FORMATS[form](result)
    # A file's name may have bytes that are not text.
    sys.stdout.write(os.fsencode(text).decode(errors="replace"))
    sys.stdout.flush()
    errors = [row["error"] for row in result["images"] if "error" in row]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return not errors
