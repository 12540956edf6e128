"""Model configurations: every size and constant of every model, with its source.

They are frozen dataclasses that validate themselves. ``SDXL_BASE`` is the published model, ``SHAPES`` the small bundled
one; they differ in numbers and default settings only. Comments give the name in the official config
(``sd_xl_base.yaml`` of Stability AI's generative-models) where it is another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from atedm.plan import Site

LARGEST_SIDE = 4096  # pixels; a larger picture is taken for a typing error
# What U-Nets predict, by name. minisdxl.preconditioning has the formulas.
PREDICTIONS = ("noise", "v", "edm", "edm-v", "flow")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net. Each level has half the height and width of the one before."""

    multiplier: int  # channels = model_channels * multiplier; official: channel_mult
    depth: int  # transformer layers in each attention block, 0 = no attention; official: transformer_depth

    def __post_init__(self) -> None:
        _require(self.multiplier >= 1, f"level multiplier is {self.multiplier}, expected 1 or more")
        _require(self.depth >= 0, f"level depth is {self.depth}, expected 0 or more")


@dataclass(frozen=True)
class AttentionSite(Site):
    """An attention block of the U-Net: where it sits, its depth and its width."""

    channels: int


@dataclass(frozen=True)
class UNetConfig:
    """The denoising U-Net. Raises ``ValueError`` for numbers that do not fit together."""

    model_channels: int
    levels: tuple[Level, ...]
    middle_depth: int  # official: transformer_depth_middle (defaults to the last level's depth)
    res_blocks: int  # official: num_res_blocks
    head_channels: int  # official: num_head_channels
    context_channels: int  # official: context_dim
    vector_channels: int  # official: adm_in_channels
    in_channels: int = 4
    out_channels: int = 4
    norm_groups: int = 32  # a constant of the official code, a number here

    def __post_init__(self) -> None:
        _require(len(self.levels) >= 1, "U-Net has no levels")
        _require(self.res_blocks >= 1, f"res_blocks is {self.res_blocks}, expected 1 or more")
        for level in self.levels:
            channels = self.model_channels * level.multiplier
            _require(
                channels % self.norm_groups == 0,
                f"{channels} channels do not divide into {self.norm_groups} normalization groups",
            )
            _require(
                level.depth == 0 or channels % self.head_channels == 0,
                f"{channels} channels do not divide into heads of {self.head_channels}",
            )

    @property
    def embedding_channels(self) -> int:
        """Width of the time (and label) embedding: a constant 4x in the official code."""
        return 4 * self.model_channels

    def channels(self, level: int) -> int:
        """Channels of feature level ``level``."""
        return self.model_channels * self.levels[level].multiplier

    def attention_sites(self) -> Iterator[AttentionSite]:
        """Every attention block, in the order in which they run."""
        last = len(self.levels) - 1
        for level, spec in enumerate(self.levels):
            for index in range(self.res_blocks if spec.depth else 0):
                yield AttentionSite("down", level, index, spec.depth, self.channels(level))
        if self.middle_depth:
            yield AttentionSite("mid", last, 0, self.middle_depth, self.channels(last))
        for level, spec in reversed(list(enumerate(self.levels))):
            for index in range(self.res_blocks + 1 if spec.depth else 0):
                yield AttentionSite("up", level, index, spec.depth, self.channels(level))


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder (official: ``ddconfig`` of the first stage)."""

    channels: int  # official: ch
    multipliers: tuple[int, ...]  # official: ch_mult
    res_blocks: int  # official: num_res_blocks
    scale_factor: float  # latent = scale_factor * encoder mean; brings the latent to about unit variance
    latent_channels: int = 4  # official: z_channels
    image_channels: int = 3
    norm_groups: int = 32
    # Of each latent channel before it is scaled, brought to 0 and 1 (Playground 2.5); () leaves them as they are.
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require(self.scale_factor > 0, f"VAE scale_factor is {self.scale_factor}, expected more than 0")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            _require(
                len(values) in (0, self.latent_channels) and all(map(_is_number, values)),
                f"VAE {name} is {values!r:.100}, expected {self.latent_channels} numbers or none",
            )
        _require(
            len(self.latents_mean) == len(self.latents_std) and all(value > 0 for value in self.latents_std),
            f"VAE latents_mean is {self.latents_mean} and latents_std {self.latents_std}, expected both or neither, "
            "and deviations of more than 0",
        )
        for multiplier in self.multipliers:
            channels = self.channels * multiplier
            _require(
                channels % self.norm_groups == 0,
                f"{channels} VAE channels do not divide into {self.norm_groups} normalization groups",
            )

    @property
    def downscale(self) -> int:
        """Pixels of the picture per latent pixel, along each side."""
        return int(2 ** (len(self.multipliers) - 1))


@dataclass(frozen=True)
class TextConfig:
    """One text encoder. ``projection`` is the width of its pooled output, ``None`` if it has none."""

    width: int
    layers: int
    heads: int
    activation: str  # "quick_gelu" (CLIP) or "gelu" (OpenCLIP)
    vocabulary: int
    start_token: int
    end_token: int
    pad_token: int
    projection: int | None = None
    context_length: int = 77

    def __post_init__(self) -> None:
        _require(self.width % self.heads == 0, f"text width {self.width} does not divide into {self.heads} heads")
        _require(self.layers >= 2, f"text encoder has {self.layers} layers, expected 2 or more")
        _require(
            self.activation in ("quick_gelu", "gelu"),
            f"text activation is {self.activation!r}, expected 'quick_gelu' or 'gelu'",
        )


@dataclass(frozen=True)
class NoiseConfig:
    """Noise levels of training, and what the U-Net predicts at them.

    The levels of "noise" and "v" are discrete (official: ``LegacyDDPMDiscretization``), those of the others continuous.
    Raises ``ValueError`` for what does not go together.
    """

    steps: int = 1000  # official: num_timesteps
    beta_start: float = 0.00085  # official: linear_start
    beta_end: float = 0.0120  # official: linear_end
    prediction: str = "noise"  # one of PREDICTIONS
    zero_terminal_snr: bool = False  # "v": the noisiest level is noise alone (arXiv:2305.08891)
    sigma_min: float | None = None  # "edm" and "edm-v": the range of the noise levels
    sigma_max: float | None = None
    shift: float = 1.0  # "flow": above 1 moves the steps towards noise (arXiv:2403.03206, equation 23)

    def __post_init__(self) -> None:
        _require(
            self.prediction in PREDICTIONS,
            f"prediction is {self.prediction!r:.60}, expected one of {', '.join(PREDICTIONS)}",
        )
        _require(
            type(self.zero_terminal_snr) is bool and (self.prediction == "v" or not self.zero_terminal_snr),
            f"zero_terminal_snr is {self.zero_terminal_snr!r:.60} and prediction {self.prediction!r}, expected a model "
            "with zero terminal SNR to predict 'v'",
        )
        ends = self.sigma_min, self.sigma_max
        _require(
            all(map(_is_number, ends)) and 0 < float(self.sigma_min or 0) < float(self.sigma_max or 0)
            if self.prediction.startswith("edm")
            else ends == (None, None),
            f"sigma_min is {self.sigma_min!r:.60}, sigma_max {self.sigma_max!r:.60}, prediction {self.prediction!r}, "
            "expected 0 < sigma_min < sigma_max with 'edm' and 'edm-v', and None with others",
        )
        _require(
            _is_number(self.shift) and self.shift > 0 and (self.prediction == "flow" or self.shift == 1),
            f"shift is {self.shift!r:.60}, prediction {self.prediction!r}, expected more than 0, and 1 if not 'flow'",
        )


@dataclass(frozen=True)
class Defaults:
    """A model's best settings, used unless others are given. Raises ``ValueError`` for values out of range."""

    sampling: str = "euler"  # a name in minisdxl.samplings.SAMPLINGS
    steps: int = 50
    cfg: float = 7.0  # classifier-free guidance scale
    prune: str = "at-edm"  # the preset that `--prune` without a name takes
    # What is known of presets on this model, by a preset's name; the command prints it beside the pictures.
    prune_notes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"default steps is {self.steps}, expected 1 or more")
        _require(math.isfinite(self.cfg), f"default cfg is {self.cfg}, expected a finite number")


