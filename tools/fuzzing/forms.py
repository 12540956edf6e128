"""The sound model that ``tools.fuzz`` damages, in all the file forms that users have."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

from minisdxl.checkpoint.folder_writer import json_files
from minisdxl.checkpoint.layouts import PARTS, file_name
from minisdxl.checkpoint.modules import file_metadata, official_shapes, open_source
from minisdxl.checkpoint.predictions import PLAYGROUND
from minisdxl.checkpoint.weight_files import LORA_FILE
from minisdxl.config import Level, ModelConfig, NoiseConfig, TextConfig, UNetConfig, VAEConfig
from minisdxl.convert import write_folder
from minisdxl.tokenizer import END, START, Vocabulary

TOKENS = ("!", "a", "b", "a</w>", "b</w>", "ab</w>", START, END)
VOCABULARY = Vocabulary({token: index for index, token in enumerate(TOKENS)}, [("a", "b</w>")])
IDS: dict[str, int] = {"vocabulary": 8, "start_token": 6, "end_token": 7, "context_length": 5}
# The smallest model whose U-Net has a level with attention and one without.
CONFIG = ModelConfig(
    name="fuzz",
    unet=UNetConfig(
        model_channels=4,
        levels=(Level(1, 0), Level(2, 1)),
        middle_depth=1,
        res_blocks=1,
        head_channels=4,
        context_channels=12,
        vector_channels=20,
        norm_groups=2,
    ),
    vae=VAEConfig(channels=4, multipliers=(1,), res_blocks=1, scale_factor=0.5, norm_groups=2),
    text=(
        TextConfig(4, 2, 2, "quick_gelu", **IDS, pad_token=7),
        TextConfig(8, 2, 2, "gelu", **IDS, pad_token=0, projection=8),
    ),
    size=8,
    size_channels=2,
)

# The same as an inpainting model, and as a refiner: attention in the middle levels, and one text encoder.
INPAINTING = replace(CONFIG, name="fuzz-inpainting", unet=replace(CONFIG.unet, in_channels=9))
REFINER = replace(
    CONFIG,
    name="fuzz-refiner",
    unet=replace(CONFIG.unet, levels=(Level(1, 0), Level(2, 1), Level(2, 0)), context_channels=8, vector_channels=18),
    text=CONFIG.text[1:],
    scores=(6.0, 2.5),
)

# The same with other predictions.
V = replace(CONFIG, noise=NoiseConfig(prediction="v", zero_terminal_snr=True))
EDM = replace(
    CONFIG,
    noise=NoiseConfig(prediction="edm", sigma_min=0.002, sigma_max=80.0),
    vae=replace(CONFIG.vae, latents_mean=(-1.5, 0.25, 2.0, 3.0), latents_std=(8.5, 6.0, 5.5, 0.5)),
)
EDM_V = replace(CONFIG, noise=NoiseConfig(prediction="edm-v", sigma_min=0.002, sigma_max=120.0))
FLOW = replace(CONFIG, noise=NoiseConfig(prediction="flow", shift=3.0))
V_MARKS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
EDM_MARKS = {
    "edm_mean": torch.tensor(EDM.vae.latents_mean).view(1, 4, 1, 1),
    "edm_std": torch.tensor(EDM.vae.latents_std).view(1, 4, 1, 1),
}
EDM_V_MARKS = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}

LORA = "lora.safetensors"
LORA_FOLDER = "lora"
# What the LoRAs change.
_CHANGED = (
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight",
)
LORA_KINDS = ("down", "up", "alpha")


def _lora_names(modules: tuple[str, str, str], kinds: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The names of the tensors that change a weight, in the order of ``LORA_KINDS``."""
    return {
        weight: tuple(f"{module}.{kind}" for kind in kinds) for weight, module in zip(_CHANGED, modules, strict=True)
    }


# Those of kohya's scripts, and those of PEFT with a named adapter, in a folder of diffusers and as ComfyUI has them.
LORAS = {
    "--lora file": _lora_names(
        (
            "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_1_mlp_fc1",
        ),
        ("lora_down.weight", "lora_up.weight", "alpha"),
    ),
    "--lora folder": _lora_names(
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
        ),
        ("lora_A.default.weight", "lora_B.default.weight"),
    ),
    "--lora of ComfyUI": _lora_names(
        (
            "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1",
        ),
        ("lora_A.weight", "lora_B.weight", "alpha"),
    ),
}

