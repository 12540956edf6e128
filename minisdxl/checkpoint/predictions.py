"""What a model predicts: as its files say it, in marks beside the weights, and as ``--prediction`` says it.

Marks are tensors of a single file whose names ComfyUI and others read: ``v_pred`` and ``ztsnr`` (v-prediction, zero
terminal SNR), ``edm_mean`` and ``edm_std`` (Playground 2.5: mean and deviation of the VAE's latents),
``edm_vpred.sigma_max`` and ``.sigma_min`` (CosXL). Metadata may say "epsilon" or "v" (Stability AI's ModelSpec).
Nothing marks a flow. In a diffusers folder ``scheduler_config.json`` says all of it: ``folder_reader``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.tensorfile import READABLE
from minisdxl.checkpoint.weight_files import WeightFiles
from minisdxl.config import Defaults, ModelConfig, NoiseConfig

V, ZERO_SNR = "v_pred", "ztsnr"
MEAN, STD = "edm_mean", "edm_std"
HIGHEST, LOWEST = "edm_vpred.sigma_max", "edm_vpred.sigma_min"
MARKS = (V, ZERO_SNR, MEAN, STD, HIGHEST, LOWEST)
TOGETHER = f"{V} alone or with {ZERO_SNR}, {MEAN} with {STD}, or {HIGHEST} with {LOWEST}"
METADATA = ("modelspec.prediction_type", "modelspec.predict_key")  # the latter is ComfyUI's
MEANT = {"epsilon": ("noise", "edm"), "v": ("v", "edm-v")}  # predictions that the metadata's words stand for

# Settings of each prediction as ``--prediction`` takes them. edm: Playground 2.5's scheduler_config.json; edm-v: those
# of CosXL in diffusers' documentation.
SETTINGS: dict[str, dict[str, float]] = {
    "noise": {},
    "v": {"ztsnr": 1},
    "edm": {"sigma_min": 0.002, "sigma_max": 80.0},
    "edm-v": {"sigma_min": 0.002, "sigma_max": 120.0},
    "flow": {"shift": 1.0},
}
PLAYGROUND_SCALE = 0.5  # scaling_factor in Playground 2.5's vae/config.json; a single file does not hold it
PLAYGROUND = Defaults(sampling="dpm++-2m", steps=50, cfg=3.0)  # its model card, and its scheduler


def predicting(noise: NoiseConfig, prediction: str, settings: Mapping[str, float] | None = None) -> NoiseConfig:
    """``noise`` with another prediction, and its ``SETTINGS`` where ``settings`` has no others."""
    values = SETTINGS[prediction] | dict(settings or {})
    return replace(
        noise,
        prediction=prediction,
        zero_terminal_snr=values.get("ztsnr") == 1,
        sigma_min=values.get("sigma_min"),
        sigma_max=values.get("sigma_max"),
        shift=values.get("shift", 1.0),
    )


def parse_prediction(text: str, noise: NoiseConfig) -> NoiseConfig:
    """``noise`` with the prediction that a text names, as in "v", "v:ztsnr=0", "edm:sigma_max=80" or "flow:shift=3".

    Raises ``ValueError`` for an unknown prediction or setting, and for a value out of range.
    """
    name, colon, rest = text.partition(":")
    settings: dict[str, float] = {}
    try:
        known = SETTINGS[name]
        for pair in rest.split(",") if colon else ():
            key, _, value = pair.partition("=")
            settings[key] = float(value) if key in known else math.nan
            if not math.isfinite(settings[key]) or (key == "ztsnr" and settings[key] not in (0, 1)):
                raise ValueError(pair)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"prediction is {text!r:.100}, expected one of {', '.join(SETTINGS)}, if wanted with settings, as in "
            "v:ztsnr=0, edm:sigma_max=80 or flow:shift=3"
        ) from error
    return predicting(noise, name, settings)


def prediction_text(noise: NoiseConfig) -> str:
    """The text that :func:`parse_prediction` reads as this."""
    values = {"ztsnr": int(noise.zero_terminal_snr), "sigma_min": noise.sigma_min, "sigma_max": noise.sigma_max}
    values |= {"shift": noise.shift}
    own = SETTINGS[noise.prediction]
    settings = ",".join(f"{key}={values[key]!r}" for key in own if values[key] != own[key])
    return f"{noise.prediction}:{settings}" if settings else noise.prediction


def as_asked(config: ModelConfig, files: WeightFiles, text: str) -> ModelConfig:
    """``config`` with the prediction that a text asks for, whatever the U-Net's ``files`` say.

    Numbers that the text does not have come from their marks. Raises ``ValueError`` as :func:`parse_prediction`, and
    ``CheckpointError`` for marks that hold no usable numbers.
    """
    noise = parse_prediction(text, config.noise)
    if noise.prediction == "edm-v" and noise == predicting(config.noise, "edm-v"):
        noise = predicting(config.noise, "edm-v", _range(files))
    config = replace(config, noise=noise)
    return _with_latents(config, files) if noise.prediction == "edm" and {MEAN, STD} <= files.entries.keys() else config


def as_stated(config: ModelConfig, files: WeightFiles, declared: bool) -> tuple[ModelConfig, list[str]]:
    """``config`` with what the U-Net's ``files`` say of themselves by marks and metadata, and lines for the log.

    ``declared`` says whether the prediction in ``config`` is a statement about this U-Net too. Raises
    ``CheckpointError`` where statements contradict each other, or one is unknown or damaged.
    """
    word, marked = _word(files), _marked(config, files)
    if marked is None:
        if word is None or config.noise.prediction in MEANT[word]:
            return config, []
        marked = replace(config, noise=predicting(config.noise, MEANT[word][0], {"ztsnr": 0} if word == "v" else None))
        if not declared and word == "v":
            note = f"{files.path} says in its metadata that it predicts v, not whether with zero terminal SNR: sampled "
            return marked, [note + f"without; --prediction v is with, and {ZERO_SNR} marks it"]
    elif word is not None and marked.noise.prediction not in MEANT[word]:
        raise _contradiction(files, f"{word!r} in its metadata", marked)
    if not declared:
        return marked, []
    if not _agree(config, marked):
        raise _contradiction(files, f"{prediction_text(config.noise)!r} in its config", marked)
    return config, []


def mark_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The marks to write beside a model's weights in a single file."""
    match config.noise.prediction:
        case "v":
            return {name: torch.zeros(0) for name in (V, ZERO_SNR)[: 1 + config.noise.zero_terminal_snr]}
        case "edm" if config.vae.latents_std:
            pairs = {MEAN: config.vae.latents_mean, STD: config.vae.latents_std}
            return {name: torch.tensor(values).view(1, -1, 1, 1) for name, values in pairs.items()}
        case "edm-v":
            ends = {HIGHEST: config.noise.sigma_max, LOWEST: config.noise.sigma_min}
            return {name: torch.tensor(value) for name, value in ends.items()}
        case _:
            return {}