def inpainting_channels(latent: int) -> int:
    """Input channels of an inpainting model's U-Net: a latent, a mask, and the latent of the masked picture."""
    return latent + 1 + latent


@dataclass(frozen=True)
class ModelConfig:
    """A complete model: U-Net, VAE, text encoders, noise levels, picture size and default settings.

    SDXL has two text encoders, and its refiner the second one alone.
    """

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text: tuple[TextConfig, ...]
    size: int  # side of a picture in pixels, when none is asked for
    size_channels: int = 256  # embedding of each size number; official: ConcatTimestepEmbedderND.outdim
    noise: NoiseConfig = NoiseConfig()
    buckets: tuple[tuple[int, int], ...] = ()  # (width, height) of all pictures it was trained on; () if not recorded
    defaults: Defaults = Defaults()
    # Of the refiner: the aesthetic score that it is told in place of the target size, and that of the unconditional
    # half. Its empty negative prompts are encoded, where SDXL's become zeros.
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        kinds = {(len(self.text), len(self.scores))} & {(2, 0), (1, 2)}
        _require(
            bool(kinds),
            f"{len(self.text)} text encoders and {len(self.scores)} aesthetic scores, expected 2 and none, "
            "or 1 and 2 of a refiner",
        )
        for bucket in self.buckets:
            _require(
                len(bucket) == 2 and all(isinstance(side, int) and side >= 8 for side in bucket),
                f"training bucket is {bucket}, expected a width and a height in pixels",
            )
        pooled = self.text[-1].projection
        _require(pooled is not None, "the last text encoder needs a projection: its pooled output feeds the U-Net")
        assert pooled is not None
        context = sum(encoder.width for encoder in self.text)
        _require(
            context == self.unet.context_channels,
            f"text encoders give {context} context channels, the U-Net takes {self.unet.context_channels}",
        )
        vector = pooled + (5 if self.refines else 6) * self.size_channels
        _require(
            vector == self.unet.vector_channels,
            f"text and sizes give {vector} vector channels, the U-Net takes {self.unet.vector_channels}",
        )
        latent = self.vae.latent_channels
        _require(
            self.unet.in_channels in (latent, inpainting_channels(latent)),
            f"the VAE has {latent} latent channels, the U-Net takes {self.unet.in_channels}; "
            f"expected {latent}, or {inpainting_channels(latent)} of an inpainting model",
        )

    @property
    def inpaints(self) -> bool:
        """Whether it is an inpainting model, whose U-Net sees the mask and the masked picture beside the latent."""
        return self.unet.in_channels == inpainting_channels(self.vae.latent_channels)

    @property
    def refines(self) -> bool:
        """Whether it is a refiner, which is trained on the last steps alone."""
        return bool(self.scores)

    def picture_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The (width, height) of a picture in pixels; ``None`` is the size that the model was made for.

        Raises ``ValueError`` unless both are multiples of 8, no smaller than one pixel of the deepest level, and no
        larger than ``LARGEST_SIDE``.
        """
        width, height = size if size is not None else (self.size, self.size)
        smallest = max(8, self.vae.downscale * 2 ** (len(self.unet.levels) - 1))
        for name, side in (("width", width), ("height", height)):
            if side % 8 or not smallest <= side <= LARGEST_SIDE:
                raise ValueError(
                    f"picture {name} is {side} pixels, expected a multiple of 8 from {smallest} to {LARGEST_SIDE}"
                )
        return width, height

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The (channels, height, width) of the latent of a picture of ``size``, (width, height)."""
        return self.vae.latent_channels, size[1] // self.vae.downscale, size[0] // self.vae.downscale

    def nearest_bucket(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """The training bucket with the aspect ratio nearest to ``size``; ``None`` if there are no buckets."""

        def distance(bucket: tuple[int, int]) -> float:
            return abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1]))

        return min(self.buckets, key=distance, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of :meth:`to_dict`. Raises ``ValueError`` for missing, extra or impossible entries."""
        try:
            unet = {**data["unet"], "levels": tuple(Level(**level) for level in data["unet"]["levels"])}
            vae = {**data["vae"], "multipliers": tuple(data["vae"]["multipliers"])}
            vae |= {key: _tuple(vae.get(key, ())) for key in ("latents_mean", "latents_std")}  # absent in older files
            parts = {
                "unet": UNetConfig(**unet),
                "vae": VAEConfig(**vae),
                "text": tuple(TextConfig(**encoder) for encoder in data["text"]),
                "noise": NoiseConfig(**data["noise"]),
                "buckets": tuple(tuple(bucket) for bucket in data.get("buckets", ())),  # absent in older files
                "defaults": _defaults(data),
                "scores": tuple(map(float, data.get("scores", ()))),
            }
            return cls(**{**data, **parts})
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"model config is not usable: {error}") from error


def _tuple(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{values!r:.60} is no list")
    return tuple(values)


def check_refiner(path: object, refiner: ModelConfig, base: ModelConfig) -> None:
    """Raises ``ValueError`` unless ``refiner``, at ``path``, is one that works on latents and tokens of ``base``."""
    if not refiner.refines:
        raise ValueError(f"{path} is {refiner.name}, expected a refiner, which has one text encoder")
    if base.refines:
        raise ValueError(f"{base.name} is refined by {path}, expected a base model")
    found, expected = (
        (config.vae.latent_channels, config.vae.downscale, config.vae.scale_factor, config.text[-1].vocabulary)
        for config in (refiner, base)
    )
    if refiner.noise != base.noise:
        raise ValueError(f"{path} has noise {refiner.noise}, expected {base.noise} of {base.name}")
    if found != expected:
        raise ValueError(
            f"{path} has (latent channels, downscale, scale factor, vocabulary) {found}, expected {expected} "
            f"of {base.name}"
        )


def known_defaults(name: str) -> Defaults:
    """The defaults of the model ``name`` in ``MODELS``, or SDXL's for another name."""
    return MODELS.get(name, SDXL_BASE).defaults


def _defaults(data: dict[str, Any]) -> Defaults:
    """The defaults in a config's ``data``. Files from before version 0.2 have none."""
    if "defaults" not in data:
        return known_defaults(data["name"])
    values = data["defaults"]
    notes = tuple((str(preset), str(note)) for preset, note in values["prune_notes"])
    return Defaults(**{**values, "prune_notes": notes})


# The 40 sizes of multi-aspect training: SDXL paper (arXiv:2307.01952), appendix I, as widths by height. The list is not
# symmetric: 1344 x 704 is in it, 704 x 1344 is not.
_WIDTHS = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024, 960),
    1088: (960, 896),
    1152: (896, 832),
    1216: (832,),
    1280: (768,),
    1344: (768,),
    1408: (704,),
    1472: (704,),
    1536: (640,),
    1600: (640,),
    1664: (576,),
    1728: (576,),
    1792: (576,),
    1856: (512,),
    1920: (512,),
    1984: (512,),
    2048: (512,),
}