# One LyCORIS file: a LoHa with a DoRA's lengths, a LoKr, and whole differences of a weight and its bias. The shapes of
# the tensors of each weight, by their names without the module's.
LYCORIS = "--lora of LyCORIS"
LYCORIS_MODULES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    _CHANGED[0]: (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        {
            **{"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
            **{"alpha": (), "dora_scale": (8, 1)},
        },
    ),
    _CHANGED[1]: (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2), "alpha": ()},
    ),
    _CHANGED[2]: ("lora_te2_text_model_encoder_layers_1_mlp_fc1", {"diff": (32, 8)}),
    _CHANGED[2].replace("weight", "bias"): ("lora_te2_text_model_encoder_layers_1_mlp_fc1", {"diff_b": (32,)}),
}

# Names of transformers and of OpenAI.
OPENAI = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

Node = Literal["folder", "pipe"]  # what can stand in place of a file
Files = dict[str, bytes | Node]  # by their paths


@dataclass(frozen=True)
class Form:
    """A model in one file form."""

    files: Files
    weights: str  # the path that is given to load
    options: Mapping[str, str] = field(default_factory=dict)  # and those for vae, unet or lora
    damaged: str = ""  # how the paths begin of the files that get damaged
    official: bool = False  # whether nothing but names and shapes says which model it is
    like: str | None = None  # the form with the same names whose numbers tell where they come from
    config: ModelConfig = CONFIG
    base: ModelConfig = CONFIG  # that of a file without a config

    @property
    def numbers(self) -> ModelConfig:
        """The model whose ``weights`` are in the files."""
        return self.config if self.config in (INPAINTING, REFINER) else CONFIG

    @property
    def subject(self) -> str:
        """The path that a refusal must name."""
        return next(iter(self.options.values()), self.weights)


