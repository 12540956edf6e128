"""What a diffusers folder's JSON files say: the published ones, those that are written here, and others."""

from __future__ import annotations

import copy
import inspect
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.folder_reader import INDEX, SCHEDULER, check_part, described_config, read_config
from minisdxl.checkpoint.folder_writer import json_files
from minisdxl.checkpoint.json_fields import LARGEST, Fields, check_values
from minisdxl.checkpoint.modules import read_config as read_model
from minisdxl.config import SDXL_BASE, SDXL_INPAINTING, SDXL_REFINER, SHAPES, Level, ModelConfig
from tests.minisdxl.published import OFFICIAL, write_json
from tests.minisdxl.tiny import TINY

UNET, VAE, TEXT, TEXT_2 = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2"))
Files = dict[str, dict[str, Any]]


def with_fields(file: str, **fields: object) -> Files:
    """The published JSON files with some fields of one of them changed; ``...`` removes one."""
    files = copy.deepcopy(OFFICIAL)
    files[file] |= fields
    files[file] = {name: value for name, value in files[file].items() if value is not ...}
    return files


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused; it names the folder."""
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    message = str(caught.value)
    print(message)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_the_published_refiners_folder_is_its_own(tmp_path: Path) -> None:
    """stabilityai/stable-diffusion-xl-refiner-1.0: ``model_index.json`` and ``unet/config.json``."""
    files = copy.deepcopy(OFFICIAL)
    files[INDEX] |= {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    files[UNET] |= {
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
    }
    del files["text_encoder/config.json"]
    assert read_config(write_json(tmp_path, files)) == SDXL_REFINER
    files[UNET]["layers_per_block"] = 3
    assert "is not quite SDXL: unet.res_blocks is 3, expected 2" in refusal(write_json(tmp_path, files))


def test_the_published_folder_is_sdxl(tmp_path: Path) -> None:
    assert read_config(write_json(tmp_path, OFFICIAL)) == SDXL_BASE


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (UNET, {"sample_size": 64}),  # Turbo
        (UNET, {"time_cond_proj_dim": 256}),  # LCM
        (UNET, {"dropout": 0.0, "attention_type": "default", "reverse_transformer_layers_per_block": None}),
        (UNET, {"decay": 0.9999, "optimization_step": 7000}),  # what diffusers' EMA adds
        (UNET, {"layers_per_block": [2, 2, 2], "attention_type": ..., "conv_in_kernel": ..., "act_fn": ...}),
        (SCHEDULER, {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}),  # Turbo
        (SCHEDULER, {"_class_name": "LCMScheduler", "rescale_betas_zero_snr": False, "original_inference_steps": 50}),
        (VAE, {"force_upcast": False, "latents_mean": None, "use_quant_conv": True}),  # the fp16-fix VAE
        (TEXT, {"bos_token_id": 49406, "eos_token_id": 49407}),
        (TEXT_2, {"bos_token_id": 49406, "eos_token_id": 49407, "architectures": ...}),
        (INDEX, {"_class_name": "StableDiffusionXLImg2ImgPipeline", "_name_or_path": "somebody/fine-tune"}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_kin_of_the_published_folder_are_sdxl_too(tmp_path: Path, file: str, fields: dict[str, object]) -> None:
    assert read_config(write_json(tmp_path, with_fields(file, **fields))) == SDXL_BASE


REFUSED: list[tuple[str, dict[str, object], str]] = [
    (INDEX, {"_class_name": "StableDiffusionPipeline"}, "is a Stable Diffusion 1.x or 2.x model"),
    (INDEX, {"_class_name": "StableDiffusion3Pipeline"}, "is a Stable Diffusion 3 model"),
    (INDEX, {"_class_name": "FluxPipeline"}, "is a Flux model"),
    (INDEX, {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "is a pix2pix editing model"),
    (INDEX, {"_class_name": "StableDiffusionXLControlNetPipeline"}, "is a variant of SDXL"),
    (INDEX, {"_class_name": "KolorsPipeline"}, "is no model that is known here ('KolorsPipeline')"),
    (INDEX, {"_class_name": ...}, "is no model that is known here"),
    (INDEX, {"text_encoder": [None, None]}, "force_zeros_for_empty_prompt is True, expected False"),
    (INDEX, {"requires_aesthetics_score": True}, "requires_aesthetics_score is True, expected False"),
    (INDEX, {"force_zeros_for_empty_prompt": False}, "force_zeros_for_empty_prompt is False, expected True"),
    (SCHEDULER, {"prediction_type": "sample"}, "prediction_type is 'sample', expected 'epsilon' or 'v_prediction'"),
    (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction', expected 'epsilon' or"),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, expected False"),
    (SCHEDULER, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": 1}, "_zero_snr is 1, expected True or"),
    (SCHEDULER, {"prediction_type": "v_prediction", "timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    (SCHEDULER, {"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type is 'sample'"),
    (SCHEDULER, {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, "sigma_data is 1.0, expected 0.5"),
    (
        SCHEDULER,
        {"_class_name": "EDMEulerScheduler", "sigma_max": 0.001},
        "sigma_max 0.001, prediction 'edm'",
    ),
    (
        SCHEDULER,
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
        "sigma_data is missing, expected 1.0",
    ),
    (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift is 0.0, prediction 'flow', exp"),
    (
        SCHEDULER,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
        "use_dynamic_shifting is True, expected False",
    ),
    (SCHEDULER, {"trained_betas": [0.1]}, "trained_betas is [0.1], expected None"),
    (SCHEDULER, {"beta_schedule": "linear"}, "beta_schedule is 'linear', expected 'scaled_linear'"),
    (SCHEDULER, {"beta_schedule": ...}, "beta_schedule is missing"),
    (SCHEDULER, {"beta_end": 0.02}, "is not quite SDXL: noise.beta_end is 0.02, expected 0.012"),
    (SCHEDULER, {"num_train_timesteps": 10**12}, "noise.steps is 1000000000000, a value of another kind or size"),
    (SCHEDULER, {"beta_start": -0.1}, "noise.beta_start is -0.1, a value of another kind or size"),
    (UNET, {"in_channels": 8}, "the U-Net takes 8; expected 4, or 9 of an inpainting model"),
    (UNET, {"act_fn": "gelu"}, "act_fn is 'gelu', expected 'silu'"),
    (UNET, {"norm_num_groups": 16}, "is not quite SDXL: unet.norm_groups is 16, expected 32"),
    (UNET, {"norm_eps": 1e-6}, "norm_eps is 1e-06, expected 1e-05"),
    (UNET, {"attention_head_dim": [10, 20, 40]}, "is not quite SDXL: unet.head_channels is 32, expected 64"),
    (UNET, {"attention_head_dim": [5, 10, 10]}, "expected numbers of heads that are equally wide"),
    (UNET, {"attention_head_dim": [5, 11, 22]}, "expected numbers of heads that are equally wide"),
    (UNET, {"num_attention_heads": [5, 10, 20]}, "num_attention_heads is [5, 10, 20], expected None"),
    (UNET, {"use_linear_projection": ...}, "use_linear_projection is missing, expected True"),
    (UNET, {"addition_embed_type": None}, "addition_embed_type is None, expected 'text_time'"),
    (UNET, {"addition_time_embed_dim": 128}, "text and sizes give 2048 vector channels, the U-Net takes 2816"),
    (UNET, {"cross_attention_dim": 768}, "text encoders give 2048 context channels, the U-Net takes 768"),
    (UNET, {"layers_per_block": [2, 2, 1]}, "layers_per_block is [2, 2, 1], expected as many on all levels"),
    (UNET, {"transformer_layers_per_block": [[1, 1], [2, 1], [10, 4]]}, "transformer_layers_per_block is [[1, 1], "),
    (UNET, {"up_block_types": ["UpBlock2D"] * 3}, "up_block_types is ['UpBlock2D', "),
    (UNET, {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "down_block_types is"),
    (UNET, {"block_out_channels": [320, 640, 1281]}, "expected multiples of 320"),
    (UNET, {"mid_block_type": None}, "mid_block_type is None"),
    (VAE, {"scaling_factor": 0.18215}, "is not quite SDXL: vae.scale_factor is 0.18215, expected 0.13025"),
    (VAE, {"scaling_factor": ...}, "vae.scale_factor is 0.18215"),
    (VAE, {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155]}, "VAE latents_mean is (-1.6574, "),  # no deviations
    (VAE, {"latents_std": [1.0, 1.0, 1.0]}, "latents_std is [1.0, 1.0, 1.0], expected a list of 4 finite numbers"),
    (VAE, {"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 0]}, "deviations of more than 0"),
    (VAE, {"mid_block_add_attention": False}, "mid_block_add_attention is False"),
    (VAE, {"down_block_types": ...}, "down_block_types is missing"),
    (VAE, {"out_channels": 4}, "out_channels is 4, expected 3"),
    (TEXT, {"hidden_act": "relu"}, "text activation is 'relu'"),
    (TEXT, {"hidden_act": "gelu"}, "is not quite SDXL: text[0].activation is gelu, expected quick_gelu"),
    (TEXT, {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
    (TEXT, {"eos_token_id": 50000}, "text[0] has start and end tokens (49999, 50000), expected the vocabulary's last"),
    (TEXT_2, {"intermediate_size": 4096}, "intermediate_size is 4096, expected 5120"),
    (TEXT_2, {"num_hidden_layers": 24}, "is not quite SDXL: text[1].layers is 24, expected 32"),
    (TEXT_2, {"max_position_embeddings": 64}, "is not quite SDXL: text[1].context_length is 64, expected 77"),
]


@pytest.mark.parametrize(("file", "fields", "expected"), REFUSED, ids=lambda value: str(value)[:50])
def test_others_are_refused(tmp_path: Path, file: str, fields: dict[str, object], expected: str) -> None:
    assert expected in refusal(write_json(tmp_path, with_fields(file, **fields)))


@pytest.mark.parametrize("file", OFFICIAL)
def test_damaged_files_are_refused(tmp_path: Path, file: str) -> None:
    folder = write_json(tmp_path / "model", OFFICIAL)
    for content, expected in (
        (b"", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b"<!DOCTYPE html>", "is not JSON"),
    ):
        (folder / file).write_bytes(content)
        message = refusal(folder)
        assert expected in message
        assert file in message
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert ("has no model_index.json" if file == INDEX else "is not a file; expected one in") in refusal(folder)
    (folder / file).unlink()
    with (folder / file).open("wb") as opened:
        opened.truncate(LARGEST + 1)
    assert "holds no JSON object of at most" in refusal(folder)
    (folder / file).unlink()
    assert ("has no model_index.json" if file == INDEX else "No such file or directory") in refusal(folder)


NUMBERS: tuple[object, ...] = (True, False, 0, -1, 3, 10**6, 10**400, 0.5, float("nan"), float("inf"))
GARBAGE = (*NUMBERS, None, "", "x", [], [0], ["x"], [None], [10**30] * 3, [1, 2], {}, {"x": 1}, [[1, 1]] * 3)


@pytest.mark.parametrize("file", OFFICIAL)
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(file: str) -> None:
    folder, taken, refused = Path("folder"), 0, 0
    for key in OFFICIAL[file]:
        for value in GARBAGE:
            files = OFFICIAL | {file: OFFICIAL[file] | {key: value}}
            try:
                config = described_config(folder, lambda name, files=files: Fields(folder / name, files[name]))  # type: ignore[misc]
                check_values(config)
                taken += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
    print(f"{file}: {taken} taken, {refused} refused")
    assert refused


def test_a_folder_that_is_not_of_a_whole_model(tmp_path: Path) -> None:
    assert "has no model_index.json; expected a diffusers folder" in refusal(tmp_path)
    (tmp_path / "sd_xl_base_1.0.safetensors").touch()
    assert "has no model_index.json, only sd_xl_base_1.0.safetensors; expected" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL[UNET]))
    assert "is the folder of one part ('UNet2DConditionModel') and not of a whole model" in refusal(tmp_path)


@pytest.mark.parametrize("config", [TINY, SHAPES, SDXL_BASE], ids=lambda config: config.name)
def test_what_is_written_is_read_back(tmp_path: Path, config: ModelConfig) -> None:
    files = json_files(tmp_path, config)
    read = read_config(write_json(tmp_path, files))
    assert replace(read, buckets=config.buckets) == config  # a folder has no place for them
    assert files.keys() == OFFICIAL.keys()


def test_what_is_written_for_sdxl_is_what_is_published(tmp_path: Path) -> None:
    files = json_files(tmp_path, SDXL_BASE)
    different = {
        f"{file}: {key}"
        for file, fields in files.items()
        for key, value in fields.items()
        if OFFICIAL[file].get(key, value) != value
    }
    # The published numbers of special tokens are known to be wrong; its timesteps are not those of the official code.
    tokens = {f"{file}: {kind}_token_id" for file in (TEXT, TEXT_2) for kind in ("bos", "eos", "pad")}
    assert different == tokens | {f"{SCHEDULER}: timestep_spacing"}
    for file, peer in ((UNET, UNet2DConditionModel), (VAE, AutoencoderKL)):
        known = inspect.signature(peer.__init__).parameters
        assert not [key for key in files[file] if not key.startswith("_") and key not in known]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (replace(TINY, unet=replace(TINY.unet, middle_depth=1)), "unet.middle_depth is 2, expected 1"),
        (replace(TINY, unet=replace(TINY.unet, middle_depth=0)), "unet.middle_depth is 2, expected 0"),
        (
            replace(TINY, unet=replace(TINY.unet, levels=(Level(2, 0), Level(4, 2)))),
            "unet.model_channels is 16, expected 8",
        ),
        (
            replace(TINY, text=(replace(TINY.text[0], pad_token=0), TINY.text[1])),
            "text[0].pad_token is 639, expected 0",
        ),
        (replace(TINY, text=(replace(TINY.text[0], start_token=3), TINY.text[1])), "text[0].start_token is 638"),
        (replace(TINY, size=66), "size is 64, expected 66"),
        (replace(SDXL_BASE, unet=replace(SDXL_BASE.unet, norm_groups=16)), "is not quite SDXL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_diffusers_cannot_have_is_not_written(tmp_path: Path, config: ModelConfig, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        json_files(tmp_path, config)
    print(caught.value)
    assert expected in str(caught.value)


def test_the_folder_of_another_part_must_fit(tmp_path: Path) -> None:
    write_json(tmp_path, OFFICIAL)
    check_part(tmp_path, "vae", SDXL_BASE)  # the folder of a whole model
    check_part(tmp_path / "vae", "vae", SDXL_BASE)
    check_part(tmp_path / "unet", "unet", SDXL_BASE)
    check_part(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "vae", SDXL_BASE)  # a file says nothing
    write_json(tmp_path, with_fields(VAE, scaling_factor=0.18215))
    with pytest.raises(CheckpointError, match=r"vae/config.json does not fit sdxl-base: vae.scale_factor is 0.18215, "):
        check_part(tmp_path / "vae", "vae", SDXL_BASE)
    with pytest.raises(CheckpointError, match=r"unet/config.json does not fit tiny: text encoders give 40 context"):
        check_part(tmp_path / "unet", "unet", TINY)
    write_json(tmp_path, with_fields(UNET, in_channels=9))
    check_part(tmp_path / "unet", "unet", SDXL_INPAINTING)
    with pytest.raises(CheckpointError, match=r"does not fit sdxl-base: unet.in_channels is 9, expected 4"):
        check_part(tmp_path / "unet", "unet", SDXL_BASE)
    write_json(tmp_path, with_fields(UNET, in_channels=8))
    with pytest.raises(
        CheckpointError, match=r"does not fit sdxl-base: the VAE has 4 latent channels, the U-Net takes 8"
    ):
        check_part(tmp_path / "unet", "unet", SDXL_BASE)


def test_weights_of_a_folder_are_needed(tmp_path: Path) -> None:
    write_json(tmp_path, OFFICIAL)
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"unet has no diffusion_pytorch_model.safetensors, only .*\.bin; expected"
    ):
        read_model(tmp_path)