SDXL_BASE = ModelConfig(
    name="sdxl-base",
    unet=UNetConfig(
        model_channels=320,
        levels=(Level(1, 0), Level(2, 2), Level(4, 10)),
        middle_depth=10,
        res_blocks=2,
        head_channels=64,
        context_channels=2048,
        vector_channels=2816,
    ),
    vae=VAEConfig(channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, scale_factor=0.13025),
    text=(
        # CLIP ViT-L/14, and OpenCLIP ViT-bigG/14, which pads with 0.
        TextConfig(768, 12, 12, "quick_gelu", 49408, start_token=49406, end_token=49407, pad_token=49407),
        TextConfig(1280, 32, 20, "gelu", 49408, start_token=49406, end_token=49407, pad_token=0, projection=1280),
    ),
    size=1024,
    buckets=tuple((width, height) for height, widths in _WIDTHS.items() for width in widths),
)

# diffusers/stable-diffusion-xl-1.0-inpainting-0.1: unet/config.json.
SDXL_INPAINTING = replace(SDXL_BASE, name="sdxl-inpainting", unet=replace(SDXL_BASE.unet, in_channels=9))

# stabilityai/stable-diffusion-xl-refiner-1.0: sd_xl_refiner.yaml, unet/config.json; the scores are those of diffusers.
SDXL_REFINER = replace(
    SDXL_BASE,
    name="sdxl-refiner",
    unet=UNetConfig(
        model_channels=384,
        levels=(Level(1, 0), Level(2, 4), Level(4, 4), Level(4, 0)),
        middle_depth=4,
        res_blocks=2,
        head_channels=64,
        context_channels=1280,
        vector_channels=2560,
    ),
    text=SDXL_BASE.text[1:],
    scores=(6.0, 2.5),
)