def mark_metadata(config: ModelConfig) -> dict[str, str]:
    """The same for a file's metadata."""
    return {METADATA[0]: "v"} if config.noise.prediction in MEANT["v"] else {}


def with_own_defaults(config: ModelConfig, base: ModelConfig) -> ModelConfig:
    """``config`` with the settings of Playground 2.5, if it is that model and has those of SDXL ``base``."""
    is_playground = config.noise.prediction == "edm" and config.name == base.name and config.defaults == base.defaults
    return replace(config, defaults=PLAYGROUND) if is_playground else config


def _word(files: WeightFiles) -> str | None:
    """The prediction that metadata name: "epsilon", "v" or ``None``."""
    words = {key: files.metadata[key] for key in METADATA if key in files.metadata}
    for key, word in words.items():
        if word not in MEANT:
            raise CheckpointError(
                f"{files.path} has {word!r:.60} as {key} in its metadata; expected 'epsilon' or 'v', or --prediction"
            )
    if len(set(words.values())) > 1:
        raise CheckpointError(f"{files.path} contradicts itself in its metadata: {words}; expected --prediction")
    return next(iter(words.values()), None)


def _marked(config: ModelConfig, files: WeightFiles) -> ModelConfig | None:
    """``config`` with what marks say, or ``None`` if there are none."""
    match tuple(name for name in MARKS if name in files.entries):
        case ():
            return None
        case (mark, *more) if mark == V and more in ([], [ZERO_SNR]):
            return replace(config, noise=predicting(config.noise, "v", {"ztsnr": len(more)}))
        case (mark, other) if (mark, other) == (MEAN, STD):
            return _with_latents(replace(config, noise=predicting(config.noise, "edm")), files)
        case marks if HIGHEST in marks and set(marks) <= {V, HIGHEST, LOWEST}:  # ComfyUI writes V beside the range
            try:
                return replace(config, noise=predicting(config.noise, "edm-v", _range(files)))
            except ValueError as error:
                raise CheckpointError(f"{files.path} has damaged marks: {error}") from error
        case marks:
            raise CheckpointError(
                f"{files.path} is marked by {', '.join(marks)}, which do not go together; expected {TOGETHER}, or "
                "--prediction"
            )


