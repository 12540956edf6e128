"""The names of one model in two layouts: the official single file, and a diffusers folder.

Both hold the same numbers in four parts. A table pairs the names of modules; a few loops over the config make it. What
follows a module's name (``.weight``, or the names inside a transformer layer) is the same in both. Three kinds of
tensors also differ in form: see :class:`TensorMapping`. Our text encoders are named as in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from minisdxl.config import ModelConfig, TextConfig, UNetConfig, VAEConfig


class Part(NamedTuple):
    """One of the parts of a model; its key in ``PARTS`` is the name of its sub-folder."""

    label: str
    prefix: str  # of its tensors in the single file
    weights: str  # its file in the sub-folder, without ``.safetensors``


PARTS = {
    "unet": Part("U-Net", "model.diffusion_model.", "diffusion_pytorch_model"),
    "vae": Part("VAE", "first_stage_model.", "diffusion_pytorch_model"),
    "text_encoder": Part("first text encoder", "conditioner.embedders.0.transformer.", "model"),
    "text_encoder_2": Part("second text encoder", "conditioner.embedders.1.model.", "model"),
}


REFINER_TEXT = "conditioner.embedders.0.model."  # the prefix of the refiner's only text encoder, SDXL's second


def model_parts(config: ModelConfig) -> list[str]:
    """The keys in ``PARTS`` of what a model has."""
    return [part for part in PARTS if part != "text_encoder" or not config.refines]


def file_name(official: str, config: ModelConfig) -> str:
    """The name of a tensor in the model's official file: the refiner has another prefix for its text encoder."""
    prefix = PARTS["text_encoder_2"].prefix
    return REFINER_TEXT + official.removeprefix(prefix) if config.refines and official.startswith(prefix) else official