SHAPES = ModelConfig(
    name="shapes",
    unet=UNetConfig(
        model_channels=32,
        levels=(Level(1, 0), Level(2, 2), Level(4, 4)),
        middle_depth=4,
        res_blocks=1,
        head_channels=32,
        context_channels=192,
        vector_channels=320,
        norm_groups=8,
    ),
    # Its latents have variance 1 before the scale factor. At a factor of 1 the layout of a picture shows through the
    # strongest noise (an object of 16x16 latents averages it away), and a model reads it there instead of choosing it.
    vae=VAEConfig(channels=8, multipliers=(1, 2, 4), res_blocks=1, scale_factor=0.25, norm_groups=4),
    text=(
        TextConfig(64, 3, 2, "quick_gelu", 640, start_token=638, end_token=639, pad_token=639),
        TextConfig(128, 4, 4, "gelu", 640, start_token=638, end_token=639, pad_token=0, projection=128),
    ),
    size=256,
    size_channels=32,
    defaults=Defaults(
        sampling="euler-ancestral",
        cfg=4.0,
        prune="moving-grid",
        prune_notes=(
            ("at-edm", "at-edm gets 0 of 48 captions right on this model, moving-grid 46: docs/better-method.md"),
        ),
    ),
)

MODELS = {config.name: config for config in (SDXL_BASE, SDXL_INPAINTING, SDXL_REFINER, SHAPES)}
