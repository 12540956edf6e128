"""diffusers' models with our weights: the independent peers of the parity tests."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from minisdxl.unet import UNet
from minisdxl.vae import VAE


def diffusers_unet(unet: UNet, size_channels: int = 1) -> UNet2DConditionModel:
    """diffusers' U-Net of the same config, weights and dtype, by diffusers' own conversion of official names."""
    c = unet.config
    depths = [level.depth for level in c.levels]
    peer = UNet2DConditionModel(
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        block_out_channels=tuple(c.channels(level) for level in range(len(c.levels))),
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        # the last is the middle's too, and the only one that counts where the last level has no attention
        transformer_layers_per_block=(*(max(depth, 1) for depth in depths[:-1]), depths[-1] or c.middle_depth or 1),
        layers_per_block=c.res_blocks,
        # diffusers' name notwithstanding, this is the number of heads
        attention_head_dim=tuple(c.channels(level) // c.head_channels for level in range(len(c.levels))),
        cross_attention_dim=c.context_channels,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_channels,
        projection_class_embeddings_input_dim=c.vector_channels,
        norm_num_groups=c.norm_groups,
    )
    peer = peer.to(next(unet.parameters()).dtype).eval()
    names = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    peer.load_state_dict(convert_ldm_unet_checkpoint(names, dict(peer.config)))
    return peer


def diffusers_vae(vae: VAE) -> AutoencoderKL:
    """diffusers' autoencoder of the same config, weights and dtype, by diffusers' own conversion of official names."""
    config = vae.config
    peer = AutoencoderKL(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.multipliers),
        up_block_types=("UpDecoderBlock2D",) * len(config.multipliers),
        block_out_channels=tuple(config.channels * m for m in config.multipliers),
        layers_per_block=config.res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scale_factor,
    )
    peer = peer.to(vae.dtype).eval()
    names = {f"first_stage_model.{name}": value for name, value in vae.state_dict().items()}
    peer.load_state_dict(convert_ldm_vae_checkpoint(names, dict(peer.config)))
    return peer
