"""fp8 weights with a scale each, as ComfyUI stores them: a weight is the stored number times its layer's scale.

ComfyUI's QUANTIZATION.md has the layout: beside ``x.weight`` in fp8 lies ``x.weight_scale``, one number in fp32, and
``x.comfy_quant`` may hold a JSON text with the format. Older files have ``x.scale_weight``, and a tensor ``scaled_fp8``
that marks them. What scales the inputs of a layer changes no weight. Other formats of ComfyUI are not read.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.tensorfile import FLOATS, READABLE, TensorFile
from minisdxl.checkpoint.weight_files import WeightFiles

SCALE = re.compile(r"(.+)\.(?:weight_scale|scale_weight)")
ABOUT = re.compile(r"(.+)\.comfy_quant")
UNUSED = re.compile(r"(.+\.)?scaled_fp8|.+\.(input_scale|scale_input)")
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


@dataclass(frozen=True)
class Scale:
    """Where the scale of a weight is."""

    file: TensorFile
    name: str

    def read(self) -> float:
        """The number. Raises ``CheckpointError`` where it is not finite or cannot be read."""
        raw = bytearray(self.file.raw(self.name))
        scale = float(torch.frombuffer(raw, dtype=FLOATS[self.file.entries[self.name].dtype])[0])
        if not math.isfinite(scale):
            raise CheckpointError(f"{self.file.path} has {scale} as {self.name}, expected a finite number")
        return scale


def find_scales(files: WeightFiles) -> tuple[dict[str, Scale], set[str]]:
    """The scales of weights, by the weights' names, and the names of all tensors that belong to this layout.

    A tensor that does not fit the layout is in neither.
    """
    scales: dict[str, Scale] = {}
    names: set[str] = set()
    for name, entry in files.entries.items():
        if match := SCALE.fullmatch(name):
            weight = files.entries.get(f"{match[1]}.weight")
            if weight and weight.dtype in READABLE and entry.dtype in FLOATS and entry.shape in ((), (1,)):
                scales[f"{match[1]}.weight"] = Scale(files.file_of(name), name)
                names.add(name)
        elif UNUSED.fullmatch(name):
            names.add(name)
        elif match := ABOUT.fullmatch(name):
            weight, scale = (files.entries.get(f"{match[1]}.{kind}") for kind in ("weight", "weight_scale"))
            if weight and scale and _format(files.file_of(name).raw(name)) == weight.dtype:
                names.add(name)
    return scales, names


def _format(text: bytes) -> str | None:
    """The dtype that a JSON text names as the format of a weight, if it asks for nothing more."""
    try:
        about: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or not about.keys() <= {"format", "full_precision_matrix_mult"}:
        return None
    return FORMATS.get(str(about.get("format")))
