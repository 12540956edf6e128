"""COCO's annotation file: one caption of each picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.evaluation.coco import coco_captions
from tools.evaluation.pictures import file_captions

PUBLISHED: dict[str, Any] = {  # the fields that the published file has
    "info": {"description": "COCO 2017 Dataset", "year": 2017},
    "licenses": [{"id": 4, "name": "Attribution License"}],
    "images": [
        {"license": 4, "file_name": "000000397133.jpg", "height": 427, "width": 640, "id": 397133},
        {"license": 4, "file_name": "000000037777.jpg", "height": 230, "width": 352, "id": 37777},
    ],
    "annotations": [
        {"image_id": 37777, "id": 91, "caption": "A kitchen\nwith  a table. "},
        {"image_id": 397133, "id": 38, "caption": "A man is in a kitchen making pizzas."},
        {"image_id": 397133, "id": 35, "caption": "Man in apron standing on front of oven."},
        {"image_id": 37777, "id": 94, "caption": "The dining table near the kitchen."},
    ],
}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_each_picture_has_its_first_caption(tmp_path: Path) -> None:
    path = write(tmp_path / "captions_val2017.json", PUBLISHED)
    expected = ["A kitchen with a table.", "Man in apron standing on front of oven."]
    assert coco_captions(path) == expected
    captions = file_captions(path, 1)
    assert (captions.texts, captions.drawn) == (tuple(expected[:1]), False)
    with pytest.raises(ValueError, match="has 2 pictures, expected 3 or more"):
        file_captions(path, 3)


@pytest.mark.parametrize(
    "content", [[], {"annotations": []}, {"images": [], "annotations": [{"id": 1}]}, {"images": 1, "annotations": []}]
)
def test_other_files_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file of COCO's captions \(.*expected captions_val2017\.json"):
        coco_captions(write(tmp_path / "x.json", content))


def test_captions_of_no_picture_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", {**PUBLISHED, "images": PUBLISHED["images"][:1]})
    with pytest.raises(ValueError, match="has a caption of picture 37777, which is not among its images"):
        coco_captions(path)
