"""Names in LoRA files: the module and the role of each tensor, and the factor of each change.

Files name modules in kohya's way (``lora_unet_`` and the name with underscores for dots) or in one of those of
diffusers (``unet.`` and the name); both have been seen with the official and with diffusers' names of modules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from minisdxl.checkpoint.adapters import LOHA, LOKR
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.identify import CONTROL_LORA, LORA, family, transformer_family
from minisdxl.checkpoint.tensorfile import Shape, TensorFile

# What begins the names of a part's modules, the longer before the shorter; a name that none of these begins is the
# U-Net's. The names of other trainers are those of LyCORIS (SimpleTuner), ComfyUI, and OMI (OneTrainer).
PREFIXES = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "lycoris_": "unet",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "clip_l.transformer.": "text_encoder",
    "clip_l.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_g.transformer.": "text_encoder_2",
    "clip_g.": "text_encoder_2",
}
# .lora_down (kohya), .lora_A (PEFT), .lora.down and .lora_linear_layer.down (older diffusers), and the oldest of
# diffusers, as in attn1.processor.to_q_lora.down, which has names of its own for the four maps of an attention. PEFT
# has the name of the adapter in it too, unless it leaves it out: .lora_A.default
PAIR = re.compile(
    r"(?P<module>.+?)(?P<style>\.lora|_lora|\.lora_linear_layer)[._](?P<role>down|up|mid|A|B)(\.[^.]+)?\.weight"
)
ALPHA = re.compile(r"(?P<module>.+?)(?P<style>\.lora|_lora|\.lora_linear_layer)?\.(?P<role>alpha)")
# LyCORIS' and PEFT's lengths for DoRA; PEFT may leave the adapter's name in it, as above.
PEFT_LENGTHS = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(\.[^.]+)?(\.weight)?")
LYCORIS = re.compile(rf"(?P<module>.+?)\.(?P<role>{'|'.join((*LOHA, *LOKR, 'dora_scale', 'scalar', 'on_input'))})")
# Whole differences of weights and biases, of norms too (LyCORIS, ComfyUI).
WHOLE = re.compile(r"(?P<module>.+?)\.(?P<role>diff|diff_b|w_norm|b_norm)")
OLDEST_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
OLDEST = {"unet": {"to_out": "to_out.0"}, "text_encoder": OLDEST_TEXT, "text_encoder_2": OLDEST_TEXT}
ROLES = {"A": "down", "B": "up"}
EMBEDDING = re.compile(r"bundle_emb\.([^.]+)\..+")  # a textual inversion that a file holds beside its LoRA
PEFT_ROLES = {"down": "A", "up": "B"}

# Changes of other kinds, and those for other models, by names that only they have.
OTHERS = (
    CONTROL_LORA,
    (r"\.boft_", "a BOFT (boft), which rotates the weights"),
    (r"\.oft_", "an OFT or BOFT (oft), which rotates the weights"),
    (r"\.[ab][12]\.weight$", "a GLoRA (a1, a2, b1, b2)"),
    (r"\.lambda_layer$", "a T-LoRA (lambda_layer), which differs by timestep"),
    (r"lora_embedding_[AB]", "a LoRA of token embeddings (lora_embedding_A)"),
    (r"\.lora_B(\.[^.]+)?\.bias$", "a LoRA with biases (lora_B.bias)"),
    (r"^base_model\.model\.", "a PEFT adapter (base_model), which has its alpha in another file"),
)
# Attention where the U-Net of Stable Diffusion 1.x and 2.x has it and that of SDXL has not; and their text encoder.
OLDER = re.compile(
    r"(down_blocks[._]0|up_blocks[._]3)[._]attentions|input_blocks[._][12][._]1[._]"
    r"|output_blocks[._]([6-9]|1[01])[._]1[._]|^lora_te_"
)
# What reads from their text encoder, or is in it, has its width.
WIDTH = re.compile(r"(.*attn2[._](processor[._])?to_[kv]|lora_te_.*_q_proj)(\.|_lora).*(down|A)(\.[^.]+)?\.weight")
VERSIONS = {768: "1.x", 1024: "2.x"}
SETTINGS = "lora_adapter_metadata"  # of the file's metadata: PEFT's settings as JSON, since diffusers 0.34


class Name(NamedTuple):
    """The part, module and role in a tensor's name."""

    part: str  # a key of layouts.PARTS
    module: str  # as the file names it
    role: str  # of one of adapters.KINDS, or alpha, scalar or one of adapters.MAGNITUDES
    of: str = "weight"  # of the module, or its bias


