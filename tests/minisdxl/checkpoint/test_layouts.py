"""The names of both layouts: against diffusers' and transformers' own modules, and diffusers' own conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from minisdxl.checkpoint.layouts import PARTS, Layout, key_variants, layout, vae_layout
from minisdxl.checkpoint.modules import official_shapes
from minisdxl.config import SDXL_BASE, SHAPES, ModelConfig
from tests import manifest
from tests.minisdxl.peers import diffusers_unet, diffusers_vae
from tests.minisdxl.published import OFFICIAL
from tests.minisdxl.tiny import TINY, tiny_modules

Shapes = dict[str, tuple[int, ...]]
UNUSED = ("position_ids", "logit_scale")


def published(part: str, kind: Callable[..., nn.Module]) -> nn.Module:
    """The published model's part, as its library builds it from the published JSON."""
    fields = {name: value for name, value in OFFICIAL[f"{part}/config.json"].items() if not name.startswith("_")}
    return kind(CLIPTextConfig(**fields)) if part.startswith("text") else kind(**fields)


def shapes_of(tensors: Iterable[tuple[str, Tensor]]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors}


PEERS: dict[str, Callable[..., Any]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@pytest.mark.parametrize("part", PARTS)
def test_full_size_names_map_one_to_one_in_both_directions(part: str) -> None:
    with torch.device("meta"):
        theirs = shapes_of(published(part, PEERS[part]).state_dict().items())
    if part.startswith("text"):  # releases of transformers differ in this prefix
        theirs = {
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": shape
            for name, shape in theirs.items()
        }
    official = {n: s for n, s in manifest.official_shapes(PARTS[part].prefix).items() if not n.endswith(UNUSED)}
    names = layout(part, SDXL_BASE)
    there: Shapes = {}
    for name, shape in official.items():
        place = names.mapping(name)
        for their_name, view in zip(place.names, place.split(torch.empty(shape, device="meta")), strict=True):
            assert their_name not in there, "two official tensors have one place"
            there[their_name] = tuple(view.shape)
    print(f"{part}: {len(official)} official tensors, {len(theirs)} of {PEERS[part].__name__}")
    assert there == theirs
    back: dict[str, list[str]] = {}
    for name in theirs:
        back.setdefault(names.official(name), []).append(name)
    assert back.keys() == official.keys()
    for name, parts in back.items():
        assert sorted(names.mapping(name).names) == sorted(parts)


def test_all_parts_together_are_the_manifest() -> None:
    counts = {part: len(manifest.official_shapes(PARTS[part].prefix)) for part in PARTS}
    print(counts)
    assert sum(counts.values()) == len(manifest.official_shapes()) == 2515


def places_of(modules: dict[str, Tensor], names: Layout) -> dict[str, Tensor]:
    """Official tensors in the other layout."""
    placed: dict[str, Tensor] = {}
    for name, tensor in modules.items():
        place = names.mapping(name)
        placed |= dict(zip(place.names, place.split(tensor), strict=True))
    return placed


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_numbers_are_where_diffusers_puts_them() -> None:
    modules = tiny_modules()
    unet, vae = modules.unet.state_dict(), modules.vae.state_dict()
    peer, peer_vae = diffusers_unet(modules.unet, size_channels=TINY.size_channels), diffusers_vae(modules.vae)
    same(places_of(unet, layout("unet", TINY)), peer.state_dict())
    same(places_of(vae, layout("vae", TINY)), peer_vae.state_dict())
    converted = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{n}": t for n, t in unet.items()}, dict(peer.config)
    )
    same(places_of(unet, layout("unet", TINY)), converted)
    converted = convert_ldm_vae_checkpoint({f"first_stage_model.{n}": t for n, t in vae.items()}, dict(peer_vae.config))
    same(
        places_of(vae, layout("vae", TINY)),
        {n: t.squeeze() if ".attentions." in n else t for n, t in converted.items()},
    )


@pytest.mark.parametrize("config", [TINY, SHAPES, SDXL_BASE], ids=lambda config: config.name)
def test_splitting_and_joining_undo_each_other(config: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = official_shapes(config)
    for part in PARTS:
        prefix, names = PARTS[part].prefix, layout(part, config)
        forms = set()
        for name, shape in shapes.items():
            if not name.startswith(prefix):
                continue
            place = names.mapping(name.removeprefix(prefix))
            forms.add((len(place.names), place.transposed, place.matrix))
            small = torch.Size(min(side, 6) for side in shape)  # of the same rank, and divisible by three
            official = torch.randn(small, generator=generator)
            assert torch.equal(place.join(place.split(official)), official)
            for view in place.split(official):  # what is written to a view is written to the official tensor
                view.fill_(7)
            assert official.eq(7).all()
        expected = {
            "vae": {(1, False, False), (1, False, True)},
            "text_encoder_2": {(1, False, False), (1, True, False), (3, False, False)},
        }
        assert forms == expected.get(part, {(1, False, False)})


def test_a_name_without_a_place_is_refused() -> None:
    for part in PARTS:
        for way in (layout(part, TINY).mapping, layout(part, TINY).official):
            with pytest.raises(KeyError, match=r"adapter\.weight has no name in the other layout"):
                way("adapter.weight")


def test_all_spellings_of_a_name() -> None:
    def spelled(part: str, name: str) -> set[str]:
        return {spelling(name).names[0] for spelling in key_variants(part, SDXL_BASE)}

    assert spelled("unet", "input_blocks.4.1.proj_in.weight") == {
        "model.diffusion_model.input_blocks.4.1.proj_in.weight",
        "diffusion_model.input_blocks.4.1.proj_in.weight",
        "input_blocks.4.1.proj_in.weight",
        "down_blocks.1.attentions.0.proj_in.weight",
    }
    assert spelled("vae", "decoder.mid.attn_1.proj_out.weight") == {
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "decoder.mid.attn_1.proj_out.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.mid_block.attentions.0.proj_attn.weight",
    }
    assert spelled("text_encoder", "text_model.encoder.layers.3.mlp.fc1.bias") == {
        "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.bias",
        "conditioner.embedders.0.transformer.encoder.layers.3.mlp.fc1.bias",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.bias",
        "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.bias",
        "text_model.encoder.layers.3.mlp.fc1.bias",
        "encoder.layers.3.mlp.fc1.bias",
    }
    assert spelled("text_encoder_2", "ln_final.bias") == {
        "conditioner.embedders.1.model.ln_final.bias",
        "ln_final.bias",
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias",
        "clip_g.transformer.text_model.final_layer_norm.bias",
        "text_model.final_layer_norm.bias",
        "final_layer_norm.bias",
    }


def test_older_names_of_the_vae_attention_are_those_that_diffusers_still_reads() -> None:
    """diffusers renames them when it loads; here its renamed model must hold what the older names say."""
    vae = tiny_modules().vae
    peer = diffusers_vae(vae)
    older = places_of(
        vae.state_dict(),
        vae_layout(TINY.vae, {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}),
    )
    renamed = {
        name.replace(".query.", ".to_q.")
        .replace(".key.", ".to_k.")
        .replace(".value.", ".to_v.")
        .replace(".proj_attn.", ".to_out.0."): tensor
        for name, tensor in older.items()
    }
    assert len(set(older) - set(renamed)) == 2 * 4 * 2
    same(renamed, peer.state_dict())
