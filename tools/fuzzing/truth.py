"""The right results for ``tools.fuzz``: tensors as the safetensors library reads them, JSON as it is documented."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as read_tensors
from torch import Tensor

from minisdxl.checkpoint.folder_writer import COMPONENTS
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.modules import CONFIG_KEY
from minisdxl.config import ModelConfig
from tools.fuzzing.damage import Case
from tools.fuzzing.forms import (
    CONFIG,
    EDM_MARKS,
    EDM_V_MARKS,
    IDS,
    LORAS,
    LYCORIS,
    LYCORIS_MODULES,
    V_MARKS,
    Files,
    bytes_of,
    forms,
    role,
    weights,
)

MARKS = (*V_MARKS, *EDM_MARKS, *EDM_V_MARKS)  # tensors that say what a U-Net predicts
WORDS = ("modelspec.prediction_type", "modelspec.predict_key")  # of metadata that say it


class Violation(Exception):
    """A wrong result of a case; the message says which."""


def stored(files: Files, variant: bool) -> dict[str, Tensor]:
    """The tensors to load, by folder (or file) and name, from fp16 files first if ``variant``, else from plain ones."""
    tensors: dict[str, Tensor] = {}
    for path in chosen(files, variant):
        tensors |= {f"{role(path)}: {name}": tensor for name, tensor in read_tensors(bytes_of(files[path])).items()}
    return tensors


def chosen(files: Files, variant: bool) -> list[str]:
    """The safetensors files that are read: of each role those in fp16 first if ``variant``, else the plain ones."""
    paths = [path for path, content in files.items() if path.endswith(".safetensors") and isinstance(content, bytes)]
    preferred = {role(path) for path in paths if (".fp16." in path) == variant}
    return [path for path in paths if (".fp16." in path) == variant or role(path) not in preferred]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in float64, which represents all other types exactly."""
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors])


@dataclass(frozen=True)
class Origins:
    """Where a sound model stores its weights."""

    names: set[str]  # of all its tensors
    shapes: dict[str, tuple[int, ...]]  # of those that are read; others are zeros or position ids
    places: Tensor  # index of each weight among all numbers of these


@cache
def origins(form: str) -> Origins:
    """Where the sound model stores its weights in one of its forms."""
    found = stored(forms()[form].files, variant=False)
    if (like := forms()[form].like) is not None:
        return replace(origins(like), names=set(found))
    lora = f"{forms()[form].options.get('lora')}: "
    tensors = {
        name: tensor
        for name, tensor in found.items()
        if tensor.any() and not name.startswith(lora) and not name.endswith(("position_ids", *MARKS))
    }
    numbers, order = flat(tensors.values()).sort()
    wanted = flat(weights(forms()[form].numbers).values())
    places = torch.searchsorted(numbers, wanted)
    assert torch.equal(numbers[places], wanted)
    return Origins(set(found), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, order[places])


def right_weights(case: Case) -> tuple[Tensor, Tensor]:
    """All numbers of the model, one official tensor after the other, and their tolerances.

    Raises ``Violation`` if the files hold no such model.
    """
    sound = origins(case.form)
    try:
        found = stored(case.files, case.dtype == torch.float16)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise Violation(f"loaded, but the safetensors library says {error!r}") from error
    for name, shape in sound.shapes.items():
        if name not in found:
            raise Violation(f"loaded without {name}")
        pair = [tuple(found[name].shape), shape]
        if re.search("attn_1|mid_block.attentions", name):  # in the VAE these are matrices or 1x1 convolutions
            pair = [tuple(each[: -2 if each[-2:] == (1, 1) else None]) for each in pair]
        if pair[0] != pair[1]:
            raise Violation(f"loaded {name} of shape {list(found[name].shape)}, expected {list(shape)}")
    scales = {name: scale_of(name, found, sound.names) for name in sound.shapes}
    new = [name for name in found if name not in sound.names and not may_be_added(case.form, name.partition(": ")[2])]
    if new:
        raise Violation(f"loaded with {new[0][:100]!r}, a tensor that is not of the model")
    numbers = flat(found[name].double() * scales[name] for name in sound.shapes)[sound.places]
    # The VAE is fp32 always.
    numbers = torch.where(
        vae_mask(forms()[case.form].numbers), numbers.float().double(), numbers.to(case.dtype).double()
    )
    if case.form == LYCORIS:
        return merge_lycoris(numbers, found, case.dtype)
    if case.form in LORAS:
        return merge_lora(case.form, numbers, found, case.dtype)
    # A scale is fp32, and no other changes a number.
    scaled = flat(torch.full(found[name].shape, scales[name] != 1) for name in sound.shapes)[sound.places]
    limits = torch.finfo(case.dtype)
    return numbers, scaled * limits.eps * (numbers.abs().nan_to_num(0, 0) + limits.tiny)


