"""Captions from COCO's annotation files, as they are published: ``annotations/captions_val2017.json``."""

from __future__ import annotations

import json
from pathlib import Path


def coco_captions(path: Path) -> list[str]:
    """The first caption, by its id, of each picture that has one, in the order of the pictures' ids.

    Line ends and repeated spaces, which some captions have, become one space. Raises ``ValueError`` for a file of
    another kind, ``OSError``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        first: dict[int, tuple[int, str]] = {}
        for annotation in content["annotations"]:
            picture, number = int(annotation["image_id"]), int(annotation["id"])
            if picture not in first or number < first[picture][0]:
                first[picture] = number, " ".join(str(annotation["caption"]).split())
        known = {int(picture["id"]) for picture in content["images"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} is no file of COCO's captions ({what:.100}), expected captions_val2017.json"
        ) from error
    if unknown := first.keys() - known:
        raise ValueError(f"{path} has a caption of picture {min(unknown)}, which is not among its images")
    return [first[picture][1] for picture in sorted(first)]
