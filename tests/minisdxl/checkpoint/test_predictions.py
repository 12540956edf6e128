"""What files say of a model's prediction: marks, metadata, configs, and ``--prediction`` against them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisdxl.checkpoint.errors import CheckpointError
from minisdxl.checkpoint.modules import CONFIG_KEY, load, open_source, read_config, save
from minisdxl.checkpoint.predictions import PLAYGROUND, SETTINGS, parse_prediction, prediction_text
from minisdxl.config import SDXL_BASE, ModelConfig, NoiseConfig
from minisdxl.convert import main as convert
from tests.minisdxl.published import OFFICIAL, write_json
from tests.minisdxl.tiny import TINY, VOCABULARY, tiny_file, tiny_modules

MEAN, STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)  # Playground 2.5's vae/config.json
NOTHING = torch.zeros(0)
V_MARKS = {"v_pred": NOTHING, "ztsnr": NOTHING}
EDM_MARKS = {"edm_mean": torch.tensor(MEAN).view(1, 4, 1, 1), "edm_std": torch.tensor(STD).view(1, 4, 1, 1)}
COSXL_MARKS = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}

PREDICTIONS = {
    "v": NoiseConfig(prediction="v"),
    "v, zero terminal SNR": NoiseConfig(prediction="v", zero_terminal_snr=True),
    "edm": NoiseConfig(prediction="edm", sigma_min=0.002, sigma_max=80.0),
    "edm-v": NoiseConfig(prediction="edm-v", sigma_min=0.002, sigma_max=120.0),
    "flow": NoiseConfig(prediction="flow", shift=3.0),
}
PLAYGROUND_VAE = replace(TINY.vae, scale_factor=0.5, latents_mean=MEAN, latents_std=STD)
CONFIGS = {name: replace(TINY, noise=noise) for name, noise in PREDICTIONS.items()}
CONFIGS["edm"] = replace(CONFIGS["edm"], vae=PLAYGROUND_VAE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of the tiny model."""
    return load_file(tiny_file(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model with each prediction, in files that we write."""
    place = tmp_path_factory.mktemp("predictions")
    paths = {name: place / f"{number}.safetensors" for number, name in enumerate(CONFIGS)}
    for name, config in CONFIGS.items():
        save(paths[name], config, tiny_modules(), torch.float32)
    return paths


@pytest.fixture
def tiny_is_official(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that says nothing is taken for the tiny model."""
    monkeypatch.setattr("minisdxl.checkpoint.modules.SDXL_BASE", TINY)


def refusal(path: Path, **options: Any) -> str:
    """The one line with which a model is refused; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path, **options)
    message = str(caught.value)
    print(message)
    assert "\n" not in message
    assert str(options.get("unet", path)) in message
    return message


FOREIGN: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str], ModelConfig]] = {
    "nothing": ({}, {}, TINY),
    "epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, TINY),
    "v_pred": ({"v_pred": NOTHING}, {}, CONFIGS["v"]),
    "v_pred and ztsnr": (V_MARKS, {}, CONFIGS["v, zero terminal SNR"]),
    "marks that are not empty": (
        {"v_pred": torch.ones(1), "ztsnr": torch.ones(2)},
        {},
        CONFIGS["v, zero terminal SNR"],
    ),
    "marks and ComfyUI's metadata": (V_MARKS, {"modelspec.predict_key": "v"}, CONFIGS["v, zero terminal SNR"]),
    "metadata": ({}, {"modelspec.prediction_type": "v"}, CONFIGS["v"]),
    "Playground": (EDM_MARKS, {}, replace(CONFIGS["edm"], defaults=PLAYGROUND)),
    "Playground, fp16": (
        {name: mark.half() for name, mark in EDM_MARKS.items()},
        {"modelspec.prediction_type": "epsilon"},
        replace(
            CONFIGS["edm"],
            defaults=PLAYGROUND,
            vae=replace(
                PLAYGROUND_VAE,
                latents_mean=(-1.657227, 1.885742, -1.382812, 2.515625),
                latents_std=(8.492188, 5.902344, 6.550781, 5.230469),
            ),
        ),
    ),
    "CosXL": (COSXL_MARKS, {}, CONFIGS["edm-v"]),
    "CosXL of ComfyUI": (COSXL_MARKS | {"v_pred": NOTHING}, {"modelspec.predict_key": "v"}, CONFIGS["edm-v"]),
    "CosXL with another range": (
        {"edm_vpred.sigma_max": torch.tensor([700.0])},
        {},
        replace(TINY, noise=NoiseConfig(prediction="edm-v", sigma_min=0.002, sigma_max=700.0)),
    ),
}


@pytest.mark.usefixtures("tiny_is_official")
@pytest.mark.parametrize("name", FOREIGN)
def test_marks_of_other_programs_are_read(tmp_path: Path, weights: dict[str, Tensor], name: str) -> None:
    marks, metadata, expected = FOREIGN[name]
    save_file({**weights, **marks}, tmp_path / "model.safetensors", dict(metadata))
    source = open_source(tmp_path / "model.safetensors")
    assert source.config == expected
    assert source.shapes.keys() == weights.keys()
    assert len(source.notes) == (name == "metadata")  # which does not say whether with zero terminal SNR
    print(*source.notes)


CONTRADICTORY: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str], str]] = {
    "ztsnr alone": ({"ztsnr": NOTHING}, {}, "is marked by ztsnr, which do not go together; expected v_pred alone or"),
    "half of Playground": ({"edm_mean": EDM_MARKS["edm_mean"]}, {}, "is marked by edm_mean, which do not go"),
    "v and Playground": (V_MARKS | EDM_MARKS, {}, "is marked by v_pred, ztsnr, edm_mean, edm_std, which do not go"),
    "Playground and CosXL": (COSXL_MARKS | EDM_MARKS, {}, "which do not go together"),
    "CosXL with zero SNR": (COSXL_MARKS | V_MARKS, {}, "which do not go together"),
    "the lowest level alone": ({"edm_vpred.sigma_min": torch.tensor(0.002)}, {}, "is marked by edm_vpred.sigma_min"),
    "epsilon and v": (
        V_MARKS,
        {"modelspec.prediction_type": "epsilon"},
        "predicts 'epsilon' in its metadata, and 'v' by",
    ),
    "v and EDM": (EDM_MARKS, {"modelspec.predict_key": "v"}, "predicts 'v' in its metadata, and 'edm' by edm_mean and"),
    "another word": ({}, {"modelspec.prediction_type": "sample"}, "has 'sample' as modelspec.prediction_type in its"),
    "two words": (
        {},
        {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"},
        "contradicts itself in its metadata",
    ),
    "a wrong count": (EDM_MARKS | {"edm_std": torch.ones(3)}, {}, "has F32 [3] as edm_std; expected 4 floating-point"),
    "no numbers": (
        EDM_MARKS | {"edm_std": torch.full((4,), math.nan)},
        {},
        "[nan, nan, nan, nan] as edm_std; expected",
    ),
    "integers": (EDM_MARKS | {"edm_std": torch.ones(4, dtype=torch.int32)}, {}, "has I32 [4] as edm_std; expected 4"),
    "a deviation of 0": (EDM_MARKS | {"edm_std": torch.zeros(4)}, {}, "has damaged marks: VAE latents_mean is"),
    "a range upside down": (
        COSXL_MARKS | {"edm_vpred.sigma_max": torch.tensor(0.001)},
        {},
        "has damaged marks: sigma_min is 0.002, sigma_max 0.001",
    ),
}


@pytest.mark.usefixtures("tiny_is_official")
@pytest.mark.parametrize("name", CONTRADICTORY)
def test_marks_that_contradict_each_other_are_refused(tmp_path: Path, weights: dict[str, Tensor], name: str) -> None:
    marks, metadata, expected = CONTRADICTORY[name]
    path = tmp_path / "model.safetensors"
    save_file({**weights, **marks}, path, dict(metadata))
    assert expected in refusal(path)
    assert open_source(path, prediction="v").config == CONFIGS["v, zero terminal SNR"]  # whatever the file says
    assert open_source(path, prediction="noise").config == TINY


def test_a_mark_that_contradicts_our_config_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    described = {CONFIG_KEY: json.dumps(CONFIGS["v"].to_dict())}
    for marks, metadata, expected in (
        (V_MARKS, {}, "predicts 'v:ztsnr=0' in its config, and 'v' by v_pred and ztsnr; expected --prediction"),
        (EDM_MARKS, {}, "predicts 'v:ztsnr=0' in its config, and 'edm' by edm_mean and edm_std"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "and 'noise' by modelspec.prediction_type"),
    ):
        save_file({**weights, **marks}, path, {**described, **metadata})
        assert expected in refusal(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_recognized(tmp_path: Path, files: dict[str, Path], name: str) -> None:
    """By us from the config, and by other programs from the marks; a folder by its scheduler and VAE."""
    config, folder, back = CONFIGS[name], tmp_path / "folder", tmp_path / "back.safetensors"
    assert read_config(files[name]) == config
    marks: dict[str, set[str]] = {
        "v": {"v_pred"},
        "v, zero terminal SNR": set(V_MARKS),
        "edm": set(EDM_MARKS),
        "edm-v": set(COSXL_MARKS),
    }
    with safe_open(files[name], "pt") as file:
        told = file.metadata().get("modelspec.prediction_type")
        beside = {
            key for key in file.offset_keys() if not key.startswith(("model.", "first_stage_model.", "conditioner."))
        }
    assert beside == marks.get(name, set())
    assert told == (None if name in ("edm", "flow") else "v")
    convert([str(files[name]), str(folder), "--tokenizer", str(VOCABULARY)])
    convert([str(folder), str(back)])
    assert read_config(folder) == config
    assert back.read_bytes() == files[name].read_bytes()

    index = json.loads((folder / "model_index.json").read_text())
    peer = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    told_of: dict[str, dict[str, Any]] = {
        "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
        "v, zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        "edm": {"prediction_type": "epsilon", "sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5},
        "edm-v": {"prediction_type": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002, "sigma_data": 1.0},
        "flow": {"shift": 3.0},
    }
    wanted = told_of[name]
    assert {key: peer.config[key] for key in wanted} == wanted
    vae = diffusers.AutoencoderKL.load_config(folder / "vae")
    assert (vae["latents_mean"], vae["latents_std"]) == ((list(MEAN), list(STD)) if name == "edm" else (None, None))


@pytest.mark.usefixtures("tiny_is_official")
def test_other_programs_marks_are_ours(tmp_path: Path, files: dict[str, Path]) -> None:
    """Without our config, the marks that we write say the same; but nothing marks a flow."""
    for name, path in files.items():
        with safe_open(path, "pt") as file:
            metadata = {key: value for key, value in file.metadata().items() if key != CONFIG_KEY}
        save_file(load_file(path), tmp_path / "bare.safetensors", metadata)
        found = read_config(tmp_path / "bare.safetensors")
        assert (found.noise, found.vae) == (
            (TINY.noise, TINY.vae) if name == "flow" else (CONFIGS[name].noise, CONFIGS[name].vae)
        )


def test_a_prediction_that_is_asked_for_is_kept_by_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_file(tmp_path / "plain.safetensors")
    single, folder, again = (tmp_path / name for name in ("a.safetensors", "b", "c"))
    convert([str(plain), str(single), "--prediction", "v"])
    assert "tiny, predicts v, one file" in capsys.readouterr().out
    convert([str(plain), str(folder), "--prediction", "flow:shift=3", "--tokenizer", str(VOCABULARY)])
    assert "tiny, predicts flow:shift=3.0, a diffusers folder" in capsys.readouterr().out
    convert([str(folder), str(again), "--prediction", "edm-v"])  # does not keep the scheduler of the other
    assert read_config(single).noise == PREDICTIONS["v, zero terminal SNR"]
    assert read_config(folder).noise == PREDICTIONS["flow"]
    assert read_config(again).noise == PREDICTIONS["edm-v"]


def test_a_unet_from_elsewhere_brings_its_prediction(
    tmp_path: Path, files: dict[str, Path], weights: dict[str, Tensor]
) -> None:
    plain = tiny_file(tmp_path / "plain.safetensors")
    folder = tmp_path / "folder"
    convert([str(files["v, zero terminal SNR"]), str(folder), "--tokenizer", str(VOCABULARY)])
    unet = {name: tensor for name, tensor in weights.items() if name.startswith("model.diffusion_model.")}
    silent, marked = tmp_path / "silent.safetensors", tmp_path / "marked.safetensors"
    save_file(unet, silent)
    save_file(unet | V_MARKS, marked)
    zero_snr = PREDICTIONS["v, zero terminal SNR"]
    for base, other, noise in (
        (plain, silent, TINY.noise),
        (plain, marked, zero_snr),
        (plain, folder, zero_snr),
        (plain, folder / "unet", TINY.noise),  # nothing in it says what it predicts: as the model beside it
        (plain, files["flow"], PREDICTIONS["flow"]),
        (files["flow"], silent, PREDICTIONS["flow"]),
        (folder, silent, zero_snr),
        (folder, plain, TINY.noise),
        (files["flow"], marked, zero_snr),
    ):
        assert open_source(base, unet=other).config == replace(TINY, noise=noise), (base, other)
    # Playground's latents go with its U-Net.
    assert open_source(plain, unet=files["edm"]).config == CONFIGS["edm"]
    assert open_source(files["edm"], unet=plain).config == TINY
    assert "predicts 'v', not of the latents of" in refusal(files["edm"], unet=marked)
    assert open_source(plain, vae=files["edm"]).config == TINY  # the VAE itself is another's or SDXL's own


def test_sdxl_folders_of_every_kind(tmp_path: Path) -> None:
    """Scheduler and VAE as NoobAI's v-prediction models, Playground 2.5 and others have them; sizes are SDXL's."""
    from minisdxl.checkpoint.folder_reader import read_config as read_folder

    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    edm = {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002, "num_train_timesteps": 1000, "rho": 7.0}
    for scheduler, vae, noise in (
        (OFFICIAL["scheduler/scheduler_config.json"] | zero_snr, {}, PREDICTIONS["v, zero terminal SNR"]),
        (
            edm | {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"},
            {"latents_mean": list(MEAN), "latents_std": list(STD), "scaling_factor": 0.5},
            PREDICTIONS["edm"],
        ),
        (
            {
                "_class_name": "EDMEulerScheduler",
                "prediction_type": "v_prediction",
                "sigma_data": 1.0,
                "sigma_max": 120.0,
            },
            {},
            PREDICTIONS["edm-v"],
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, {}, PREDICTIONS["flow"]),
    ):
        files = OFFICIAL | {"scheduler/scheduler_config.json": scheduler}
        files |= {"vae/config.json": files["vae/config.json"] | vae}
        config = read_folder(write_json(tmp_path, files))
        assert config.noise == noise
        scale = {"latents_mean": MEAN, "latents_std": STD, "scale_factor": 0.5} if vae else {}
        assert replace(config, noise=SDXL_BASE.noise) == replace(SDXL_BASE, vae=replace(SDXL_BASE.vae, **scale))  # type: ignore[arg-type]


TEXTS = {
    "noise": NoiseConfig(),
    "v": PREDICTIONS["v, zero terminal SNR"],
    "v:ztsnr=0": PREDICTIONS["v"],
    "edm": PREDICTIONS["edm"],
    "edm:sigma_max=160.0": replace(PREDICTIONS["edm"], sigma_max=160.0),
    "edm-v": PREDICTIONS["edm-v"],
    "edm-v:sigma_min=0.01,sigma_max=700.0": replace(PREDICTIONS["edm-v"], sigma_min=0.01, sigma_max=700.0),
    "flow": NoiseConfig(prediction="flow"),
    "flow:shift=3.0": PREDICTIONS["flow"],
}


def test_predictions_as_text() -> None:
    assert set(SETTINGS) == {text.partition(":")[0] for text in TEXTS}
    for text, noise in TEXTS.items():
        assert parse_prediction(text, PREDICTIONS["edm"]) == noise
        assert prediction_text(noise) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sample",
        "epsilon",
        "V",
        "v:",
        "v:ztsnr",
        "v:ztsnr=2",
        "flow:3",
        "flow:shift=nan",
        "noise:shift=1",
        "edm:shift=2",
    ],
)
def test_unknown_predictions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^prediction is '.*', expected one of noise, v, edm, edm-v, flow, if wanted"):
        parse_prediction(text, NoiseConfig())


@pytest.mark.parametrize("text", ["flow:shift=0", "edm:sigma_max=0.001"])
def test_values_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_prediction(text, NoiseConfig())


def test_weights_are_those_of_the_file(files: dict[str, Path], weights: dict[str, Tensor]) -> None:
    """Playground's mean and deviation stay beside the VAE: they change none of its weights."""
    _, modules = load(files["edm"])
    assert torch.equal(modules.vae.quant_conv.weight, weights["first_stage_model.quant_conv.weight"])
    assert torch.equal(
        modules.vae.state_dict()["post_quant_conv.bias"], weights["first_stage_model.post_quant_conv.bias"]
    )
