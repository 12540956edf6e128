"""LoRAs merged at load: against diffusers and PEFT, a float64 reference, invariants, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minisdxl
from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.lora import LoRA, open_loras
from minisdxl.checkpoint.modules import Modules, load, official_shapes, official_state_dict, open_source, without_memory
from minisdxl.config import SDXL_BASE
from minisdxl.pipeline import SDXL
from minisdxl.text import TextEmbeddings, TextEncoders
from tests.minisdxl.peers import diffusers_unet
from tests.minisdxl.test_pipeline import diffusers_pipeline
from tests.minisdxl.tiny import TINY, VOCABULARY, sparse_file, tiny_file

Tensors = dict[str, Tensor]
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class Matrices:
    """The change of one module."""

    down: Tensor
    up: Tensor
    alpha: float | None

    def product(self) -> Tensor:
        """What is added to the weight at scale 1, in float64, rank by rank."""
        rank = len(self.down)
        down, up = self.down.double(), self.up.double().flatten(1)
        terms = [torch.einsum("o,i...->oi...", up[:, index], down[index]) for index in range(rank)]
        return torch.stack(terms).sum(0) * (1 if self.alpha is None else self.alpha / rank)


Changes = dict[tuple[str, str], Matrices]  # by part and module
Names = Mapping[tuple[str, str], Tensor]  # weights by part and module


def modules_of(part: str, module: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Weights of linear maps and convolutions, under the names that files have for them.

    The first text encoder of transformers 5 has no ``text_model.`` before its own names.
    """
    found = {name: each.weight for name, each in module.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    prefix = "text_model."
    return {
        (part, name if part == "unet" or name.startswith(("text_model.", "text_projection")) else prefix + name): weight
        for name, weight in found.items()
    }


def draw(weights: Names, alphas: Sequence[float] = (), dtype: torch.dtype = torch.float32) -> Changes:
    """Changes about half as large as the weights, of ranks from 1 to more than the weights have.

    Without alphas the rank counts. The projection of the text has the most frequent rank: diffusers reads no other.
    """
    changes = {}
    for number, (name, weight) in enumerate(weights.items()):
        rank = 4 if name[1] == "text_projection" else (4, 1, 4, 70, 4, 7)[number % 6]
        alpha = alphas[number % len(alphas)] if alphas else None
        down = torch.randn(rank, *weight.shape[1:]) / math.sqrt(weight[0].numel())
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2)) * 0.3 * math.sqrt(rank) / (alpha or rank)
        changes[name] = Matrices(down.to(dtype), up.to(dtype), alpha)
    return changes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def plain(base: Path) -> SDXL:
    return minisdxl.load(base, tokenizer=VOCABULARY)


@pytest.fixture(scope="module")
def untouched(plain: SDXL) -> StableDiffusionXLPipeline:
    return diffusers_pipeline(plain)


@pytest.fixture
def peer(untouched: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """diffusers' pipeline with the weights of ``base``, by diffusers' own conversions."""
    return copy.deepcopy(untouched)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def targets(peer: StableDiffusionXLPipeline) -> Names:
    """All that a LoRA can change, by diffusers' names."""
    found: dict[tuple[str, str], Tensor] = {}
    for part in KOHYA:
        found |= modules_of(part, getattr(peer, part))
    return found


def official_targets(plain: SDXL, peer: StableDiffusionXLPipeline) -> Names:
    """The same with official names for the U-Net, which our U-Net has; the text encoders' stay transformers'."""
    texts = {name: weight for name, weight in targets(peer).items() if name[0] != "unet"}
    return modules_of("unet", plain.unet) | texts


def kohya(changes: Changes) -> Tensors:
    tensors: Tensors = {}
    for (part, name), change in changes.items():
        flat = KOHYA[part] + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": change.down, f"{flat}.lora_up.weight": change.up}
        tensors |= {} if change.alpha is None else {f"{flat}.alpha": torch.tensor(change.alpha)}
    return tensors


def peft(changes: Changes) -> Tensors:
    tensors: Tensors = {}
    for (part, name), change in changes.items():
        tensors |= {f"{part}.{name}.lora_A.weight": change.down, f"{part}.{name}.lora_B.weight": change.up}
    return tensors


def older(changes: Changes) -> Tensors:
    tensors: Tensors = {}
    for (part, name), change in changes.items():
        style = "lora" if part == "unet" or name == "text_projection" else "lora_linear_layer"
        tensors |= {
            f"{part}.{name}.{style}.down.weight": change.down,
            f"{part}.{name}.{style}.up.weight": change.up,
        }
    return tensors


def oldest(changes: Changes) -> Tensors:
    """As the first training scripts had it: in attention processors."""
    own = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    tensors: Tensors = {}
    for (part, name), change in changes.items():
        parent, last = re.fullmatch(r"(.+?)\.(to_out\.0|\w+)", name).groups()  # type: ignore[union-attr]
        where = f"{part}.{parent}{'.processor' if part == 'unet' else ''}.{own.get(last, last)}_lora"
        tensors |= {f"{where}.down.weight": change.down, f"{where}.up.weight": change.up}
    return tensors


@dataclass(frozen=True)
class Style:
    """A way in which files are written."""

    write: Callable[[Changes], Tensors]
    with_alpha: bool = False
    official: bool = False  # names of the U-Net's modules
    modules: str = ""  # expression for those that it has
    unread: str = "^$"  # expression for those that diffusers does not read in this style

    def choose(self, plain: SDXL, peer: StableDiffusionXLPipeline) -> Names:
        names = official_targets(plain, peer) if self.official else targets(peer)
        return {name: weight for name, weight in names.items() if re.search(self.modules, name[1])}


STYLES = {
    "kohya": Style(kohya, with_alpha=True, unread="^add_embedding"),
    "kohya without alpha": Style(kohya, unread="^add_embedding"),
    "kohya with official names": Style(kohya, with_alpha=True, official=True),
    "PEFT": Style(peft),
    "older diffusers": Style(older),
    "oldest diffusers": Style(oldest, modules=r"\.attn\d\.|\.self_attn\."),
}


def written(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}) or None)
    return path