@cache
def weights(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    """The weights of a model by the names of its modules: fp16 numbers that are all different, to show their origin.

    Their bits count up from the smallest normal number, so most numbers are small, as in a real model.
    """
    shapes = official_shapes(config)
    sizes = [math.prod(shape) for shape in shapes.values()]
    index = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    numbers = (0x0400 + index // 2 - 0x8000 * (index % 2)).to(torch.int16).view(torch.float16)
    assert numbers.isfinite().all(), "the model has more weights than fp16 has numbers"
    pieces = zip(shapes.items(), torch.split(numbers, sizes), strict=True)
    return {name: piece.reshape(shape) for (name, shape), piece in pieces}


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with sorted metadata, the same in every process; the library has no fixed order.

    Raises what the library raises.
    """
    content = save(dict(tensors), dict(metadata) if metadata else None)
    length = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:length])
    if metadata:
        table["__metadata__"] = dict(sorted(metadata.items()))
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at multiples of 8 bytes
    return len(header).to_bytes(8, "little") + header + content[length:]


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, sorted; the library has no fixed order.

    Raises what the library raises.
    """
    return dict(sorted(load(content).items()))


@cache
def forms() -> dict[str, Form]:
    """The model in all file forms, by name."""
    official, metadata, single = weights(), file_metadata(CONFIG), "model.safetensors"
    extras = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(5)[None],
        "conditioner.embedders.1.model.logit_scale": torch.zeros(()),
        "denoiser.sigmas": torch.zeros(9),
    }
    folder = folder_files(CONFIG)
    tokenizer: Files = {f"tokenizer/{name}": folder[f"model/tokenizer/{name}"] for name in ("vocab.json", "merges.txt")}
    files = {part: f"model/{part}/{PARTS[part].weights}" for part in PARTS}
    parts = {part: tensors_of(bytes_of(folder[f"{path}.safetensors"])) for part, path in files.items()}
    described = {path: content for path, content in folder.items() if not path.endswith(".safetensors")}

    def beside(part: str) -> Files:
        """A model with zeros in one part, which another file or folder provides."""
        prefix = PARTS[part].prefix
        zeros = {name: torch.zeros_like(tensor) for name, tensor in official.items() if name.startswith(prefix)}
        return {single: file_bytes({**official, **zeros}, metadata), **tokenizer}

    shards: Files = {path: content for path, content in folder.items() if path != f"{files['unet']}.safetensors"}
    table: dict[str, str] = {}
    for number in (1, 2):
        shard = f"{files['unet']}-{number:05}-of-00002.safetensors"
        names = sorted(parts["unet"])[number - 1 :: 2]
        shards[shard] = file_bytes({name: parts["unet"][name] for name in names}, {"format": "pt"})
        table |= dict.fromkeys(names, Path(shard).name)
    shards[f"{files['unet']}.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": table}).encode()
    variants = described | {f"{files[part]}.fp16.safetensors": file_bytes(parts[part]) for part in PARTS}
    for part in ("unet", "text_encoder"):
        variants[f"{files[part]}.safetensors"] = file_bytes({name: t.float() for name, t in parts[part].items()})
    codes = (torch.float32, torch.float16, torch.float64)
    mixed = {name: tensor.to(codes[index % 3]) for index, (name, tensor) in enumerate(official.items())}
    vae, unet = "vae.safetensors", "unet.safetensors"
    vae_file = file_bytes({name: t.float() for name, t in official.items() if name.startswith(PARTS["vae"].prefix)})
    vae_folder = {path.removeprefix("model/"): folder[path] for path in folder if path.startswith("model/vae/")}
    text_folder = {path.removeprefix("model/"): folder[path] for path in folder if "/text_encoder_2/" in path}
    unet_file = file_bytes(parts["unet"], metadata)
    clip, clip_file = "clip_l.safetensors", file_bytes(openai_names(parts["text_encoder"]))
    openclip, prefix = "clip_g.safetensors", PARTS["text_encoder_2"].prefix
    openclip_file = file_bytes({n.removeprefix(prefix): t for n, t in official.items() if n.startswith(prefix)})
    lora_names = {LYCORIS: LORA} | {
        form: f"{LORA_FOLDER}/{LORA_FILE}" if form == "--lora folder" else LORA for form in LORAS
    }
    loras = {
        form: Form(
            {single: file_bytes(official, metadata), **tokenizer, name: lora_file(form)},
            single,
            {"lora": role(name)},
            role(name),
        )
        for form, name in lora_names.items()
    }
    described_as = {
        name: {f"model/{path}": json.dumps(text).encode() for path, text in json_files(Path("model"), config).items()}
        for name, config in {"v": V, "edm": EDM, "edm-v": EDM_V, "flow": FLOW}.items()
    }
    predictions = {
        "v file": Form(
            {single: file_bytes(official | V_MARKS), **tokenizer}, single, {}, single, official=True, config=V
        ),
        "edm file": Form(
            {single: file_bytes(official | EDM_MARKS), **tokenizer},
            single,
            {},
            single,
            official=True,
            config=replace(EDM, defaults=PLAYGROUND),
        ),
        "edm-v file": Form(
            {single: file_bytes(official | EDM_V_MARKS, file_metadata(EDM_V)), **tokenizer},
            single,
            {},
            single,
            config=EDM_V,
        ),
        "v folder": Form(folder | described_as["v"], "model", {}, "model/", config=V),
        "edm folder": Form(folder | described_as["edm"], "model", {}, "model/", config=EDM),
        "edm-v folder": Form(folder | described_as["edm-v"], "model", {}, "model/scheduler", config=EDM_V),
        "flow folder": Form(folder | described_as["flow"], "model", {}, "model/scheduler", config=FLOW),
    }
    return {
        "converted file": Form({single: file_bytes(converted(official), metadata), **tokenizer}, single, {}, single),
        "fp8 file": Form(
            {single: file_bytes(in_fp8(mixed), metadata), **tokenizer}, single, {}, single, like="official file"
        ),
        "scaled fp8 file": Form(
            {single: file_bytes(with_scales(official), metadata), **tokenizer}, single, {}, single, like="official file"
        ),
        "single file": Form({single: file_bytes(mixed | extras, metadata), **tokenizer}, single, {}, single),
        "official file": Form({single: file_bytes(official | extras), **tokenizer}, single, {}, single, True),
        "folder": Form(folder, "model", {}, "model/"),
        "shards": Form(shards, "model", {}, "model/unet/"),
        "fp16 variant": Form(variants, "model", {}, "model/"),
        "--vae file": Form({**beside("vae"), vae: vae_file}, single, {"vae": vae}, vae),
        "--vae folder": Form({**beside("vae"), **vae_folder}, single, {"vae": "vae"}, "vae/"),
        "--text-encoder file": Form({**beside("text_encoder"), clip: clip_file}, single, {"text_encoder": clip}, clip),
        "--text-encoder-2 folder": Form(
            {**beside("text_encoder_2"), **text_folder}, single, {"text_encoder_2": "text_encoder_2"}, "text_encoder_2/"
        ),
        "in parts": Form(
            {unet: unet_file, vae: vae_file, clip: clip_file, openclip: openclip_file, **tokenizer},
            unet,
            {"text_encoder_2": openclip, "text_encoder": clip, "vae": vae},
            openclip,
        ),
        "--unet file": Form({**beside("unet"), unet: file_bytes(parts["unet"])}, single, {"unet": unet}, unet),
        **predictions,
        **loras,
        **other_models(tokenizer),
    }


