"""Token plans inside diffusers: :class:`TokenUNet` takes the place of a pipeline's U-Net.

    pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.unet = TokenUNet(pipe.unet, prune="at-edm", scheduler=pipe.scheduler)

It is our U-Net on the weights of theirs, with the ``forward`` of ``UNet2DConditionModel``. This is the only module that
imports diffusers. Legend: B batch, T text tokens, I image tokens, C channels, (h, w) a latent's height and width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as processors
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from einops import rearrange
from torch import Tensor, nn

from atedm.graph.inputs import AttentionInputs
from atedm.plan import DENSE, TokenPlan
from atedm.presets import parse_preset
from atedm.schedule import Schedule
from minisdxl.checkpoint.folder_reader import unet_config
from minisdxl.checkpoint.json_fields import Fields
from minisdxl.checkpoint.layouts import Layout, unet_layout
from minisdxl.config import NoiseConfig, UNetConfig
from minisdxl.embedding import sinusoidal_embedding
from minisdxl.operators import attention
from minisdxl.transformer import Attention, ContextKV, TransformerLayer
from minisdxl.unet import PromptKV, UNet

PAPER_STEPS = 50  # the run whose steps are counted where there is no scheduler: tau is given for every 50

# Other ways to compute the same attention. A processor that is not here may compute something else.
SAME_ATTENTION = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
)
IP_ADAPTERS = (
    processors.IPAdapterAttnProcessor,
    processors.IPAdapterAttnProcessor2_0,
    processors.IPAdapterXFormersAttnProcessor,
)


@dataclass(frozen=True)
class Residuals:
    """What other networks add to feature maps (B, C, H, W) of the U-Net."""

    skips: Sequence[Tensor] = ()  # of a ControlNet, one for each skip
    middle: Tensor | None = None  # of a ControlNet
    levels: Sequence[Tensor] = ()  # of a T2I-Adapter, one for each level, and perhaps one for the middle


class ImageContext(NamedTuple):
    """Keys and values of the prompt, and of the images of each IP-Adapter."""

    text: ContextKV
    images: list[ContextKV]


class ImageAttention(Attention):
    """Cross-attention to a prompt and, with weights of its own, to images (IP-Adapter: Ye et al. 2023).

    The official name of the adapter's weights is ``processor``, because diffusers keeps them in an attention processor.
    """

    def __init__(self, plain: Attention, processor: nn.Module) -> None:
        super().__init__(plain.to_q.out_features, plain.to_k.in_features, plain.to_q.out_features // plain.heads)
        self.processor = processor

    def project_context(self, context: tuple[Tensor, list[Tensor]]) -> ImageContext:  # type: ignore[override]
        """Keys and values of a prompt (B, T, c), and of each adapter's images (B, images, I, c)."""
        text, images = context
        projections = zip(images, self.processor.to_k_ip, self.processor.to_v_ip, strict=True)  # type: ignore[arg-type]
        return ImageContext(
            super().project_context(text),
            [ContextKV(self._heads(to_k(image)), self._heads(to_v(image))) for image, to_k, to_v in projections],
        )

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b images i (h d) -> b h (images i) d", h=self.heads)

    def forward(self, x: Tensor, context: ImageContext) -> tuple[Tensor, AttentionInputs]:  # type: ignore[override]
        """(B, n, C) -> (B, n, C). Tokens are ranked by their attention to the prompt, as without images."""
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        attended, log_sum_exp = attention(q, *context.text, self.scale)
        inputs = AttentionInputs(q, context.text.key, self.scale, log_sum_exp)
        # Read at every call: ``pipe.set_ip_adapter_scale`` changes it.
        for image, scale in zip(context.images, self.processor.scale, strict=True):  # type: ignore[arg-type]
            attended = attended + scale * attention(q, *image, self.scale)[0]
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)")), inputs