def read_name(name: str, names: Collection[str]) -> Name | None:
    """The part, module and role of a tensor in a file with ``names``; ``None`` for a name that is not one of a LoRA's.

    The names tell an IA3 from a whole model: both have tensors called ``weight``.
    """
    if match := WHOLE.fullmatch(name):
        bias = match["role"] in ("diff_b", "b_norm")
        return Name(*_part_and_module(match["module"]), "diff", "bias" if bias else "weight")
    if match := PEFT_LENGTHS.fullmatch(name):
        return Name(*_part_and_module(match["module"]), "magnitude")
    if match := LYCORIS.fullmatch(name):
        return Name(*_part_and_module(match["module"]), match["role"])
    module, _, last = name.rpartition(".")
    if last == "weight" and f"{module}.on_input" in names:
        return Name(*_part_and_module(module), last)
    match = PAIR.fullmatch(name) or ALPHA.fullmatch(name)
    if match is None:
        return None
    part, module = _part_and_module(match["module"])
    if match["style"] == "_lora":
        parent, dot, last = module.replace(".processor.", ".").rpartition(".")
        module = parent + dot + OLDEST[part].get(last, last)
    return Name(part, module, ROLES.get(match["role"], match["role"]))


def _part_and_module(name: str) -> tuple[str, str]:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES.get(prefix, "unet"), name.removeprefix(prefix)


def sibling(name: str, role: str) -> str:
    """The name of the tensor of another role for the same module, spelled as ``name`` is."""
    match = PAIR.fullmatch(name)
    if match is None:
        return f"{name.rpartition('.')[0]}.{role}"
    theirs = PEFT_ROLES.get(role, role) if match["role"] in ROLES else role
    return name[: match.start("role")] + theirs + name[match.end("role") :]


def other_kind(shapes: Mapping[str, Shape]) -> str | None:
    """What a file with these tensors is, if something says that it is no LoRA for SDXL; else ``None``."""
    for pattern, what in OTHERS:
        if any(re.search(pattern, name) for name in shapes):
            return what
    if not any(re.search(LORA, name) for name in shapes):
        return family(shapes) or "a whole SDXL model"
    model = transformer_family(shapes) or _older_model(shapes)
    return f"a LoRA for {model}" if model else None


def _older_model(shapes: Mapping[str, Shape]) -> str | None:
    """Which of the models before SDXL a LoRA is for, if it is for one."""
    widths = {shape[1] for name, shape in shapes.items() if len(shape) > 1 and WIDTH.fullmatch(name)}
    versions = [version for width, version in VERSIONS.items() if width in widths]
    if not versions and not any(OLDER.search(name) for name in shapes):
        return None
    return f"a Stable Diffusion {versions[0] if versions else '1.x or 2.x'} model"


def read_numbers(file: TensorFile, names: Collection[str]) -> dict[str, float]:
    """The numbers in tensors of one element, floats or I64. Raises ``CheckpointError`` where one is not finite."""
    # LyCORIS and diffusers' conversion to kohya's names write whole numbers: read as if they were floats, to the bit.
    whole = {name: file.entries[name] for name in names if file.entries[name].dtype == "I64"}
    as_floats = {name: replace(entry, dtype="F64") for name, entry in whole.items()}
    values = {name: torch.empty((), dtype=torch.float64, device="cpu") for name in names}
    replace(file, entries=file.entries | as_floats).read_into(values)
    numbers = {name: float(value.view(torch.int64) if name in whole else value) for name, value in values.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise CheckpointError(f"{file.path} has {number} as {name}, expected a finite number")
    return numbers


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of a part; the defaults are for files of other programs, whose alpha is a tensor or the rank."""

    alpha: float | None = None  # of modules that no pattern is for
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def factor(self, module: str, rank: int) -> float:
        """By how much the product of a module's matrices counts, where no tensor of the file says it."""
        # A pattern is the end of a name or, after ^, all of it. PEFT has regular expressions, which can hang.
        fitting = (
            alpha
            for pattern, alpha in self.patterns.items()
            if module == pattern.removeprefix("^") or module.endswith(f".{pattern}")
        )
        alpha = next(fitting, rank if self.alpha is None else self.alpha)
        # Rank-stabilized LoRA divides by the root (Kalajdzievski 2023).
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_settings(file: TensorFile) -> dict[str, Settings]:
    """The settings of each part. Raises ``CheckpointError`` where they are damaged."""
    try:
        values = json.loads(file.metadata.get(SETTINGS, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path} has damaged {SETTINGS}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file.path} has damaged {SETTINGS}: {repr(values)[:60]} is no table")
    settings = {}
    for part in dict.fromkeys(PREFIXES.values()):
        alpha, patterns, rank_stabilized = (
            values.get(f"{part}.{key}") for key in ("lora_alpha", "alpha_pattern", "use_rslora")
        )
        patterns = {} if patterns is None else patterns
        kind = values.get(f"{part}.peft_type", "LORA")
        if kind != "LORA":  # others have their settings under other names
            raise CheckpointError(f"{file.path} is a PEFT adapter of type {repr(kind)[:60]} for {part}; expected LORA")
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", pattern) for pattern in patterns):
            raise CheckpointError(f"{file.path} has damaged {SETTINGS}: {part}.alpha_pattern is no table of names")
        for number in (0 if alpha is None else alpha, *patterns.values()):
            if type(number) not in (int, float) or not abs(number) < 1e300:
                raise CheckpointError(
                    f"{file.path} has an alpha for {part} of {repr(number)[:60]}, expected a finite number"
                )
        settings[part] = Settings(alpha, patterns, bool(rank_stabilized))
    return settings