@torch.no_grad()
def outputs(model: SDXL | StableDiffusionXLPipeline) -> Tensors:
    """What U-Net and text encoders give for some random numbers."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, context, pooled = randn(2, 4, 16, 16), randn(2, 7, TINY.unet.context_channels), randn(2, 20)
    sizes, timestep = torch.randint(0, 100, (2, 6), generator=generator), torch.tensor([900, 20])
    ids = torch.randint(0, 638, (2, 77), generator=generator)
    ids[:, 9:] = TINY.text[0].end_token
    if isinstance(model, SDXL):
        assert isinstance(model.text, TextEncoders)
        vector = TextEmbeddings(context, pooled).vector(sizes, TINY.size_channels)
        words = model.text(ids, ids)
        widths = [text.width for text in TINY.text]
        clip, openclip = words.context.split(widths, dim=-1)
        return {"U-Net": model.unet(x, timestep, context, vector), "CLIP": clip, "OpenCLIP": openclip} | {
            "pooled": words.pooled
        }
    told = {"text_embeds": pooled, "time_ids": sizes}
    second = model.text_encoder_2(ids, output_hidden_states=True)
    return {
        "U-Net": model.unet(x, timestep, context, added_cond_kwargs=told).sample,
        "CLIP": model.text_encoder(ids, output_hidden_states=True).hidden_states[-2],
        "OpenCLIP": second.hidden_states[-2],
        "pooled": second.text_embeds,
    }


def compare(ours: SDXL, theirs: StableDiffusionXLPipeline, before: SDXL, changed: Iterable[str]) -> None:
    """That all outputs are equal, and those ``changed`` are not what they were."""
    start, expected = outputs(before), outputs(theirs)
    for name, output in outputs(ours).items():
        size = expected[name].abs().max()
        error, effect = ((output - other[name]).abs().max() / size for other in (expected, start))
        print(f"{name}: max error {error:.1e} of its largest value, the LoRA's effect {effect:.2f}")
        assert error <= 1e-5
        assert (effect > 0.05) == (name in changed)


EVERYTHING = ("U-Net", "CLIP", "OpenCLIP", "pooled")


@pytest.mark.parametrize("name", STYLES)
def test_outputs_equal_diffusers(
    tmp_path: Path, base: Path, plain: SDXL, peer: StableDiffusionXLPipeline, name: str
) -> None:
    """One alpha for all: diffusers does not find those of kohya's modules where they differ."""
    style = STYLES[name]
    names = {each: weight for each, weight in style.choose(plain, peer).items() if not re.search(style.unread, each[1])}
    path = written(tmp_path / "lora.safetensors", style.write(draw(names, (6.0,) if style.with_alpha else ())))
    ours = minisdxl.load(base, tokenizer=VOCABULARY, loras=[f"{path}:0.7"])
    peer.load_lora_weights(str(path))
    peer.fuse_lora(lora_scale=0.7)
    compare(ours, peer, plain, EVERYTHING)


def test_several_equal_diffusers(tmp_path: Path, base: Path, plain: SDXL, peer: StableDiffusionXLPipeline) -> None:
    names = targets(peer)
    loras = []
    for number, (scale, part) in enumerate((("0.7", "unet"), ("-0.4", "unet"), ("1", "text_encoder_2"))):
        tensors = peft(draw({name: weight for name, weight in names.items() if name[0] == part}))
        path = written(tmp_path / f"{number}.safetensors", tensors)
        loras.append(f"{path}:{scale}")
        peer.load_lora_weights(str(path), adapter_name=str(number))
    peer.set_adapters(["0", "1", "2"], [0.7, -0.4, 1.0])
    peer.fuse_lora()
    ours = minisdxl.load(base, tokenizer=VOCABULARY, loras=loras)
    compare(ours, peer, plain, ("U-Net", "OpenCLIP", "pooled"))