class SteeredUNet(UNet):
    """Our U-Net, with :class:`Residuals` of ControlNets and T2I-Adapters."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        # Input blocks after which diffusers adds the residual of a level: its last ResBlock's, before the downsampling;
        # at a level without attention after it.
        last_blocks = [level * (config.res_blocks + 1) + config.res_blocks for level in range(len(config.levels))]
        self.level_ends = [
            last + (spec.depth == 0 and spec is not config.levels[-1])
            for last, spec in zip(last_blocks, config.levels, strict=True)
        ]

    def forward(  # type: ignore[override]
        self, x: Tensor, embedding: Tensor, text: PromptKV, plan: TokenPlan, residuals: Residuals
    ) -> Tensor:
        """The predicted noise (B, 4, h, w), of an embedding (B, 4 * model_channels) of timestep and vector."""
        plan.check(self.config.attention_sites())
        levels = list(residuals.levels)
        skips = []
        for index, block in enumerate(self.input_blocks):
            x = block(x, embedding, text, plan, x.shape[-2:])
            if levels and index in self.level_ends:
                x = x + levels.pop(0)
            skips.append(x)
        if residuals.skips:
            skips = [skip + residual for skip, residual in zip(skips, residuals.skips, strict=True)]
        x = self.middle_block(x, embedding, text, plan, x.shape[-2:])
        if levels and levels[0].shape == x.shape:
            x = x + levels.pop(0)
        if residuals.middle is not None:
            x = x + residuals.middle
        for block in self.output_blocks:
            skip = skips.pop()
            next_size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = block(torch.cat([x, skip], dim=1), embedding, text, plan, next_size)
        return self.out(x)


class TokenUNet(nn.Module):
    """Stands in for ``UNet2DConditionModel`` in pipelines of SDXL, and follows a token plan.

    Its parameters are those of ``unet`` themselves: nothing is copied, and moving or casting one moves or casts the
    other. ``unet`` stays at :attr:`original`, to be put back with ``pipe.unet = pipe.unet.original``. Nothing is
    remembered from one call to the next.

    LoRAs, IP-Adapters and the like change the modules of ``unet``: load them first, and fuse LoRAs, then make this.
    """

    original: UNet2DConditionModel

    def __init__(self, unet: UNet2DConditionModel, prune: str | Schedule | None = "at-edm", scheduler: Any = None):
        """``prune`` is a preset, as "at-edm:rho=0.5", or a schedule; ``None`` runs dense.

        The step of a call is the place of its timestep among ``scheduler.timesteps``, which the pipeline sets for each
        run. It must be the pipeline's own scheduler. Without one, a timestep counts as the nearest step before it of a
        run of 50 official steps: with as many steps the plans are the same, with others DSAP's early steps may be one
        more or one less.

        Raises:
            ValueError: for a U-Net that is not SDXL's, or was changed in a way that would be lost; for a preset that
                does not exist or fit.
        """
        super().__init__()
        _check_unchanged(unet)
        config = _config(unet)
        self.schedule = parse_preset(prune) if isinstance(prune, str) else prune
        self.scheduler = scheduler
        self.sites = list(config.attention_sites())
        if self.schedule is not None:
            self.schedule.plan(0, 1, self.sites)  # raises for a preset that does not fit
        self.__dict__["original"] = unet  # not as a sub-module, which would list its parameters twice
        self.model = _our_unet(unet, config)
        # What SDXL's own U-Net has not: IP-Adapter's projection of images, LCM's of the guidance scale.
        self.encoder_hid_proj: nn.Module | None = unet.encoder_hid_proj
        self.cond_proj: nn.Module | None = unet.time_embedding.cond_proj
        self.train(unet.training)

    @property
    def config(self) -> Any:
        """diffusers' config of the U-Net."""
        return self.original.config

    @property
    def add_embedding(self) -> nn.Module:
        """diffusers' embedding of pooled text and sizes, of which pipelines read the width."""
        return self.original.add_embedding

    @property
    def attn_processors(self) -> dict[str, Any]:
        """diffusers' attention processors. The scales of IP-Adapters in them count."""
        return self.original.attn_processors

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(UNet2DConditionModel, name):
                raise
        raise AttributeError(
            f"TokenUNet has no {name}: call it on pipe.unet.original, and make the TokenUNet anew of what comes out"
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The predicted noise, as ``UNet2DConditionModel.forward``: the same arguments, and under no plan the same.

        ``sample`` is (B, 4, h, w), or with more channels where the U-Net takes them; ``encoder_hidden_states`` is
        (B, T, c). Raises ``ValueError`` for masks and for arguments of attention processors, which have no meaning
        here; for a lone residual of a ControlNet; and as :meth:`plan`.
        """
        _check_absent(
            class_labels=class_labels,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
        )
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise ValueError(
                "one of down_block_additional_residuals and mid_block_additional_residual is None, expected both or "
                "neither; residuals of a T2I-Adapter are down_intrablock_additional_residuals"
            )
        added = added_cond_kwargs or {}
        context = self.original.process_encoder_hidden_states(encoder_hidden_states, added)
        predicted = self.model(
            sample,
            self._embedding(sample, timestep, timestep_cond, added),
            self.model.project_context(context),
            self.plan(timestep),
            Residuals(
                down_block_additional_residuals or (),
                mid_block_additional_residual,
                down_intrablock_additional_residuals or (),
            ),
        )
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)

    def _embedding(
        self, sample: Tensor, timestep: Tensor | float | int, guidance: Tensor | None, added: dict[str, Any]
    ) -> Tensor:
        """Of the timestep, LCM's embedded guidance scale, pooled text and sizes: (B, 4 * model_channels)."""
        for name in ("text_embeds", "time_ids"):
            if name not in added:
                raise ValueError(f"added_cond_kwargs has {', '.join(added) or 'nothing'}, expected {name} in it")
        # In float32 whatever the model's dtype, as in diffusers.
        times = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1).expand(len(sample))
        embedded = sinusoidal_embedding(times, self.model.config.model_channels).to(sample.dtype)
        if self.cond_proj is not None and guidance is not None:
            embedded = embedded + self.cond_proj(guidance)
        sizes = sinusoidal_embedding(added["time_ids"].flatten().float(), self.config.addition_time_embed_dim)
        vector = torch.cat([added["text_embeds"], sizes.reshape(len(sample), -1)], dim=-1).to(sample.dtype)
        return self.model.time_embed(embedded) + self.model.label_emb(vector)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def plan(self, timestep: Tensor | float | int) -> TokenPlan:
        """The token plan at a timestep, a number or a tensor of equal ones.

        Raises ``ValueError`` for a timestep that the scheduler does not have, and for different ones in a batch.
        """
        if self.schedule is None:
            return DENSE
        times = torch.as_tensor(timestep).reshape(-1)
        time = times[0].item()
        if not (times == time).all():
            raise ValueError(f"timesteps of a batch are {times.tolist()}, expected equal ones under a token plan")
        return self.schedule.plan(*self._step(time), self.sites)

    def _step(self, time: float) -> tuple[int, int]:
        """The number of the step at a timestep, and the number of steps."""
        if self.scheduler is None:
            last = NoiseConfig().steps - 1
            if not 0 <= time <= last:
                raise ValueError(f"timestep is {time}, expected 0 to {last}, or a scheduler that has it")
            return min(int((last - time) / last * PAPER_STEPS), PAPER_STEPS - 1), PAPER_STEPS
        # Second-order schedulers list the timestep of each call, in which a step's comes twice in a row.
        times = torch.unique_consecutive(self.scheduler.timesteps).tolist()
        if time not in times:
            raise ValueError(
                f"timestep {time} is none of the {len(times)} of the scheduler that TokenUNet was given; expected "
                "scheduler=pipe.scheduler, given again when the pipeline gets another one"
            )
        return times.index(time), len(times)