def file_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a model by their names in a file."""
    return {file_name(name, config): tensor for name, tensor in weights(config).items()}


def folder_files(config: ModelConfig) -> Files:
    """A model as a diffusers folder named ``model``."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "model.safetensors").write_bytes(file_bytes(file_tensors(config), file_metadata(config)))
        write_folder(open_source(place / "model.safetensors"), place / "model", VOCABULARY)
        paths = [path for path in sorted((place / "model").rglob("*")) if path.is_file()]
        return {str(path.relative_to(place)): path.read_bytes() for path in paths}


def other_models(tokenizer: Files) -> dict[str, Form]:
    """Forms of the inpainting model and of the refiner, and an inpainting U-Net beside a plain model."""
    table: dict[str, Form] = {}
    single, unet = "model.safetensors", "unet.safetensors"
    for name, config in {"inpainting": INPAINTING, "refiner": REFINER}.items():
        tensors, own = file_tensors(config), partial(Form, config=config, base=config)
        described: Files = {single: file_bytes(tensors, file_metadata(config)), **tokenizer}
        plain: Files = {single: file_bytes(tensors), **tokenizer}
        table[f"{name} file"] = own(described, single, {}, single)
        table[f"official {name} file"] = own(plain, single, {}, single, official=True)
        table[f"{name} folder"] = own(folder_files(config), "model", {}, "model/")
    prefix, whole = PARTS["unet"].prefix, weights(INPAINTING)
    shapes = {name: tensor for name, tensor in weights().items() if name.startswith(prefix)}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in shapes.items()}
    table["--unet file of inpainting"] = Form(
        {
            single: file_bytes({**whole, **zeros}, file_metadata(CONFIG)),
            unet: file_bytes({name: tensor for name, tensor in whole.items() if name.startswith(prefix)}),
            **tokenizer,
        },
        single,
        {"unet": unet},
        unet,
        config=INPAINTING,
    )
    return table


def role(path: str) -> str:
    """The folder of a file, or the file if it is in none."""
    return path.rpartition("/")[0] or path


def lora_file(form: str) -> bytes:
    """A LoRA of rank 2 in one of the forms of ``LORAS``, one of them with an embedding beside it; or ``LYCORIS``."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    if form == LYCORIS:
        for module, shapes in LYCORIS_MODULES.values():
            drawn = {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}
            tensors |= {f"{module}.{role}": tensor for role, tensor in drawn.items()}
        return file_bytes(tensors, {"ss_network_module": "lycoris.kohya"})
    for official, names in LORAS[form].items():
        rows, columns = weights()[official].shape
        down, up = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator).half()
        tensors |= dict(zip(names, (down, up, torch.tensor(1.5)), strict=False))
    if form == "--lora of ComfyUI":
        tensors |= {"bundle_emb.style.clip_l": torch.ones(1, 4), "bundle_emb.style.clip_g": torch.ones(1, 8)}
    return file_bytes(tensors, {"ss_network_dim": "2"})


def openai_names(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first text encoder as OpenAI and OpenCLIP store it: queries, keys and values in one tensor."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if ".self_attn.q_proj." in name:
            stacked = [theirs[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(stacked)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for old, new in OPENAI.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    return tensors


def converted(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model as diffusers' script ``convert_diffusers_to_original_sdxl.py`` writes it."""
    projection = f"{PARTS['text_encoder_2'].prefix}text_projection"
    kept = {name: tensor for name, tensor in official.items() if name != projection}
    return kept | {f"{projection}.weight": official[projection].T.contiguous()}


def in_fp8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every second tensor in one of the two kinds of fp8."""
    kinds = (torch.float8_e4m3fn, None, torch.float8_e5m2, None)
    return {
        name: tensor if kinds[index % 4] is None else (1000 * tensor).to(kinds[index % 4])
        for index, (name, tensor) in enumerate(tensors.items())
    }


def with_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear maps of the U-Net in fp8 with a scale each, as ComfyUI stores them."""
    stored = dict(tensors)
    for name in (name for name in tensors if name.startswith(PARTS["unet"].prefix) and tensors[name].ndim == 2):
        layer, scale = name.removesuffix(".weight"), tensors[name].abs().max().float() / 448
        stored[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}.weight_scale"] = scale
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return stored


def bytes_of(content: bytes | Node) -> bytes:
    """The content of a file; empty for a folder or pipe."""
    return content if isinstance(content, bytes) else b""