def write_peft(path: Path, pipeline: StableDiffusionXLPipeline) -> Path:
    """What diffusers' own functions write of adapters that PEFT made: alphas and ranks as metadata."""
    arguments: dict[str, Any] = {}
    for part in KOHYA:
        module = getattr(pipeline, part)
        names = [name for name, each in module.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        config = LoraConfig(
            r=4,
            lora_alpha=3,
            target_modules=names,
            rank_pattern={f"^{names[0]}": 3, "to_k": 9, "v_proj": 5},
            alpha_pattern={f"^{names[0]}": 2, "attn1.to_k": 7, "to_k": 4, "v_proj": 6},
            use_rslora=part == "text_encoder_2",
        )
        module.add_adapter(config, "default")
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.2)
        state = get_peft_model_state_dict(module, adapter_name="default")
        arguments[f"{part}_lora_layers"] = state if part == "unet" else convert_state_dict_to_diffusers(state)
        arguments[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(path.parent, weight_name=path.name, **arguments)
    return path


def test_what_diffusers_and_peft_write_is_read(
    tmp_path: Path, base: Path, plain: SDXL, peer: StableDiffusionXLPipeline
) -> None:
    path = write_peft(tmp_path / "lora.safetensors", copy.deepcopy(peer))
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        print(len(file.keys()), sorted(file.keys())[:2], {k: v for k, v in settings.items() if "alpha" in k})
    assert settings["unet.alpha_pattern"]["attn1.to_k"] == 7
    ours = minisdxl.load(base, tokenizer=VOCABULARY, loras=[path])
    peer.load_lora_weights(str(path))
    peer.fuse_lora()
    compare(ours, peer, plain, EVERYTHING)


def weights_by_diffusers(modules: Modules, peer: StableDiffusionXLPipeline, official: bool) -> Tensors:
    """Weights by part and diffusers' name, by diffusers' own conversions; the U-Net's may keep their official names."""
    state = official_state_dict(modules)
    clip, openclip = (PARTS[part].prefix for part in ("text_encoder", "text_encoder_2"))
    parts = {
        "unet": (modules.unet if official else diffusers_unet(modules.unet, TINY.size_channels)).state_dict(),
        "text_encoder": {name.removeprefix(clip): each for name, each in state.items() if name.startswith(clip)},
        "text_encoder_2": convert_open_clip_checkpoint(peer.text_encoder_2, dict(state), prefix=openclip),
    }
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("kohya", torch.float16),
        ("kohya", torch.float32),
        ("kohya without alpha", torch.float64),
        ("kohya with official names", torch.bfloat16),
        ("PEFT", torch.float16),
        ("older diffusers", torch.float32),
        ("oldest diffusers", torch.float32),
    ],
)
def test_merged_weights_equal_float64(
    tmp_path: Path,
    base: Path,
    plain: SDXL,
    untouched: StableDiffusionXLPipeline,
    name: str,
    stored: torch.dtype,
) -> None:
    style = STYLES[name]
    changes = draw(style.choose(plain, untouched), (2.0, 0.5, 8.0) if style.with_alpha else (), stored)
    path = written(tmp_path / "lora.safetensors", style.write(changes))

    def weights(dtype: torch.dtype, *loras: LoRA) -> Tensors:
        return weights_by_diffusers(load(base, dtype=dtype, loras=loras)[1], untouched, style.official)

    before = weights(torch.float64)
    for scale in (0.7, 1e-2):
        expected = {
            f"{part}.{module}.weight": before[f"{part}.{module}.weight"] + scale * change.product()
            for (part, module), change in changes.items()
        }
        after = weights(torch.float64, LoRA(path, scale))
        assert {each for each in before if not torch.equal(after[each], before[each])} == expected.keys()
        for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 2e-7)):
            after = weights(dtype, LoRA(path, scale))
            error = max(float((after[each] - tensor).abs().max()) for each, tensor in expected.items())
            change = max(float((tensor - before[each]).abs().max()) for each, tensor in expected.items())
            print(
                f"{len(expected)} weights, scale {scale}, {dtype}: max error {error:.1e} of changes up to {change:.1e}"
            )
            assert error <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_rounded_once(
    tmp_path: Path, base: Path, plain: SDXL, untouched: StableDiffusionXLPipeline, dtype: torch.dtype
) -> None:
    names = official_targets(plain, untouched)
    both = [draw(names), draw(names)]
    loras = [LoRA(written(tmp_path / f"{number}.safetensors", kohya(each)), 0.5) for number, each in enumerate(both)]
    before = weights_by_diffusers(load(base, dtype=dtype)[1], untouched, official=True)
    after = weights_by_diffusers(load(base, dtype=dtype, loras=loras)[1], untouched, official=True)
    wrong, total = 0, 0
    for part, module in names:
        weight = f"{part}.{module}.weight"
        exact = before[weight].double() + sum(0.5 * each[part, module].product() for each in both)
        assert after[weight].dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2
        assert (after[weight].double() - exact).abs().le(exact.abs() * half_a_step * 1.001 + 1e-7).all()
        wrong, total = wrong + int((after[weight] != exact.to(dtype)).sum()), total + exact.numel()
    print(f"{wrong} of {total} values are not those of float64, rounded")
    assert wrong < 1e-3 * total