def _check_absent(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is given, expected None: TokenUNet has no use for it")


def _check_unchanged(unet: object) -> None:
    """Refuses what is no U-Net of diffusers, and what changes its computation outside its weights."""
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"unet is a {type(unet).__name__}, expected a UNet2DConditionModel that is not compiled yet")
    for name, processor in unet.attn_processors.items():
        if type(processor) not in SAME_ATTENTION + IP_ADAPTERS:
            raise ValueError(
                f"{name} is a {type(processor).__name__}, which TokenUNet cannot run; expected diffusers' own or an "
                "IP-Adapter"
            )
    if any(getattr(block, "s1", None) is not None for block in unet.up_blocks):
        raise ValueError("the U-Net has FreeU enabled, which TokenUNet cannot run; expected pipe.disable_freeu() first")
    dtypes = {str(parameter.dtype) for parameter in unet.parameters()}
    if len(dtypes) > 1 or not unet.dtype.is_floating_point:
        raise ValueError(f"the U-Net's weights are in {', '.join(sorted(dtypes))}, expected one floating-point dtype")


def _config(unet: UNet2DConditionModel) -> UNetConfig:
    """Our config of a U-Net of diffusers. Raises ``CheckpointError``, a ``ValueError``, for what is not SDXL's."""
    values = json.loads(unet.to_json_string())
    if values.get("encoder_hid_dim_type") == "ip_image_proj":
        del values["encoder_hid_dim_type"]  # an IP-Adapter was loaded into it
    return unet_config(Fields(Path("unet.config"), values))


def _our_unet(unet: UNet2DConditionModel, config: UNetConfig) -> SteeredUNet:
    """Our U-Net whose parameters are those of ``unet``."""
    layout = unet_layout(config)
    with torch.device("meta"):
        ours = SteeredUNet(config)
        _attend_to_images(ours, unet, layout)
    given = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if not name.startswith(("encoder_hid_proj.", "time_embedding.cond_proj."))
    }
    names = {name: layout.mapping(name).names[0] for name in ours.state_dict()}
    wanted = {theirs: ours.get_parameter(name).shape for name, theirs in names.items()}
    wrong = [name for name in {**given, **wanted} if name not in given or given[name].shape != wanted.get(name)]
    if wrong:
        raise ValueError(
            f"the U-Net has {len(wrong)} missing, unexpected or mis-shaped tensors, such as {wrong[0]}; expected plain "
            "weights: fuse LoRAs first, with pipe.fuse_lora() and pipe.unload_lora_weights()"
        )
    for name, theirs in names.items():  # load_state_dict carries this over to what it assigns
        ours.get_parameter(name).requires_grad_(given[theirs].requires_grad)
    ours.load_state_dict({name: given[theirs] for name, theirs in names.items()}, strict=True, assign=True)
    return ours


def _attend_to_images(ours: UNet, unet: UNet2DConditionModel, layout: Layout) -> None:
    """Gives every layer whose cross-attention has an IP-Adapter in ``unet`` that adapter."""
    for name, layer in ours.named_modules():
        if isinstance(layer, TransformerLayer):
            (theirs,) = layout.mapping(f"{name}.attn2.processor").names
            processor = unet.attn_processors[theirs]
            if isinstance(processor, IP_ADAPTERS):
                layer.attn2 = ImageAttention(layer.attn2, processor)
