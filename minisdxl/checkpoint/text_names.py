"""Official names of the text encoders' weights, which this package names as in diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from minisdxl.checkpoint.layouts import CLIP_LAYOUT, PARTS, TensorMapping, openclip_layout
from minisdxl.text import TextEncoders


def official_text_state(text: TextEncoders) -> dict[str, Tensor]:
    """All weights under the names and in the layout of the official single file."""
    state = {_part_and_name(name): tensor for name, tensor in text.state_dict().items()}
    return {
        PARTS[part].prefix + name: mapping.join([state[part, theirs] for theirs in mapping.names])
        for part, name, mapping in _mappings(text, state)
    }


def load_official_text_state(text: TextEncoders, official: Mapping[str, Tensor]) -> None:
    """Assigns (does not copy) weights named as by :func:`official_text_state`; also on the meta device.

    Raises:
        ValueError: for missing or unexpected names.
        RuntimeError: for tensors of another shape, from ``load_state_dict``.
    """
    ours = {_part_and_name(name): name for name in text.state_dict()}
    mappings = {PARTS[part].prefix + name: (part, mapping) for part, name, mapping in _mappings(text, ours)}
    missing, unexpected = sorted(mappings.keys() - official.keys()), sorted(official.keys() - mappings.keys())
    if missing or unexpected:
        raise ValueError(
            f"text encoder weights do not fit: {len(missing)} missing {missing[:5]}, "
            f"{len(unexpected)} unexpected {unexpected[:5]}"
        )
    state: dict[str, Tensor] = {}
    for name, (part, mapping) in mappings.items():
        tensors = mapping.split(official[name])
        for theirs, tensor in zip(mapping.names, tensors, strict=True):
            state[ours[part, theirs]] = tensor.contiguous()
    text.load_state_dict(state, strict=True, assign=True)


def _mappings(text: TextEncoders, names: Iterable[tuple[str, str]]) -> list[tuple[str, str, TensorMapping]]:
    """Part, official name and mapping of each official tensor that the parts' diffusers names make up."""
    layouts = {"text_encoder": CLIP_LAYOUT, "text_encoder_2": openclip_layout(text.configs[-1])}
    official = dict.fromkeys((part, layouts[part].official(name)) for part, name in names)
    return [(part, name, layouts[part].mapping(name)) for part, name in official]


def _part_and_name(name: str) -> tuple[str, str]:
    """The part that a weight of ``TextEncoders`` belongs to, and its name there, in diffusers' layout."""
    encoder, _, rest = name.partition(".")
    return "text_encoder" if encoder == "clip" else "text_encoder_2", rest