@dataclass(frozen=True)
class TensorMapping:
    """The names and the form of an official tensor in another layout."""

    names: tuple[str, ...]  # one; or queries, keys and values, which OpenCLIP stacks
    transposed: bool = False  # OpenCLIP's projection is (in, out), a Linear's weight is (out, in)
    matrix: bool = False  # the VAE's attention has 1x1 convolutions officially, linear maps in diffusers

    def split(self, official: Tensor) -> tuple[Tensor, ...]:
        """Views of an official tensor as the tensors called ``names``: to be written, or to be filled."""
        if len(self.names) > 1:
            return official.chunk(len(self.names))
        return (official.T if self.transposed else official[..., 0, 0] if self.matrix else official,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The official tensor: the inverse of :meth:`split`."""
        if len(tensors) > 1:
            joined = tensors[0].new_empty((sum(map(len, tensors)), *tensors[0].shape[1:]))
            for view, tensor in zip(self.split(joined), tensors, strict=True):
                view.copy_(tensor)  # torch.cat would import the compiler for tensors without numbers
            return joined
        tensor = tensors[0]
        return tensor.T.contiguous() if self.transposed else tensor[..., None, None] if self.matrix else tensor


@dataclass(frozen=True)
class Layout:
    """The names of one part, without its prefix: diffusers' module or modules for each official one.

    Where a name in the table begins another one, the longer counts.
    """

    modules: Mapping[str, tuple[str, ...]]

    def mapping(self, official: str) -> TensorMapping:
        """Where diffusers has an official tensor. Raises ``KeyError`` for a name that no module of the table begins."""
        module, rest = _module(official, self.modules)
        return TensorMapping(
            tuple(name + rest for name in self.modules[module]),
            transposed=official == "text_projection",
            matrix=re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", official) is not None,
        )

    def official(self, name: str) -> str:
        """The official tensor that a tensor of diffusers is, or is part of. Raises ``KeyError`` as :meth:`mapping`."""
        module, rest = _module(name, self._inverse)
        return self._inverse[module] + rest

    @cached_property
    def _inverse(self) -> dict[str, str]:
        return {theirs: official for official, modules in self.modules.items() for theirs in modules}


def _module(name: str, modules: Mapping[str, object]) -> tuple[str, str]:
    """The longest beginning of a dotted name that is in the table, and what follows it."""
    module = name
    while module not in modules:
        module = module.rpartition(".")[0]
        if not module:
            raise KeyError(f"{name} has no name in the other layout")
    return module, name[len(module) :]


def _layout(table: Mapping[str, str]) -> Layout:
    return Layout({official: (theirs,) for official, theirs in table.items()})


_RESBLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_layout(config: UNetConfig) -> Layout:
    """Official blocks are numbered through, diffusers' by level; both number those of the way up as they run."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "time_embed.cond_proj": "time_embedding.cond_proj",  # of LCM U-Nets; no official file has it
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }

    def add_resblock(official: str, theirs: str) -> None:
        table.update({f"{official}.{ours}": f"{theirs}.{peer}" for ours, peer in _RESBLOCK.items()})

    add_resblock("middle_block.0", "mid_block.resnets.0")
    add_resblock("middle_block.2", "mid_block.resnets.1")
    number = 1
    for level, spec in enumerate(config.levels):
        for index in range(config.res_blocks):
            add_resblock(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{index}")
            if spec.depth:
                table[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{index}"
            number += 1
        table[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        number += 1
    number = 0
    for block, spec in enumerate(reversed(config.levels)):
        for index in range(config.res_blocks + 1):
            add_resblock(f"output_blocks.{number}.0", f"up_blocks.{block}.resnets.{index}")
            if spec.depth:
                table[f"output_blocks.{number}.1"] = f"up_blocks.{block}.attentions.{index}"
            number += 1
        after = 2 if spec.depth else 1
        table[f"output_blocks.{number - 1}.{after}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return _layout(table)


_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLDER_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def vae_layout(config: VAEConfig, attention: Mapping[str, str] = _ATTENTION) -> Layout:
    """Official levels are numbered by resolution, 0 being full size; diffusers' blocks of the way up as they run."""
    levels = len(config.multipliers)
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for coder, way, blocks in (("encoder", "down", config.res_blocks), ("decoder", "up", config.res_blocks + 1)):
        table |= {f"{coder}.{name}": f"{coder}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{coder}.norm_out"] = f"{coder}.conv_norm_out"
        resnets = {f"{coder}.mid.block_{index + 1}": f"{coder}.mid_block.resnets.{index}" for index in (0, 1)}
        middle = f"{coder}.mid_block.attentions.0"
        table |= {f"{coder}.mid.attn_1.{ours}": f"{middle}.{theirs}" for ours, theirs in attention.items()}
        for level in range(levels):
            theirs = f"{coder}.{way}_blocks.{level if way == 'down' else levels - 1 - level}"
            resnets |= {f"{coder}.{way}.{level}.block.{index}": f"{theirs}.resnets.{index}" for index in range(blocks)}
            table[f"{coder}.{way}.{level}.{way}sample.conv"] = f"{theirs}.{way}samplers.0.conv"
        table |= resnets | {f"{ours}.nin_shortcut": f"{theirs}.conv_shortcut" for ours, theirs in resnets.items()}
    return _layout(table)


CLIP_LAYOUT = Layout({"text_model": ("text_model",)})

_OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def openclip_layout(config: TextConfig) -> Layout:
    """OpenCLIP stacks queries, keys and values; positions and the projection are parameters without a module."""
    modules: dict[str, tuple[str, ...]] = {
        "token_embedding": ("text_model.embeddings.token_embedding",),
        "positional_embedding": ("text_model.embeddings.position_embedding.weight",),
        "ln_final": ("text_model.final_layer_norm",),
        "text_projection": ("text_projection.weight",),
    }
    for index in range(config.layers):
        official, theirs = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        modules |= {f"{official}.{ours}": (f"{theirs}.{peer}",) for ours, peer in _OPENCLIP_LAYER.items()}
        for kind in ("weight", "bias"):
            stacked = tuple(f"{theirs}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            modules[f"{official}.attn.in_proj_{kind}"] = stacked
    return Layout(modules)


def layout(part: str, config: ModelConfig) -> Layout:
    """The names of a part, one of ``PARTS``."""
    match part:
        case "unet":
            return unet_layout(config.unet)
        case "vae":
            return vae_layout(config.vae)
        case "text_encoder":
            return CLIP_LAYOUT
        case _:
            return openclip_layout(config.text[-1])


KeyVariant = Callable[[str], TensorMapping]  # an official name without its part's prefix, to where a file has it


def key_variants(part: str, config: ModelConfig) -> list[KeyVariant]:
    """All ways in which files name the tensors of a part, the official one first."""
    theirs = layout(part, config)
    ways: list[KeyVariant] = [_prefixed(PARTS[part].prefix), theirs.mapping]
    if part == "unet":
        ways += [_prefixed("diffusion_model."), _prefixed("")]
    elif part == "vae":
        ways += [_prefixed(""), vae_layout(config.vae, _OLDER_ATTENTION).mapping]
    elif config.refines:
        ways.append(_prefixed(REFINER_TEXT))
    else:  # transformers 5 saves a CLIPTextModel without ``text_model.``
        ways += [lambda name: _without_text_model(theirs.mapping(name)), _converted(PARTS[part].prefix)]
        inside = "clip_l.transformer." if part == "text_encoder" else "clip_g.transformer."
        ways += [_inside(prefix + inside, theirs) for prefix in ("", "text_encoders.")]  # of ComfyUI
    if part == "text_encoder_2":
        ways += [_prefixed(""), _projected(theirs)]
    return ways


def _prefixed(prefix: str) -> KeyVariant:
    return lambda name: TensorMapping((prefix + name,))


def _inside(prefix: str, layout: Layout) -> KeyVariant:
    def mapping(name: str) -> TensorMapping:
        found = layout.mapping(name)
        return replace(found, names=tuple(prefix + theirs for theirs in found.names))

    return mapping


def _projected(layout: Layout) -> KeyVariant:
    """The names of transformers with OpenCLIP's projection: what ComfyUI's older versions saved."""
    return lambda name: TensorMapping((name,)) if name == "text_projection" else layout.mapping(name)


def _converted(prefix: str) -> KeyVariant:
    """The names that diffusers' script ``convert_diffusers_to_original_sdxl.py`` writes, and how it differs.

    It leaves the projection as it is in diffusers, and the first text encoder as transformers saves it.
    """

    def mapping(name: str) -> TensorMapping:
        if name == "text_projection":
            return TensorMapping((f"{prefix}{name}.weight",), transposed=True)
        return TensorMapping((prefix + name.removeprefix("text_model."),))

    return mapping


def _without_text_model(mapping: TensorMapping) -> TensorMapping:
    return replace(mapping, names=tuple(name.removeprefix("text_model.") for name in mapping.names))