def _with_latents(config: ModelConfig, files: WeightFiles) -> ModelConfig:
    channels = config.vae.latent_channels
    mean, std = (_numbers(files, name, channels) for name in (MEAN, STD))
    try:
        vae = replace(config.vae, scale_factor=PLAYGROUND_SCALE, latents_mean=mean, latents_std=std)
    except ValueError as error:
        raise CheckpointError(f"{files.path} has damaged marks: {error}") from error
    return replace(config, vae=vae)


def _range(files: WeightFiles) -> dict[str, float]:
    names = {"sigma_min": LOWEST, "sigma_max": HIGHEST}
    return {key: _numbers(files, name, 1)[0] for key, name in names.items() if name in files.entries}


def _numbers(files: WeightFiles, name: str, count: int) -> tuple[float, ...]:
    """The numbers of a mark, in the 7 digits that fp32 has: 0.002 and not 0.0020000000949949026."""
    entry, numbers = files.entries[name], torch.zeros(count, dtype=torch.float64)
    if entry.dtype not in READABLE or math.prod(entry.shape) != count:
        raise CheckpointError(
            f"{files.path} has {entry.dtype} {list(entry.shape)} as {name}; expected {count} floating-point numbers"
        )
    files.file_of(name).read_into({name: numbers})
    if not numbers.isfinite().all():
        raise CheckpointError(f"{files.path} has {numbers.tolist()} as {name}; expected finite numbers")
    return tuple(float(f"{number:.7g}") for number in numbers.tolist())


def _agree(config: ModelConfig, marked: ModelConfig) -> bool:
    """Whether two say the same of predictions and latents, up to the rounding of marks."""
    ours, theirs = (
        [each.noise.sigma_min, each.noise.sigma_max, *each.vae.latents_mean, *each.vae.latents_std]
        for each in (config, marked)
    )
    kinds = {(each.noise.prediction, each.noise.zero_terminal_snr) for each in (config, marked)}
    near = (a == b or (a and b and math.isclose(a, b, rel_tol=1e-6)) for a, b in zip(ours, theirs, strict=False))
    return len(kinds) == 1 and len(ours) == len(theirs) and all(near)


def _contradiction(files: WeightFiles, said: str, marked: ModelConfig) -> CheckpointError:
    marks = [name for name in MARKS if name in files.entries] or [key for key in METADATA if key in files.metadata]
    return CheckpointError(
        f"{files.path} contradicts itself: it predicts {said}, and {prediction_text(marked.noise)!r} by "
        f"{' and '.join(marks)}; expected --prediction to settle it"
    )