def scale_of(name: str, found: Mapping[str, Tensor], sound: Collection[str]) -> float:
    """By what a weight is to be multiplied. Raises ``Violation`` for a lost scale, and for what is no scale."""
    of_scale = f"{name.removesuffix('weight')}weight_scale"
    scale = found.get(of_scale)
    if scale is None:
        if of_scale in sound:
            raise Violation(f"loaded {name} without its scale")
        return 1.0
    if scale.numel() != 1 or not scale.double().isfinite().all():
        raise Violation(f"loaded {name} with a scale of {scale.flatten()[:5].tolist()}")
    return float(scale)


def merge_lora(form: str, numbers: Tensor, found: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All numbers with alpha / rank * up @ down added to those of some, and how far off they may be."""
    margins = torch.zeros_like(numbers)
    sizes = [tensor.numel() for tensor in weights().values()]
    views = zip(torch.split(numbers, sizes), torch.split(margins, sizes), strict=True)
    places = dict(zip(weights(), views, strict=True))
    for official, names in LORAS[form].items():
        down, up, *alphas = (found.get(f"{forms()[form].options['lora']}: {name}") for name in names)
        alpha = alphas[0] if alphas else None
        if down is None and up is None and alpha is None:
            continue
        if down is None or up is None:
            raise Violation(f"loaded with half of {names[0]}")
        factor = 1.0 if alpha is None else float(alpha) / len(down)
        down, up = (tensor.double().flatten(1) for tensor in (down, up))
        values, margin = places[official]  # views of what is returned
        values += factor * (up @ down).flatten()
        margin += 1e-5 * abs(factor) * (up.abs() @ down.abs()).flatten() + torch.finfo(dtype).eps * values.abs()
        values.copy_(values.to(dtype))
    return numbers, margins


def merge_lycoris(numbers: Tensor, found: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All numbers with the changes of a LyCORIS file, and how far off they may be."""
    margins = torch.zeros_like(numbers)
    sizes = [tensor.numel() for tensor in weights().values()]
    views = zip(torch.split(numbers, sizes), torch.split(margins, sizes), strict=True)
    places = dict(zip(weights(), views, strict=True))
    for official, (module, shapes) in LYCORIS_MODULES.items():
        names = {role: f"{forms()[LYCORIS].options['lora']}: {module}.{role}" for role in shapes}
        tensors = {role: found[name].double() for role, name in names.items() if name in found}
        if not tensors:
            continue
        absent = names.keys() - tensors.keys() - {"alpha", "dora_scale"}
        if absent:
            raise Violation(f"loaded without {min(absent)} of {module}")
        values, margin = places[official]  # views of what is returned
        shape = weights()[official].shape
        change, size = (made(each, shape) for each in (tensors, {role: t.abs() for role, t in tensors.items()}))
        new, error = values.view(shape) + change, 1e-5 * size.abs()
        if "dora_scale" in tensors:
            new, error = with_lengths(new, error, tensors["dora_scale"])
        margin += error.flatten() + torch.finfo(dtype).eps * (new.flatten().abs() + values.abs())
        values.copy_(new.flatten().to(dtype))
    return numbers, margins


def made(tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The change that the tensors of one weight make, each number by itself as LyCORIS' paper has it."""
    match tensors:
        case {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}:
            rank = b.shape[0]
            change = (a.flatten(1) @ b.flatten(1)) * (c.flatten(1) @ d.flatten(1))
        case {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b}:
            rank = b.shape[0]
            change = torch.kron(first.flatten(1), a.flatten(1) @ b.flatten(1))
        case {"diff": change} | {"diff_b": change}:
            return change.reshape(shape)
    return change.reshape(shape) * float(tensors.get("alpha", torch.tensor(rank))) / rank


def with_lengths(weight: Tensor, error: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A weight whose rows or columns have the given lengths, and how far off it may be for an error before."""
    axis = 1 if lengths.shape[0] == len(weight) else 0  # over which the sum of squares runs
    norms = weight.square().sum(axis, keepdim=True).sqrt()
    lengths = lengths.reshape(norms.shape)
    off = error + weight.abs() * (error.square().sum(axis, keepdim=True).sqrt() / norms + 1e-6)
    return weight / norms * lengths, off / norms * lengths.abs()


@cache
def vae_mask(config: ModelConfig) -> Tensor:
    """Mask of the numbers that belong to the VAE."""
    prefix = PARTS["vae"].prefix
    return flat(torch.full_like(tensor, name.startswith(prefix)) for name, tensor in weights(config).items()).bool()


def may_be_added(form: str, name: str) -> bool:
    """Whether a tensor that is not of the model is ignored."""
    given = form.removeprefix("--").partition(" ")[0].replace("-", "_")
    unused = [part.prefix for key, part in PARTS.items() if given in PARTS and key != given]
    harmless = ("model_ema.", "denoiser.", *unused, *(("bundle_emb.",) if given == "lora" else ()))
    if name in MARKS:  # what they say is compared with the config
        return given not in ("vae", "lora")
    return name.startswith(harmless) or name.endswith(("position_ids", "logit_scale", "scaled_fp8"))


# Fields that do not describe the model, or that repeat the shapes of its tensors.
FREE = {
    "model": {*COMPONENTS, "_name_or_path", "scheduler"},
    "scheduler": {"_class_name", "sigma_schedule", "timestep_spacing"},
    "unet": {
        *("_class_name", "addition_time_embed_dim", "block_out_channels", "cross_attention_dim", "in_channels"),
        *("layers_per_block", "out_channels", "projection_class_embeddings_input_dim", "transformer_layers_per_block"),
    },
    "vae": {
        *("_class_name", "block_out_channels", "force_upcast", "in_channels", "latent_channels", "layers_per_block"),
        *("out_channels", "sample_size"),
    },
    "text_encoder": {
        *("architectures", "attention_dropout", "bos_token_id", "hidden_size", "intermediate_size"),
        *("max_position_embeddings", "model_type", "num_hidden_layers", "pad_token_id", "projection_dim", "vocab_size"),
    },
}
FREE["text_encoder_2"] = FREE["text_encoder"]
# Fields whose defaults in diffusers differ from SDXL.
NEEDED = {"unet": {"addition_embed_type", "use_linear_projection"}, "scheduler": {"beta_schedule"}}
# Defaults of diffusers and transformers for missing fields; 128 is the default of this package.
DEFAULTS = {
    **{"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "norm_num_groups": 32, "sample_size": 128},
    **{"attention_head_dim": 8, "scaling_factor": 0.18215, "num_attention_heads": 8, "hidden_act": "quick_gelu"},
    **{"eos_token_id": 49407, "_name_or_path": None, "latents_mean": None, "latents_std": None, "shift": 1.0},
    **{"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "sigma_min": 0.002, "sigma_max": 80.0},
}


def put_field(config: dict[str, Any], part: str, key: str, value: Any) -> bool:
    """Sets the field of a config that a field of a folder's JSON stands for. Returns whether there is one."""
    text = config["text"][-1 if part == "text_encoder_2" else 0]  # a refiner has the second one alone
    match part, key:
        case "model", "_name_or_path":
            config["name"] = value if isinstance(value, str) and value.isprintable() else part
        case "scheduler", "num_train_timesteps":
            config["noise"]["steps"] = value
        case "scheduler", "beta_start" | "beta_end":
            config["noise"][key] = float(value)
        case "scheduler", "sigma_min" | "sigma_max" | "shift":
            config["noise"][key] = float(value)
        case "scheduler", "prediction_type":
            kinds = ("edm", "edm-v") if config["noise"]["prediction"].startswith("edm") else ("noise", "v")
            config["noise"]["prediction"] = kinds[("epsilon", "v_prediction").index(value)]
        case "scheduler", "rescale_betas_zero_snr":
            config["noise"]["zero_terminal_snr"] = value
        case "vae", "latents_mean" | "latents_std":
            config["vae"][key] = [float(number) for number in value or ()]
        case "unet", "attention_head_dim":  # the number of heads; the config has their width
            config["unet"]["head_channels"] = 8 // (value[-1] if isinstance(value, list) else value)
        case "unet" | "vae", "norm_num_groups":
            config[part]["norm_groups"] = value
        case "unet", "sample_size":
            config["size"] = value
        case "vae", "scaling_factor":
            config["vae"]["scale_factor"] = float(value)
        case "text_encoder" | "text_encoder_2", "num_attention_heads":
            text["heads"] = value
        case "text_encoder" | "text_encoder_2", "hidden_act":
            text["activation"] = value
        case "text_encoder" | "text_encoder_2", "eos_token_id":
            end = IDS["vocabulary"] - 1 if value == 2 else value  # published files have 2, which is wrong
            text |= {"end_token": end, "start_token": end - 1}
            text["pad_token"] = end if part == "text_encoder" else 0
        case _:
            return False
    return True


def right_config(case: Case, folder: Path) -> dict[str, Any]:
    """The config in the files. Raises ``Violation`` if they describe no such model."""
    form, described = forms()[case.form], "unet" not in forms()[case.form].options
    config: dict[str, Any] = json.loads(json.dumps(form.config.to_dict()))
    if form.weights.endswith(".safetensors"):
        config = json.loads(json.dumps(form.base.to_dict()))
        with safe_open(folder / form.weights, "pt") as file:
            metadata = file.metadata() or {}
        if CONFIG_KEY in metadata:
            config = merged(config, json.loads(metadata[CONFIG_KEY]))
        described &= CONFIG_KEY in metadata
    if "unet" in form.options:  # whose tensors say whether it is one for inpainting
        config["unet"]["in_channels"] = form.config.unet.in_channels
    for path, before in form.files.items():
        part = role(path).rpartition("/")[2]
        if not path.endswith((f"{part}/config.json", "model_index.json", "scheduler_config.json")):
            continue
        if form.options and not isinstance(case.files.get(path), bytes):
            continue  # another VAE may come without its config
        old, new = (json.loads(bytes_of(each)) for each in (before, case.files[path]))
        for key in old | new:
            if key in new and key in old and old[key] == new[key]:
                continue
            known = put_field(config, part, key, new.get(key, DEFAULTS.get(key)))
            passed_over = key in old if key in new else key in NEEDED.get(part, ())
            if not known and passed_over and key not in FREE[part]:
                raise Violation(f"ignored {key}, which is {new.get(key)!r:.100}, expected {old[key]!r:.100}")
    said = with_marks(config, *unet_says(case))
    if not described:
        return said
    if not nearly_equal(said, config):
        raise Violation(f"loaded with the config {config} whose U-Net is marked as {said}")
    return config


def unet_says(case: Case) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of the file or files of the U-Net by name, and the words of their metadata for its prediction."""
    form = forms()[case.form]
    place = form.options.get("unet", form.weights if form.weights.endswith(".safetensors") else f"{form.weights}/unet")
    found = stored(case.files, case.dtype == torch.float16)
    tensors = {name.partition(": ")[2]: tensor for name, tensor in found.items() if name.startswith(f"{place}: ")}
    words: set[str] = set()
    for path in chosen(case.files, case.dtype == torch.float16):
        if role(path) == place:
            data = bytes_of(case.files[path])
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
            words |= {metadata[key] for key in WORDS if key in metadata}
    return tensors, words


def with_marks(config: dict[str, Any], tensors: Mapping[str, Tensor], words: Collection[str]) -> dict[str, Any]:
    """A config with what marks say, else with what metadata say."""
    noise, vae = config["noise"], config["vae"]
    plain = {"prediction": "noise", "zero_terminal_snr": False, "sigma_min": None, "sigma_max": None, "shift": 1.0}

    def numbers(name: str) -> list[float]:
        return [float(f"{number:.7g}") for number in tensors[name].double().flatten().tolist()]

    if "edm_mean" in tensors:
        noise = {**noise, **plain, "prediction": "edm", "sigma_min": 0.002, "sigma_max": 80.0}
        vae = {**vae, "scale_factor": 0.5, "latents_mean": numbers("edm_mean"), "latents_std": numbers("edm_std")}
        if config["defaults"] == json.loads(json.dumps(CONFIG.to_dict()))["defaults"] and config["name"] == CONFIG.name:
            config = {**config, "defaults": json.loads(json.dumps(forms()["edm file"].config.to_dict()))["defaults"]}
    elif "edm_vpred.sigma_max" in tensors:
        lowest = numbers("edm_vpred.sigma_min")[0] if "edm_vpred.sigma_min" in tensors else 0.002
        highest = numbers("edm_vpred.sigma_max")[0]
        noise = {**noise, **plain, "prediction": "edm-v", "sigma_min": lowest, "sigma_max": highest}
    elif "v_pred" in tensors:
        noise = {**noise, **plain, "prediction": "v", "zero_terminal_snr": "ztsnr" in tensors}
    elif "v" in words and noise["prediction"] not in ("v", "edm-v"):
        noise = {**noise, **plain, "prediction": "v"}
    elif "epsilon" in words and noise["prediction"] not in ("noise", "edm"):
        noise = {**noise, **plain}
    return {**config, "noise": noise, "vae": vae}


def nearly_equal(one: Any, other: Any) -> bool:
    """Whether two configs are equal up to the rounding of fp32, and settings that do not draw another model."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - {"defaults"}
        return all(nearly_equal(one.get(key), other.get(key)) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(nearly_equal, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * abs(one)
    return bool(one == other)


def merged(sound: Any, found: Any) -> Any:
    """``found`` with missing fields from ``sound``, because the defaults are those of ``CONFIG``."""
    if isinstance(sound, dict) and isinstance(found, dict):
        return found | {key: merged(value, found[key]) if key in found else value for key, value in sound.items()}
    if isinstance(sound, list) and isinstance(found, list) and len(sound) == len(found):
        return [merged(*pair) for pair in zip(sound, found, strict=True)]
    return found


def right_tokens(case: Case, pad: int) -> list[tuple[str, list[int]]]:
    """Some words and their token ids, by the simplest form of byte-pair encoding."""
    folder = next(path for path in forms()[case.form].files if path.endswith("/vocab.json")).rpartition("/")[0]
    vocabulary = json.loads(bytes_of(case.files[f"{folder}/vocab.json"]))
    lines = bytes_of(case.files[f"{folder}/merges.txt"]).decode().split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    right = []
    for word in ("a", "b", "ab", "aab", "!"):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            for index in range(len(parts) - 1, 0, -1):
                if parts[index - 1 : index + 1] == pair:
                    parts[index - 1 : index + 1] = ["".join(pair)]
        if all(part in vocabulary for part in parts):
            ids = [IDS["start_token"], *(vocabulary[part] for part in parts), IDS["end_token"]]
            right.append((word, ids + [pad] * (IDS["context_length"] - len(ids))))
    return right