def state(base: Path, *loras: LoRA, dtype: torch.dtype = torch.float32) -> Tensors:
    return official_state_dict(load(base, dtype=dtype, loras=loras)[1])


def difference(one: Tensors, other: Tensors) -> float:
    """Largest of all values."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def files(plain: SDXL, untouched: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files for all weights."""
    folder = tmp_path_factory.mktemp("loras")
    torch.manual_seed(2)
    return [written(folder / f"{n}.safetensors", kohya(draw(targets(untouched), (2.0, 5.0)))) for n in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_0_changes_no_bit(base: Path, files: list[Path], dtype: torch.dtype) -> None:
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    before, after = state(base, dtype=dtype), state(base, *(LoRA(file, 0.0) for file in files), dtype=dtype)
    for name, tensor in before.items():
        bits, expected = (each.contiguous().view(integers[each.dtype]) for each in (after[name], tensor))
        assert torch.equal(bits, expected), name


def test_what_is_added_can_be_taken_away(base: Path, files: list[Path]) -> None:
    before = state(base)
    changed = difference(state(base, LoRA(files[0], 0.8)), before)
    error = difference(state(base, LoRA(files[0], 0.8), LoRA(files[0], -0.8)), before)
    print(f"+0.8, then -0.8: max difference {error:.1e} of a change of {changed:.1f}")
    assert error < 1e-6 < 0.1 < changed


def test_order_does_not_matter(base: Path, files: list[Path]) -> None:
    loras = [LoRA(file, scale) for file, scale in zip(files, (0.8, -0.3, 2.0), strict=True)]
    error = difference(state(base, *loras), state(base, *reversed(loras)))
    print(f"three in the other order: max difference {error:.1e}")
    assert error < 2e-6


def test_the_vae_and_biases_stay(base: Path, files: list[Path]) -> None:
    before, after = state(base), state(base, LoRA(files[0]))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    print(len(changed), "of", len(before), "tensors change")
    assert all(before[name].ndim > 1 for name in changed)
    assert not any(name.startswith(PARTS["vae"].prefix) for name in changed)


def test_a_mapped_file_stays_as_it_is(base: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, content = state(base, LoRA(files[0])), base.read_bytes()
    monkeypatch.setattr("minisdxl.checkpoint.tensorfile.MAPPED", 0)
    assert difference(state(base, LoRA(files[0])), expected) == 0
    assert base.read_bytes() == content


def test_names_without_a_part_are_the_unets(tmp_path: Path, base: Path, peer: StableDiffusionXLPipeline) -> None:
    names = {name: weight for name, weight in targets(peer).items() if name[0] == "unet" and ".attn" in name[1]}
    for write in (peft, oldest):
        tensors = write(draw(names))
        with_part = written(tmp_path / "with.safetensors", tensors)
        bare = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
        without = written(tmp_path / "without.safetensors", bare)
        assert difference(state(base, LoRA(with_part)), state(base, LoRA(without))) == 0


SPELLINGS: dict[str, Mapping[str, str]] = {
    "PEFT's named adapters": {".lora_A.": ".lora_A.default.", ".lora_B.": ".lora_B.default."},
    "adapters of other names": {".lora_A.": ".lora_A.my-style_1.", ".lora_B.": ".lora_B.my-style_1."},
    "ComfyUI": {
        "text_encoder.": "text_encoders.clip_l.transformer.",
        "text_encoder_2.": "text_encoders.clip_g.transformer.",
    },
    "ComfyUI without its prefix": {"text_encoder.": "clip_l.transformer.", "text_encoder_2.": "clip_g.transformer."},
    "OMI": {"text_encoder.": "clip_l.", "text_encoder_2.": "clip_g."},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_other_trainers_are_read(
    tmp_path: Path, base: Path, peer: StableDiffusionXLPipeline, name: str
) -> None:
    ours = peft(draw(targets(peer)))
    theirs = dict(ours)
    for old, new in SPELLINGS[name].items():
        theirs = {each.replace(old, new, 1): tensor for each, tensor in theirs.items()}
    assert theirs.keys() != ours.keys()
    files = [written(tmp_path / f"{n}.safetensors", tensors) for n, tensors in enumerate((ours, theirs))]
    assert difference(state(base, LoRA(files[0])), state(base, LoRA(files[1]))) == 0


def test_lycoris_spelling_is_read(tmp_path: Path, base: Path, peer: StableDiffusionXLPipeline) -> None:
    """As SimpleTuner has it: names of diffusers for the U-Net alone."""
    ours = kohya(draw({name: weight for name, weight in targets(peer).items() if name[0] == "unet"}, (2.0,)))
    theirs = {name.replace("lora_unet_", "lycoris_", 1): tensor for name, tensor in ours.items()}
    files = [written(tmp_path / f"{n}.safetensors", tensors) for n, tensors in enumerate((ours, theirs))]
    assert difference(state(base, LoRA(files[0])), state(base, LoRA(files[1]))) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_is_read_as_what_it_says(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    stored = {
        name: tensor.to(dtype) if name.endswith(".weight") else tensor
        for name, tensor in kohya(
            {("unet", "middle_block.1.proj_in"): Matrices(torch.randn(4, 24), torch.randn(24, 4), 2.0)}
        ).items()
    }
    plain = {name: tensor.float() for name, tensor in stored.items()}
    files = [written(tmp_path / f"{n}.safetensors", tensors) for n, tensors in enumerate((stored, plain))]
    assert difference(state(base, LoRA(files[0])), state(base, LoRA(files[1]))) == 0
    assert difference(state(base, LoRA(files[0])), state(base)) > 0.1


def test_a_bundled_embedding_changes_no_weight(tmp_path: Path, base: Path) -> None:
    embeddings = {
        "bundle_emb.my-style.clip_l": torch.ones(3, 16),
        "bundle_emb.my-style.clip_g": torch.ones(3, 24),
        "bundle_emb.other.string_to_param.*": torch.ones(1, 16),
    }
    path = written(tmp_path / "x.safetensors", good() | embeddings)
    with_them = state(base, LoRA(path))
    assert difference(with_them, state(base, LoRA(written(tmp_path / "y.safetensors", good())))) == 0
    alone = written(tmp_path / "z.safetensors", embeddings)
    assert refusal(base, alone).startswith("is a textual inversion embedding; expected a LoRA")


def test_a_folder_of_diffusers_is_read(tmp_path: Path, base: Path) -> None:
    path = written(tmp_path / "pytorch_lora_weights.safetensors", good())
    assert difference(state(base, LoRA(tmp_path)), state(base, LoRA(path))) == 0
    with pytest.raises(
        CheckpointError, match=r"is the folder of a LoRA \(pytorch_lora_weights.safetensors\), which goes"
    ):
        load(tmp_path)


def test_comfyui_spelling_is_read(tmp_path: Path, base: Path, plain: SDXL) -> None:
    changes = draw(modules_of("unet", plain.unet))
    ours = peft(changes)
    theirs = {name.replace("unet.", "diffusion_model.", 1): tensor for name, tensor in ours.items()}
    files = [written(tmp_path / f"{n}.safetensors", tensors) for n, tensors in enumerate((ours, theirs))]
    assert difference(state(base, LoRA(files[0])), state(base, LoRA(files[1]))) == 0


def test_diffusers_conversion_to_kohya_is_read(tmp_path: Path, base: Path, peer: StableDiffusionXLPipeline) -> None:
    """It writes alphas as whole numbers, equal to the rank."""
    tensors = peft(draw(targets(peer)))
    converted = convert_state_dict_to_kohya(dict(tensors))
    assert {each.dtype for name, each in converted.items() if name.endswith(".alpha")} == {torch.int64}
    files = [written(tmp_path / f"{n}.safetensors", each) for n, each in enumerate((tensors, converted))]
    assert difference(state(base, LoRA(files[0])), state(base, LoRA(files[1]))) == 0


def test_matrices_and_1x1_convolutions_are_one(tmp_path: Path, base: Path, peer: StableDiffusionXLPipeline) -> None:
    tensors = kohya(draw(targets(peer), (2.0,)))

    def turned(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(".alpha"):
            return tensor[None]
        return (
            tensor[..., None, None] if tensor.ndim == 2 else tensor[..., 0, 0] if tensor.shape[2:] == (1, 1) else tensor
        )

    other = {name: turned(name, tensor) for name, tensor in tensors.items()}
    assert any(
        each.shape != tensors[name].shape for name, each in other.items() if "skip" in name or "shortcut" in name
    )
    files = [written(tmp_path / f"{n}.safetensors", each) for n, each in enumerate((tensors, other))]
    assert difference(state(base, LoRA(files[0])), state(base, LoRA(files[1]))) == 0


def test_every_weight_of_sdxl_has_its_names(tmp_path: Path) -> None:
    """In both key_variants of kohya's scripts for SDXL: no two weights share one, and all are reached."""
    shapes = official_shapes(SDXL_BASE)
    official = {
        name: shape for name, shape in shapes.items() if name.startswith(PARTS["unet"].prefix) and len(shape) > 1
    }
    with torch.device("meta"):
        peer = diffusers_unet(without_memory(SDXL_BASE).unet, SDXL_BASE.size_channels)
    theirs = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items() if tensor.ndim > 1}
    assert len(theirs) == len(official)
    reached = []
    for names in (official, theirs):
        pairs: dict[str, tuple[int, ...]] = {}
        for name, (out, *inner) in names.items():
            module = name.removeprefix(PARTS["unet"].prefix).removesuffix(".weight").replace(".", "_")
            pairs[f"lora_unet_{module}.lora_down.weight"] = (2, *inner)
            pairs[f"lora_unet_{module}.lora_up.weight"] = (out, 2, *[1] * len(inner[1:]))
        assert len(pairs) == 2 * len(names)
        path = sparse_file(tmp_path / "lora.safetensors", pairs)
        reached.append({each.target.official for each in open_loras([LoRA(path)], SDXL_BASE, shapes)})
    print(len(official), "linear maps and convolutions")
    assert reached[0] == reached[1] == official.keys()


@pytest.mark.parametrize(
    ("text", "path", "scales"),
    [
        ("x.safetensors", "x.safetensors", ()),
        ("x.safetensors:0.8", "x.safetensors", (0.8,)),
        ("x.safetensors:-1e-2", "x.safetensors", (-0.01,)),
        ("x.safetensors:0.8:0.5", "x.safetensors", (0.8, 0.5)),
        ("x.safetensors:1:-.5", "x.safetensors", (1.0, -0.5)),
        ("x.safetensors:1:2:3", "x.safetensors:1", (2.0, 3.0)),
        ("a:b/x.safetensors", "a:b/x.safetensors", ()),
        ("a:b/x.safetensors:2", "a:b/x.safetensors", (2.0,)),
        ("a:b/x.safetensors:2:0", "a:b/x.safetensors", (2.0, 0.0)),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", ()),
        (r"C:\loras\x.safetensors:.5", r"C:\loras\x.safetensors", (0.5,)),
        (r"C:\loras\x.safetensors:.5:1", r"C:\loras\x.safetensors", (0.5, 1.0)),
        ("lora:v2", "lora:v2", ()),
        ("lora:v2:2:1", "lora:v2", (2.0, 1.0)),
        (":0.5", ":0.5", ()),
    ],
)
def test_scales_follow_the_last_colons(text: str, path: str, scales: tuple[float, ...]) -> None:
    assert LoRA.parse(text) == LoRA(Path(path), *scales)


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    for name in ("x.safetensors:old", "x:2"):
        path = tmp_path / name
        path.touch()
        assert LoRA.parse(str(path)) == LoRA(path)
        assert LoRA.parse(f"{path}:0.5") == LoRA(path, 0.5)
        assert LoRA.parse(f"{path}:0.5:2") == LoRA(path, 0.5, 2.0)


def test_each_scale_is_for_its_parts(base: Path, files: list[Path]) -> None:
    """The first for the U-Net, the second for both text encoders."""
    both, mixed = state(base, LoRA(files[0], 0.5)), state(base, LoRA(files[0], 0.5, -2.0))
    other = state(base, LoRA(files[0], -2.0))
    for name, tensor in mixed.items():
        assert torch.equal(tensor, (other if name.startswith("conditioner.") else both)[name]), name
    assert difference(mixed, both) > 0.1 < difference(mixed, other)


@pytest.mark.parametrize("scale", ["abc", "", "nan", "-inf"])
@pytest.mark.parametrize("around", ["{}", "1:{}", "{}:1"])
def test_scale_that_is_no_finite_number_is_refused(base: Path, scale: str, around: str) -> None:
    with pytest.raises(
        ValueError, match=rf"scale of x\.safetensors is '?{scale}'?, expected a (finite )?number, such as"
    ):
        minisdxl.load(base, tokenizer=VOCABULARY, loras=[f"x.safetensors:{around.format(scale)}"])


def refusal(base: Path, path: Path) -> str:
    """The one line of a file that cannot be merged, found before the weights are read."""
    source = open_source(base)
    with pytest.raises(CheckpointError) as caught:
        open_loras([LoRA(path)], source.config, source.shapes)
    message = str(caught.value)
    print(message)
    assert message.startswith((str(path), f"cannot read {path}"))
    assert "\n" not in message
    return message.removeprefix(str(path)).strip()


Q = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_middle_block_0_in_layers_2"


def good() -> Tensors:
    """A linear map and a convolution of the tiny model, (24, 24) and (24, 24, 3, 3)."""
    return {
        f"{Q}.lora_down.weight": torch.ones(4, 24),
        f"{Q}.lora_up.weight": torch.ones(24, 4),
        f"{Q}.alpha": torch.tensor(2.0),
        f"{CONV}.lora_down.weight": torch.ones(2, 24, 3, 3),
        f"{CONV}.lora_up.weight": torch.ones(24, 2, 1, 1),
        f"{CONV}.alpha": torch.tensor(2.0),
    }


def test_the_file_that_is_then_spoilt_is_good(tmp_path: Path, base: Path) -> None:
    before, after = state(base), state(base, LoRA(written(tmp_path / "x.safetensors", good())))
    print(difference(after, before))
    assert difference(after, before) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{Q}.oft_blocks", "an OFT"),
        (f"{Q}.oft_diag", "an OFT"),
        (f"{Q}.boft_R", "a BOFT"),
        (f"{Q}.a1.weight", "a GLoRA"),
        (f"{Q}.lambda_layer", "a T-LoRA"),
        ("text_encoder.text_model.embeddings.token_embedding.lora_embedding_A", "a LoRA of token embeddings"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.bias", "a LoRA with biases"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.default.bias", "a LoRA with biases"),
        ("lora_controlnet", "a Control-LoRA"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", "a PEFT adapter"),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
            "a LoRA for a Stable Diffusion 1.x or 2.x model",
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "a LoRA for a Flux model"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA for a Flux model"),
        ("lora_transformer_single_transformer_blocks_0_proj_mlp.lora_up.weight", "a LoRA for a Flux model"),
        ("lora_unet_joint_blocks_0_context_block_mlp_fc1.lora_up.weight", "a LoRA for a Stable Diffusion 3 model"),
        (
            "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight",
            "a LoRA for a Stable Diffusion 3 or Flux model",
        ),
        ("diffusion_model.blocks.0.cross_attn.k.lora_A.weight", "a LoRA for a Wan model"),
        ("lora_unet_blocks_0_ffn_0.lora_down.weight", "a LoRA for a Wan model"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "a LoRA for a Wan model"),
        ("transformer_blocks.0.img_mod.1.lora_A.default.weight", "a LoRA for a Qwen-Image model"),
        ("lora_unet_transformer_blocks_3_txt_mlp_net_0_proj.lora_up.weight", "a LoRA for a Qwen-Image model"),
        ("diffusion_model.layers.0.attention.qkv.lora_A.weight", "a LoRA for a Z-Image model"),
        ("diffusion_model.context_refiner.1.feed_forward.w1.lora_A.weight", "a LoRA for a Z-Image model"),
        ("transformer.double_blocks.0.img_mod.linear.lora_A.weight", "a LoRA for a HunyuanVideo model"),
        ("lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight", "a LoRA for a HunyuanVideo model"),
        ("lora_prior_unet_blocks_x.lora_down.weight", "a LoRA for a Stable Cascade model"),
        ("transformer.something.else.lora_A.weight", "a LoRA for a diffusion transformer"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, base: Path, name: str, what: str) -> None:
    """With a good LoRA in the same file, and alone, where no file is called what was expected."""
    for beside in (good(), {}):
        message = refusal(base, written(tmp_path / "x.safetensors", beside | {name: torch.ones(2, 2)}))
        assert message.startswith(f"is {what}")
        assert "is a LoRA;" not in message


def test_loras_for_older_models_are_named_in_a_short_line(tmp_path: Path, base: Path) -> None:
    """As kohya's scripts write one for the U-Net alone, by the names of diffusers' conversion."""
    for width, version in ((768, "1.x"), (1024, "2.x")):
        tensors: Tensors = {}
        for block in ("down_blocks_0", "down_blocks_1", "up_blocks_3"):
            attention = f"lora_unet_{block}_attentions_0_transformer_blocks_0"
            for module, wide in (("attn1_to_q", 320), ("attn2_to_k", width), ("attn2_to_v", width)):
                tensors |= {
                    f"{attention}_{module}.lora_down.weight": torch.ones(4, wide),
                    f"{attention}_{module}.lora_up.weight": torch.ones(320, 4),
                    f"{attention}_{module}.alpha": torch.tensor(4.0),
                }
        path = written(tmp_path / "x.safetensors", tensors)
        message = refusal(base, path)
        assert message.startswith(f"is a LoRA for a Stable Diffusion {version} model; expected a LoRA for tiny")
        assert len(message) < 150
        renamed = {
            name.replace("lora_unet_", "unet.").replace("_blocks_", "_blocks.").replace(".lora_down", ".lora_A"): tensor
            for name, tensor in tensors.items()
            if "attn1" in name
        }
        assert "1.x or 2.x" in refusal(base, written(tmp_path / "y.safetensors", renamed))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {f"lora_unet_output_blocks_{n}_1_proj_in.lora_up.weight": torch.ones(2, 2) for n in range(90, 97)},
            "does not fit tiny: 7 unexpected tensors (lora_unet_output_blocks_90_1_proj_in.lora_up.weight, ",
        ),
        ({f"{Q}_x.alpha": torch.ones(())}, f"does not fit tiny: 1 unexpected tensor ({Q}_x.alpha)"),
        ({"lora_unet_out_0.lora_down.weight": torch.ones(2, 8)}, "1 unexpected tensor"),  # a GroupNorm
        ({"first_stage_model.encoder.conv_in.lora_down.weight": torch.ones(2, 3, 3, 3)}, "1 unexpected tensor"),
        ({f"{Q}.lora_up.weight": None}, f"does not fit tiny: 1 missing tensor ({Q}.lora_up.weight)"),
        ({f"{Q}.lora_down.weight": None}, f"does not fit tiny: 1 missing tensor ({Q}.lora_down.weight)"),
        (
            {f"{Q}.lora_down.weight": None, f"{Q}.lora_up.weight": None},
            f"does not fit tiny: 1 unexpected tensor ({Q}.alpha)",
        ),
        (
            {f"{Q}.lora_up.weight": torch.ones(24, 3)},
            f"1 mis-shaped tensor ({Q}.lora_up.weight is [24, 3], expected [24, 4])",
        ),
        ({f"{Q}.lora_down.weight": torch.ones(4, 40)}, "is [4, 40], expected [4, 24]"),
        ({f"{Q}.lora_down.weight": torch.ones(4)}, "is [4], expected [4, 24]"),
        ({f"{Q}.lora_down.weight": torch.ones(())}, "is [], expected [4, 24]"),
        (
            {f"{Q}.lora_down.weight": torch.ones(0, 24), f"{Q}.lora_up.weight": torch.ones(24, 0)},
            "2 mis-shaped tensors",
        ),
        ({f"{CONV}.lora_down.weight": torch.ones(2, 24)}, "is [2, 24], expected [2, 24, 3, 3]"),
        ({f"{CONV}.lora_up.weight": torch.ones(24, 2, 3, 3)}, "is [24, 2, 3, 3], expected [24, 2, 1, 1]"),
        ({f"{Q}.alpha": torch.ones(2)}, "is [2], expected []"),
        ({f"{Q}.alpha": torch.tensor(math.nan)}, f"has nan as {Q}.alpha, expected a finite number"),
        ({f"{Q}.alpha": torch.tensor(-math.inf).half()}, f"has -inf as {Q}.alpha, expected a finite number"),
        ({f"{Q}.alpha": torch.tensor(True)}, f"has {Q}.alpha as BOOL; expected"),
        ({f"{Q}.lora_up.weight": torch.ones(24, 4).to(torch.int8)}, "lora_up.weight as I8; expected F64, F32, F16"),
        ({f"{Q}.lora_Z.weight": torch.ones(2, 2)}, f"does not fit tiny: 1 unexpected tensor ({Q}.lora_Z.weight)"),
        ({f"{Q}.lora_A.other.weight": torch.ones(4, 24)}, "has two for one module: "),
        (
            {f"{Q}.lora_down.weight": None, f"{Q}.lora_down.one.weight": torch.ones(4, 24)},
            f"1 missing tensor ({Q}.lora_up.one.weight); 1 unexpected tensor ({Q}.lora_up.weight)",
        ),
        ({f"{Q}.lora_up.weight": torch.ones(24, 4).long()}, "lora_up.weight as I64; expected"),
        (
            {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.ones(24, 4)},
            "has two for one module: ",
        ),
        ({f"{Q}.lora_A.weight": torch.ones(4, 24)}, "has two for one module: "),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, base: Path, change: Mapping[str, Tensor | None], expected: str
) -> None:
    tensors = {name: tensor for name, tensor in {**good(), **change}.items() if tensor is not None}
    assert expected in refusal(base, written(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    "settings",
    [
        "{",
        "[" * 5000,
        "[]",
        '{"unet.lora_alpha": "8"}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": true}',
        '{"unet.alpha_pattern": ["to_q"]}',
        '{"unet.alpha_pattern": {"to_q": null}}',
        '{"unet.alpha_pattern": {"(a+)+b": 2}}',
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, base: Path, settings: str) -> None:
    path = written(tmp_path / "x.safetensors", good(), {"lora_adapter_metadata": settings})
    assert re.match(r"has (damaged lora_adapter_metadata|an alpha for unet)", refusal(base, path))


def test_files_that_are_no_lora_are_named(tmp_path: Path, base: Path) -> None:
    assert refusal(base, base).startswith("is a whole SDXL model; expected a LoRA for tiny")
    unet = {name.removeprefix(PARTS["unet"].prefix): each for name, each in load_file(base).items()}
    unet = {name: each for name, each in unet.items() if not name.startswith(("first_stage", "conditioner"))}
    assert "is only a U-Net; expected" in refusal(base, written(tmp_path / "unet.safetensors", unet))
    assert "with 0 tensors; expected a LoRA" in refusal(base, written(tmp_path / "empty.safetensors", {}))
    assert "does not exist" in refusal(base, tmp_path / "nowhere.safetensors")
    assert "is a folder without pytorch_lora_weights.safetensors, only empty.safetensors" in refusal(base, tmp_path)
    (tmp_path / "page.safetensors").write_text("<html>")
    assert "is an HTML page" in refusal(base, tmp_path / "page.safetensors")
    (tmp_path / "half.safetensors").write_bytes(written(tmp_path / "x.safetensors", good()).read_bytes()[:-9])
    assert "is truncated" in refusal(base, tmp_path / "half.safetensors")


@pytest.mark.parametrize(("value", "scale", "dtype"), [(math.nan, 1.0, "float32"), (1.0, 1e5, "float16")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, base: Path, value: float, scale: float, dtype: str
) -> None:
    tensors = good()
    tensors[f"{Q}.lora_up.weight"][3, 2] = value
    path = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"x.safetensors makes model\S+weight have values .* in torch.{dtype}"):
        load(base, dtype=getattr(torch, dtype), loras=[LoRA(path, scale)])
