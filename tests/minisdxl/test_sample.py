"""``python -m minisdxl.sample``: what it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import minisdxl
from atedm import PRESETS
from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint.modules import open_source
from minisdxl.config import SHAPES, ModelConfig
from minisdxl.cost import count
from minisdxl.pipeline import SDXL
from minisdxl.sample import main
from minisdxl.samplings import SAMPLINGS
from minisdxl.settings import Settings
from tests.minisdxl.tiny import TINY_INPAINTING, TINY_REFINER, VOCABULARY, tiny_file

PROMPT = "a small red circle above a big blue square on a white background"
QUICK = ["--steps", "2", "--size", "64x64"]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("minisdxl.cli.models.load", load_once)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    print(err, end="")
    return err


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    """A small picture to start from, in a folder of its own, with a mask beside it."""
    path = tmp_path / "drawings" / "drawing.png"
    path.parent.mkdir()
    colors = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(colors).resize((60, 48), Image.Resampling.BICUBIC).save(path)
    mask = Image.new("1", (60, 48))
    mask.paste(1, (20, 10, 50, 40))
    mask.save(path.with_name("mask.png"))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What no options but the seed 7 make."""
    path = tmp_path_factory.mktemp("plain") / "plain.png"
    main([PROMPT, *QUICK, "--seed", "7", "--out", str(path)])
    return path


def record_of(path: str | Path) -> Any:
    """What a picture says of how it was made."""
    return json.loads(Image.open(path).text["minisdxl"])  # type: ignore[attr-defined]


def command_of(record: dict[str, Any], folder: Path) -> list[str]:
    """The arguments that make a picture again, from its record alone; ``folder`` has the files that it started from."""
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.iterdir() if path.is_file()}
    record |= {key: files[record[f"{key}_sha256"]] for key in ("image", "mask") if key in record}
    flags = [
        *("negative", "seed", "sampling", "steps", "cfg", "size", "original_size", "crop", "target_size"),
        *("image", "strength", "mask", "prune", "skip", "guide", "dtype", "device"),
    ]
    given = [f"--{key.replace('_', '-')}={record[key]}" for key in flags if record.get(key) is not None]
    return [record["prompt"], *given, *(["--compare"] if record["compare"] else [])]


@pytest.fixture
def unet_flops(shapes: SDXL) -> Iterator[list[int]]:
    """A list that gets the FLOPs of every call of the U-Net, counted where it is called."""
    found: list[int] = []

    def counted(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x, _, text, _, plan = inputs
        length = text["mid"][0].key.shape[2]
        found.append(len(x) * count(shapes.config, x.shape[2], x.shape[3], plan, length).total)

    with shapes.unet.register_forward_pre_hook(counted):
        yield found


def test_picture_is_recorded_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "picture.png"
    main([PROMPT, *QUICK, "--seed", "5", "--prune", "at-edm:rho=0.5", "--out", str(file)])
    line = capsys.readouterr().out
    assert Image.open(file).size == (64, 64)
    record = record_of(file)
    assert (record["prompt"], record["seed"], record["steps"]) == (PROMPT, 5, 2)
    assert (record["prune"], record["size"], record["weights"]) == ("at-edm:rho=0.5", "64x64", "shapes.safetensors")
    assert len(record["sha256"]) == 64
    assert str(file) in line
    assert "seed 5" in line
    assert "% of dense FLOPs" in line


@pytest.mark.parametrize(
    "options",
    [
        ["--negative", 'blue, "green"', "--original-size", "300x200", "--crop", "9,5", "--cfg", "3.3"],
        ["--sampling", "lcm", "--target-size", "32x96", "--dtype", "bf16", "--prune", "at-edm:rho=0.5"],
        ["--sampling", "heun", "--steps", "3", "--image", "drawing.png", "--strength", "0.7", "--compare"],
        ["--image", "drawing.png", "--mask", "mask.png", "--size", "80x64", "--steps", "3"],
    ],
    ids=" ".join,
)
def test_picture_is_made_again_from_its_record_alone(
    tmp_path: Path, drawing: Path, plain: Path, options: list[str]
) -> None:
    options = [str(drawing.with_name(option)) if option.endswith(".png") else option for option in options]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    main([PROMPT, *QUICK, "--seed", "7", *options, "--out", str(first)])
    main([*command_of(record_of(first), drawing.parent), "--out", str(again)])
    assert Image.open(again).tobytes() == Image.open(first).tobytes()
    assert record_of(again) == record_of(first)
    assert Image.open(plain).tobytes() != Image.open(first).tobytes()


def lora_file(path: Path) -> Path:
    """A LoRA for the self-attention and the first text encoder of the bundled model."""
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in open_source(BUNDLED["shapes"]).shapes.items():
        if name.endswith(".attn1.to_v.weight"):
            out, width = shape
            module = name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
            tensors[f"lora_unet_{module}.lora_down.weight"] = torch.randn(2, width, generator=generator)
            tensors[f"lora_unet_{module}.lora_up.weight"] = torch.randn(out, 2, generator=generator) / width
        elif name.endswith("embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"):
            module = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
            tensors[f"{module}.lora_down.weight"] = torch.randn(2, shape[1], generator=generator)
            tensors[f"{module}.lora_up.weight"] = torch.randn(shape[0], 2, generator=generator) / shape[1]
    save_file(tensors, path)
    return path


def test_loras_are_merged_and_recorded(tmp_path: Path, plain: Path) -> None:
    file = lora_file(tmp_path / "style:1.safetensors")
    options = [PROMPT, *QUICK, "--seed", "7"]
    first, again, none = (tmp_path / f"{name}.png" for name in ("first", "again", "none"))
    main([*options, "--lora", f"{file}:0.5", "--lora", str(file), "--out", str(first)])
    recorded = record_of(first)["lora"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert recorded == [{"file": file.name, "scale": scale, "sha256": sha256} for scale in (0.5, 1.0)]
    main([*options, *(f"--lora={tmp_path / each['file']}:{each['scale']}" for each in recorded), "--out", str(again)])
    assert record_of(again) == record_of(first)
    assert Image.open(again).tobytes() == Image.open(first).tobytes() != Image.open(plain).tobytes()
    main([*options, "--lora", f"{file}:0", "--out", str(none)])
    assert Image.open(none).tobytes() == Image.open(plain).tobytes()


def test_text_encoders_of_their_own_are_read_and_recorded(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [PROMPT, *QUICK, "--seed", "7"]
    for name, prefix in (
        ("clip_l", "conditioner.embedders.0.transformer."),
        ("clip_g", "conditioner.embedders.1.model."),
    ):
        tensors = {each.removeprefix(prefix): t for each, t in load_file(BUNDLED["shapes"]).items() if prefix in each}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [f"{tmp_path}/clip_{letter}.safetensors" for letter in "lg"]
    main([*options, "--text-encoder", files[0], "--text-encoder-2", files[1], "--out", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(plain).tobytes()
    record = record_of(tmp_path / "a.png")
    assert (record["text_encoder"], record["text_encoder_2"]) == ("clip_l.safetensors", "clip_g.safetensors")
    capsys.readouterr()
    assert f"{files[1]} does not fit shapes: " in refused(capsys, *options, "--text-encoder", files[1])


def test_two_scales_are_recorded_and_reproduce(tmp_path: Path, plain: Path) -> None:
    file = lora_file(tmp_path / "style.safetensors")
    options = [PROMPT, *QUICK, "--seed", "7"]
    pictures = {scales: tmp_path / f"{scales}.png" for scales in ("1", "1:0", "0:1", "0:0")}
    for scales, picture in pictures.items():
        main([*options, "--lora", f"{file}:{scales}", "--out", str(picture)])
    pixels = [Image.open(each).tobytes() for each in (plain, *pictures.values())]
    assert pixels[0] == pixels[4] and len(set(pixels)) == 4
    (recorded,) = record_of(pictures["1:0"])["lora"]
    assert (recorded["scale"], recorded["text_scale"]) == (1.0, 0.0)
    assert "text_scale" not in record_of(pictures["1"])["lora"][0]
    again = tmp_path / "again.png"
    main([*options, f"--lora={file}:{recorded['scale']}:{recorded['text_scale']}", "--out", str(again)])
    assert Image.open(again).tobytes() == pixels[2]


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ("nowhere.safetensors:0.5", "nowhere.safetensors does not exist"),
        ("x.safetensors:abc", "scale of x.safetensors is 'abc', expected a number"),
        ("x.safetensors:inf", "scale of x.safetensors is inf, expected a finite number"),
        (f"{BUNDLED['shapes']}:1", "is a whole SDXL model; expected a LoRA"),
        ("other.safetensors", "does not fit shapes: 1 unexpected tensor (lora_unet_out_9.lora_up.weight)"),
    ],
)
def test_lora_that_cannot_be_merged_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lora: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lora_file(tmp_path / "x.safetensors")
    save_file({"lora_unet_out_9.lora_up.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    assert named in refused(capsys, PROMPT, *QUICK, "--lora", "x.safetensors", "--lora", lora)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "x.safetensors"]


def test_each_prompt_has_its_own_seed_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [PROMPT, "a big green triangle on a black background", "a small blue circle on a gray background"]
    main([*prompts, *QUICK, "--seed", "10", "--batch", "2", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["seed 10", "seed 11", "seed 12"]
    records = [record_of(line.split("  ")[0]) for line in lines]
    assert [record["prompt"] for record in records] == prompts
    assert [record["seed"] for record in records] == [10, 11, 12]


def test_pictures_of_a_prompt_follow_one_another(tmp_path: Path) -> None:
    prompts = [PROMPT, "a big green triangle on a black background"]
    options = [*QUICK, "--seed", "3", "--json", str(tmp_path / "run.json")]
    main([*prompts, *options, "--images-per-prompt", "2", "--batch", "3", "--out", str(tmp_path / "many")])
    made = json.loads((tmp_path / "run.json").read_text())["pictures"]
    assert [(picture["prompt"], picture["seed"]) for picture in made] == [
        (prompts[0], 3),
        (prompts[0], 4),
        (prompts[1], 5),
        (prompts[1], 6),
    ]
    for picture in made[1:3]:
        main([picture["prompt"], *QUICK, "--seed", str(picture["seed"]), "--out", str(tmp_path / "alone.png")])
        alone, together = (
            np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "alone.png", picture["path"])
        )
        print(f"seed {picture['seed']}, alone and in a batch of 3: max error {abs(alone - together).max()} of 255")
        assert abs(alone - together).max() <= 1  # rounding differs by batch size


def test_prompts_of_a_file_keep_their_own_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "a red circle"},
        {"prompt": "a blue square", "seed": 100, "negative": "red"},
        {"prompt": "a green triangle", "seed": 102},
        {"prompt": "a green triangle", "seed": 102, "negative": ""},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = ["--prompts", str(tmp_path / "p.jsonl"), "--images-per-prompt", "2", "--batch", "4", "--negative", "gray"]
    main([PROMPT, *QUICK, "--steps", "1", *options, "--out", str(tmp_path / "out")])
    records = [record_of(line.split("  ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert [(record["prompt"], record["seed"], record["negative"]) for record in records] == [
        *[(PROMPT, seed, "gray") for seed in (0, 1)],
        *[("a red circle", seed, "gray") for seed in (2, 3)],
        *[("a blue square", seed, "red") for seed in (100, 101)],
        *[("a green triangle", seed, "gray") for seed in (102, 103)],
        *[("a green triangle", seed, "") for seed in (102, 103)],
    ]
    assert len(list((tmp_path / "out").iterdir())) == 10  # two pairs that would have the same names


def test_prompts_of_a_file_keep_their_own_sizes_and_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unet_flops: list[int]
) -> None:
    """Each picture is the one that the command makes of the same settings, and so are its record and its FLOPs."""
    (tmp_path / "p.txt").write_text(
        f"# two alike\n{PROMPT}\na circle\n{PROMPT} --n red --w 96 --h 64 --d 9 --l 1 --s 3\n"
    )
    options = [*QUICK, "--cfg", "4", "--batch", "4", "--json", str(tmp_path / "run.json")]
    main(["--prompts", str(tmp_path / "p.txt"), *options, "--out", str(tmp_path / "out")])
    assert "prompt 'red' has no effect without guidance" in capsys.readouterr().err
    made = json.loads((tmp_path / "run.json").read_text())["pictures"]
    assert sum(unet_flops) == sum(picture["flops"] for picture in made)
    assert [Image.open(picture["path"]).size for picture in made] == [(64, 64), (64, 64), (96, 64)]
    record = record_of(made[2]["path"])
    expected = {"seed": 9, "negative": "red", "steps": 3, "cfg": 1.0, "size": "96x64", "original_size": "96x64"}
    assert {key: record[key] for key in expected} == expected
    assert made[2]["size"] == record["target_size"] == "96x64"
    main([*command_of(record, tmp_path), "--out", str(tmp_path / "again.png")])
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(made[2]["path"]).tobytes()
    assert record_of(tmp_path / "again.png") == {**record, "batch": 1}


def test_a_random_seed_is_recorded_and_a_large_one_is_its_own(tmp_path: Path, plain: Path) -> None:
    paths = [tmp_path / f"{name}.png" for name in ("random", "again", "large")]
    main([PROMPT, *QUICK, "--seed", "-1", "--out", str(paths[0])])
    seed = record_of(paths[0])["seed"]
    assert seed >= 0
    main([PROMPT, *QUICK, "--seed", str(seed), "--out", str(paths[1])])
    main([PROMPT, *QUICK, "--seed", str(2**32 + 7), "--out", str(paths[2])])  # plain has seed 7
    random, again, large = (Image.open(path).tobytes() for path in paths)
    assert random == again
    assert record_of(paths[2])["seed"] == 2**32 + 7
    assert large != Image.open(plain).tobytes()


def test_long_names_and_folders_with_a_dot(tmp_path: Path) -> None:
    folder = tmp_path / "pictures.v2"
    folder.mkdir()
    wide = "\N{DESERET CAPITAL LETTER LONG I}" * 80  # a letter of four bytes
    main([wide, "", *QUICK, "--preview", "1", "--compare", "--out", str(folder)])
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 2 * (1 + 2 * 2)
    assert max(len(name.encode()) for name in names) <= 255
    assert "1-untitled-compare.png" in names


def test_hidden_colors_do_not_show(tmp_path: Path, drawing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colors = np.asarray(Image.open(drawing)).copy()
    colors[:, :30] = 255
    Image.fromarray(colors).save(tmp_path / "white.png")
    alpha = np.full((*colors.shape[:2], 1), 255, np.uint8)
    alpha[:, :30] = 0
    hidden = np.asarray(Image.open(drawing)).copy()  # its own colors under alpha 0
    Image.fromarray(np.dstack([hidden, alpha])).save(tmp_path / "hidden.png")
    for name in ("white", "hidden"):
        image = ["--image", str(tmp_path / f"{name}.png"), "--size", "80x64", "--strength", "0.5"]
        main([PROMPT, "--steps", "2", *image, "--out", str(tmp_path / "out" / f"{name}.png")])
    assert capsys.readouterr().err == "warning: the picture is transparent in places, which are taken as white\n"
    white, hidden_out = (Image.open(tmp_path / "out" / f"{name}.png").tobytes() for name in ("white", "hidden"))
    assert white == hidden_out


def test_low_memory_makes_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without text encoders in memory, and in strips."""
    encoders: list[weakref.ref[Any]] = []
    strips: list[int | None] = []
    generate = SDXL.generate

    def load(*arguments: Any, **options: Any) -> SDXL:
        sdxl = minisdxl.load(*arguments, **options)
        encoders.append(weakref.ref(sdxl.text))
        return sdxl

    def watched(self: SDXL, prompts: list[str], settings: Settings, **more: Any) -> Any:
        strips.append(settings.strip_rows)
        assert (encoders[-1]() is None) == (settings.strip_rows is not None)
        return generate(self, prompts, settings, **more)

    monkeypatch.setattr("minisdxl.cli.models.load", load)
    monkeypatch.setattr(SDXL, "generate", watched)
    rows = [{"prompt": PROMPT}, {"prompt": "a big green triangle", "negative": "red"}, {"prompt": "a black square"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = ["--prompts", str(tmp_path / "p.jsonl"), *QUICK, "--images-per-prompt", "2", "--batch", "2"]
    gc.collect()
    gc.disable()  # what leaves must need no collecting
    try:
        main([*options, "--out", str(tmp_path / "plain")])
        main([*options, "--low-memory", "--out", str(tmp_path / "low")])
    finally:
        gc.enable()
    assert strips == [None] * 3 + [8] * 3
    plain, low = (sorted((tmp_path / name).iterdir()) for name in ("plain", "low"))
    assert [path.name for path in low] == [path.name for path in plain]
    assert [record_of(path) for path in low] == [record_of(path) for path in plain]
    pairs = [[np.asarray(Image.open(path)).astype(int) for path in pair] for pair in zip(plain, low, strict=True)]
    error = max(abs(one - other).max() for one, other in pairs)
    print(f"max error of {len(pairs)} pictures: {error} of 255")
    assert error <= 1


def test_list_of_samplings(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--sampling", "list"])
    _, *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SAMPLINGS)
    assert [line.split()[1] for line in lines] == [str(each.steps) for each in SAMPLINGS.values()]
    assert "may end with -karras or -exponential" in last


def test_a_sampling_as_people_write_it_is_recorded_by_its_name(tmp_path: Path) -> None:
    main([PROMPT, *QUICK, "--sampling", "DPM++ 2M SDE Karras", "--out", str(tmp_path / "x.png")])
    assert record_of(tmp_path / "x.png")["sampling"] == "dpm++-2m-sde-karras"


def test_numbers_of_the_sampling_are_the_defaults(tmp_path: Path) -> None:
    main([PROMPT, "--sampling", "lcm", "--size", "64x64", "--out", str(tmp_path / "x.png")])
    record = record_of(tmp_path / "x.png")
    assert (record["sampling"], record["steps"], record["cfg"]) == ("lcm", SAMPLINGS["lcm"].steps, SAMPLINGS["lcm"].cfg)


@pytest.mark.parametrize(
    "arguments",
    [
        "--steps 3 --prune at-edm:tau=25",
        "--steps 2 --prune --cfg 1 --batch 2 --images-per-prompt 3",
        "--sampling heun --steps 3 --prune at-edm:tau=25 --image drawing.png --strength 0.7",
        "--steps 3 --prune at-edm:tau=25 --image drawing.png --mask mask.png",
        "--sampling turbo --prune tome",
    ],
)
def test_flops_are_those_of_the_calls(
    tmp_path: Path,
    drawing: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unet_flops: list[int],
    arguments: str,
) -> None:
    options = [PROMPT, "--size", "64x64", *arguments.split()]
    monkeypatch.chdir(drawing.parent)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = tmp_path / "run.json"
    main([*options, "--json", str(report), "--out", str(tmp_path / "pruned")])
    pruned, run = sum(unet_flops), json.loads(report.read_text())
    shown, bar = capsys.readouterr()
    unet_flops.clear()
    main([*without_pruning(options), "--json", str(report), "--out", str(tmp_path / "dense")])
    dense = sum(unet_flops)
    print(f"{arguments}: {pruned / 1e9:.2f} of {dense / 1e9:.2f} GFLOPs, {pruned / dense:.1%}")
    assert run["flops"] == pruned < dense == run["dense_flops"]
    assert run["share"] == pruned / dense
    assert f"{pruned / dense:.1%} of dense FLOPs" in shown
    steps = run["settings"]["steps"]
    left = steps if "strength" not in run["settings"] else int(steps * run["settings"]["strength"])
    assert f" {left}/{left} " in bar
    assert "FLOPs/step" in bar


def without_pruning(options: list[str]) -> list[str]:
    """Command-line options without ``--prune`` and its preset."""
    where = options.index("--prune")
    has_preset = len(options) > where + 1 and not options[where + 1].startswith("-")
    return options[:where] + options[where + 1 + has_preset :]


def test_a_mask_keeps_the_rest_of_the_picture(
    tmp_path: Path, drawing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a mask in any of Pillow's modes, and of another size than the picture."""
    picture = Image.open(drawing).resize((120, 96))
    picture.save(tmp_path / "picture.png")
    white = Image.open(drawing.with_name("mask.png")).resize((120, 96))
    clear = Image.new("RGBA", (120, 96), "black")
    clear.putalpha(white.convert("L").point([255 - shade for shade in range(256)]))
    masks = {
        "1": white,
        "L": white.convert("L"),
        "P": white.convert("P"),
        "I;16": white.convert("I").point(lambda shade: shade * 257).convert("I;16"),
        "RGBA": clear,
    }
    for mode, mask in masks.items():
        mask.save(tmp_path / "mask.png")
        files = ["--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]
        main([PROMPT, "--steps", "1", "--size", "120x96", *files, "--out", str(tmp_path / f"{mode}.png")])
        drawn, kept = (np.asarray(Image.open(path)) for path in (tmp_path / f"{mode}.png", tmp_path / "picture.png"))
        hole = np.asarray(white)
        assert np.array_equal(drawn[~hole], kept[~hole]), mode
        assert (drawn[hole] != kept[hole]).mean() > 0.5, mode
        assert np.array_equal(drawn, np.asarray(Image.open(tmp_path / "1.png"))), mode
        record = record_of(tmp_path / f"{mode}.png")
        assert (record["mask"], record["strength"]) == ("mask.png", 1.0)
    assert "transparent in places, which are taken as white" in capsys.readouterr().err
    files = ["--image", str(tmp_path / "picture.png"), "--mask", str(drawing.with_name("mask.png"))]
    main([PROMPT, "--steps", "1", "--size", "120x96", *files, "--out", str(tmp_path / "other.png")])
    assert "mask.png of 60x48 is stretched over the picture of 120x96" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [["--skip", "easycache:threshold=0.5"], ["--skip", "deepcache:every=2", "--guide", "until"], ["--fast", "fast"]],
    ids=lambda given: "-".join(given[1:2]),
)
def test_step_plans_are_recorded_counted_and_made_again(given: list[str], tmp_path: Path) -> None:
    """From the record, and an adaptive method's plans also from the letters that were realized."""
    first, again, written = (tmp_path / f"{name}.png" for name in ("first", "again", "written"))
    size = ["--size", "64x64", "--steps", "8", "--sampling", "euler"]
    main([PROMPT, *size, *given, "--out", str(first), "--json", str(tmp_path / "report.json")])
    record = record_of(first)
    main([*command_of(dict(record), tmp_path), "--out", str(again)])
    assert Image.open(again).tobytes() == Image.open(first).tobytes()
    unet, _, guidance = record["realized"].partition(" ")
    print(record["realized"])
    assert len(unet) == 8
    if record["guide"] is None:
        tokens = [] if record["prune"] is None else ["--prune", record["prune"]]
        main([PROMPT, *size, *tokens, "--skip", f"given:{unet}", "--out", str(written)])
        assert Image.open(written).tobytes() == Image.open(first).tobytes()
    (picture,) = json.loads((tmp_path / "report.json").read_text())["pictures"]
    assert picture["whole_steps"] == unet.count("W")
    assert picture["shallow_steps"] == unet.count("S")
    assert picture["forecast_steps"] == 8 - unet.count("W") - unet.count("S")
    assert picture["single_branch_steps"] == guidance.count("C") + guidance.count("K")
    assert 0 < picture["share"] < 1


def test_dense_and_composed_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "both.png"
    main([PROMPT, *QUICK, "--steps", "4", "--skip", "deepcache:every=2", "--compare", "--out", str(path)])
    both, alone = np.asarray(Image.open(path)), tmp_path / "alone.png"
    main([PROMPT, *QUICK, "--steps", "4", "--out", str(alone)])
    assert np.array_equal(both[-64:, :64], np.asarray(Image.open(alone)))
    assert not np.array_equal(both[-64:, -64:], np.asarray(Image.open(alone)))


def test_a_refiner_is_recorded_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs are those of the calls of both U-Nets, each with its own token plans."""
    base = tiny_file(tmp_path / "base.safetensors")
    refiner = tiny_file(tmp_path / "refiner.safetensors", seed=1, config=TINY_REFINER)
    files = ["--weights", str(base), "--refiner", str(refiner), "--tokenizer", str(VOCABULARY)]
    options = [PROMPT, *files, "--size", "48x64", "--steps", "10", "--prune", "moving-grid", "--sampling", "heun"]
    found: list[int] = []
    generate = SDXL.generate

    def counted(self: SDXL, *arguments: Any, **settings: Any) -> Any:
        assert self.refiner is not None
        for model in (self, self.refiner):

            def hook(_: torch.nn.Module, inputs: tuple[Any, ...], config: ModelConfig = model.config) -> None:
                x, plan = inputs[0], inputs[4]
                found.append(len(x) * count(config, x.shape[2], x.shape[3], plan).total)

            model.unet.register_forward_pre_hook(hook)
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(SDXL, "generate", counted)
    report = tmp_path / "run.json"
    main([*options, "--json", str(report), "--out", str(tmp_path / "one.png")])
    run, record = json.loads(report.read_text()), record_of(tmp_path / "one.png")
    print(f"{run['flops']:,} FLOPs, {run['share']:.1%} of dense, in {len(found)} calls")
    assert run["flops"] == sum(found) < run["dense_flops"]
    assert len(found) == 19
    assert (record["refiner"], record["refiner_start"]) == ("refiner.safetensors", 0.8)
    assert record["refiner_sha256"] == hashlib.sha256(refiner.read_bytes()).hexdigest()
    other = ["--refiner-start", "0.5", "--out", str(tmp_path / "other.png")]
    main([*options, *other])
    assert Image.open(tmp_path / "one.png").tobytes() != Image.open(tmp_path / "other.png").tobytes()
    alone = [PROMPT, "--weights", str(refiner), "--tokenizer", str(VOCABULARY), "--size", "48x64", "--steps", "4"]
    monkeypatch.setattr(SDXL, "generate", generate)
    main([*alone, "--image", str(tmp_path / "one.png"), "--strength", "0.5", "--out", str(tmp_path / "alone.png")])
    assert Image.open(tmp_path / "alone.png").size == (48, 64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--weights", "base", "--refiner", "base"], "base.safetensors is tiny, expected a refiner"),
        (["--weights", "refiner"], "tiny-refiner finishes pictures, expected an image, or a base model beside it"),
        (["--weights", "refiner", "--refiner", "refiner"], "is refined by"),
        (["--weights", "base", "--refiner", "refiner", "--steps", "2"], "refiner_start 0.8 leaves the refiner none"),
        (["--weights", "base", "--refiner", "refiner", "--refiner-start", "1.5"], "refiner_start is 1.5, expected"),
        (["--weights", "base", "--refiner-start", "0.5"], "--refiner-start is 0.5 without --refiner"),
        (["--refiner", "refiner"], "expected (4, 4, 0.25, 640) of shapes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_refiner_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    files = {
        "base": tiny_file(tmp_path / "base.safetensors"),
        "refiner": tiny_file(tmp_path / "refiner.safetensors", config=TINY_REFINER),
    }
    given = [str(files.get(argument, argument)) for argument in arguments]
    assert named in refused(capsys, PROMPT, "--size", "64x64", *given, "--out", str(tmp_path / "out.png"))


def test_previews_lie_beside_the_pictures(tmp_path: Path) -> None:
    options = [PROMPT, "--size", "96x128", "--cfg", "4", "--sampling", "dpm++-2m", "--steps", "5", "--preview", "2"]
    main([*options, "--images-per-prompt", "2", "--batch", "2", "--out", str(tmp_path)])
    plain = sorted(path.stem for path in tmp_path.iterdir() if "-step-" not in path.name)
    previews = sorted(path.name for path in tmp_path.iterdir() if "-step-" in path.name)
    assert len(plain) == 2
    assert previews == [f"{stem}-step-{step}.png" for stem in plain for step in ("002", "004")]
    errors = {"002": 0.0, "004": 0.0}
    for stem in plain:
        for step in errors:
            small = Image.open(tmp_path / f"{stem}-step-{step}.png")
            whole = Image.open(tmp_path / f"{stem}.png").resize(small.size, Image.Resampling.BOX)
            errors[step] += np.abs(np.asarray(small).astype(float) - np.asarray(whole)).mean() / 255 / len(plain)
            assert small.size == (24, 32)
    print(f"steps 2 and 4 of 5: mean differences from the pictures {errors} in [0, 1]")
    assert errors["004"] < errors["002"]


def test_previews_of_a_comparison_are_apart(tmp_path: Path) -> None:
    main([PROMPT, *QUICK, "--compare", "--preview", "2", "--out", str(tmp_path / "x.png")])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x-dense-step-002.png",
        "x-pruned-step-002.png",
        "x.png",
    ]


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([PROMPT, "ein grünes Dreieck", *QUICK, "--seed", "8", "--json", "-", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err.count("% of dense FLOPs") == 2
    assert {"settings", "versions", "hardware", "load_seconds", "seconds", "flops", "dense_flops", "share"} < set(
        report
    )
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["tokenizers"] == tokenizers.__version__
    name, threads = report["hardware"].rsplit(", ", 1)
    assert name.split()[0] in Path("/proc/cpuinfo").read_text()  # as Linux has it
    assert threads == f"{torch.get_num_threads()} threads"
    assert [(each["prompt"], each["seed"]) for each in report["pictures"]] == [(PROMPT, 8), ("ein grünes Dreieck", 9)]
    for picture in report["pictures"]:
        record = record_of(picture["path"])
        assert record == {**{key: picture[key] for key in ("prompt", "negative", "seed")}, **report["settings"]}
        assert 0 < picture["seconds"] < report["seconds"]
        assert picture["flops"] == picture["dense_flops"] == report["flops"] // 2


def test_no_report_of_half_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = SDXL.generate

    def generate_once(self: SDXL, prompts: list[str], settings: Settings, **more: Any) -> Any:
        if settings.seed > 0:
            raise KeyboardInterrupt
        return generate(self, prompts, settings, **more)

    monkeypatch.setattr(SDXL, "generate", generate_once)
    with pytest.raises(SystemExit) as stop:
        main([PROMPT, PROMPT, *QUICK, "--json", str(tmp_path / "run.json"), "--out", str(tmp_path)])
    assert stop.value.code == 130
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_picture_is_turned_upright_and_any_kind_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 32, 3), dtype=np.uint8))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
    upright.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    upright.quantize(256).save(tmp_path / "palette.gif")
    for name in ("upright.png", "lying.png", "palette.gif"):
        options = ["--image", str(tmp_path / name), "--size", "32x48", "--steps", "2", "--strength", "0.5"]
        main([PROMPT, *options, "--out", str(tmp_path / "out" / f"{name}.png")])
    assert capsys.readouterr().err == ""  # no warning of a change of shape
    made = [Image.open(tmp_path / "out" / f"{name}.png").tobytes() for name in ("upright.png", "lying.png")]
    assert made[0] == made[1]
    main([PROMPT, *options, "--size", "32x32", "--out", str(tmp_path / "x.png")])
    assert re.search(r"palette\.gif of 32x48 is stretched to 32x32", capsys.readouterr().err)


def test_compare_puts_dense_and_pruned_side_by_side(tmp_path: Path) -> None:
    main([PROMPT, *QUICK, "--compare", "--out", str(tmp_path / "both.png")])
    main([PROMPT, *QUICK, "--out", str(tmp_path / "dense.png")])
    main([PROMPT, *QUICK, "--prune", "--out", str(tmp_path / "pruned.png")])
    both = Image.open(tmp_path / "both.png")
    label = both.height - 64
    for column, name in enumerate(("dense", "pruned")):
        half = both.crop((64 * column, label, 64 * (column + 1), label + 64))
        assert half.tobytes() == Image.open(tmp_path / f"{name}.png").tobytes()


def test_list_names_every_preset_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--prune", "list"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert all(line.count("%") == 2 for line in lines[1:])


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_makes_a_picture(preset: str, tmp_path: Path) -> None:
    main([PROMPT, *QUICK, "--steps", "1", "--prune", preset, "--out", str(tmp_path / "x.png")])
    assert record_of(tmp_path / "x.png")["prune"] == preset


def test_budget_sets_the_ratio_for_the_steps_of_the_sampling_and_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--sampling", "turbo", "--prune", "at-edm:tau=10", "--budget", "90%", "--size", "128x128"]
    main([PROMPT, *budget, "--out", str(tmp_path / "x.png")])
    assert record_of(tmp_path / "x.png")["prune"].startswith("at-edm:tau=10,rho=0.")
    out, err = capsys.readouterr()
    assert "average of 1 steps is within 90%" in err
    assert 89 <= float(out.rsplit("  ", 1)[1].split("%")[0]) <= 90


def test_long_prompts_are_read_to_their_end_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unet_flops: list[int]
) -> None:
    full = " ".join(["circle"] * 75)
    prompts = [PROMPT, f"{full} triangle", f"{full} square", full, "a [small] circle BREAK a (square:1.2)"]
    main([*prompts, *QUICK, "--batch", "3", "--json", "-", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    pictures = json.loads(out)["pictures"]
    assert "warning" not in err and sum(unet_flops) == sum(picture["flops"] for picture in pictures)
    assert [picture["flops"] > pictures[0]["flops"] for picture in pictures] == [False, True, True, False, True]
    triangle, square = (Image.open(picture["path"]).tobytes() for picture in pictures[1:3])
    assert triangle != square


def test_prompts_of_other_lengths_in_a_batch_change_no_picture(tmp_path: Path) -> None:
    for name, prompts in {"alone": [PROMPT], "batch": [PROMPT, "a BREAK b"]}.items():
        main([*prompts, *QUICK, "--batch", "2", "--negative", "x BREAK y BREAK z", "--out", str(tmp_path / name)])
    (alone,) = (tmp_path / "alone").iterdir()
    assert Image.open(tmp_path / "batch" / alone.name).tobytes() == Image.open(alone).tobytes()


def test_embeddings_are_loaded_and_recorded(tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(3, config.width, generator=generator) for config in SHAPES.text]
    file, lora = tmp_path / "gloop.safetensors", lora_file(tmp_path / "lora.safetensors")
    save_file(dict(zip(("clip_l", "clip_g"), vectors, strict=True)), file)
    bundle = {f"bundle_emb.floop.{end}": vector for end, vector in zip(("clip_l", "clip_g"), vectors, strict=True)}
    save_file({**load_file(lora), **bundle}, lora)
    alone, options = tmp_path / "alone.png", [*QUICK, "--seed", "7", "--low-memory"]
    main([f"{PROMPT}, gloop", *options, "--embedding", str(file), "--out", str(alone)])
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record_of(alone)["embedding"] == [{"file": file.name, "name": None, "sha256": sha256}]
    for word, given in {"x": ["--embedding", f"{file}:x"], "floop": ["--lora", f"{lora}:0"]}.items():
        prompt = f"{PROMPT}, embedding:{word}"
        main([prompt, *options, *given, "--out", str(tmp_path / f"{word}.png")])
        assert Image.open(tmp_path / f"{word}.png").tobytes() == Image.open(alone).tobytes()
    assert "warning" not in capsys.readouterr().err
    main([f"{PROMPT}, embedding:gloop", *options, "--out", str(tmp_path / "without.png")])
    assert "no effect and is drawn as words: embedding:gloop" in capsys.readouterr().err
    assert Image.open(tmp_path / "without.png").tobytes() != Image.open(alone).tobytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        # what the parser reads
        (["--size", "64"], "'64'"),
        (["--crop", "5"], "'5', expected LEFT,TOP"),
        (["--steps", "ten"], "ten"),
        (["--dtype", "int3"], "int3"),
        # settings, alone and together
        (["--size", "100x64"], "width is 100 pixels"),
        (["--seed", "-2"], "seed is -2, expected 0 to 18446744073709551615"),
        (["--batch", "0"], "--batch is 0"),
        (["a (clock:12)"], "prompt weight of 'clock' is 12, expected -10 to 10"),
        (["--negative", "(x:-99)"], "prompt weight of 'x' is -99"),
        (["--embedding", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--embedding", "page.png:x"], "page.png"),
        (["--sampling", "lcm", "--steps", "51"], "steps is 51"),
        (["--strength", "0.5"], "--strength is 0.5 without --image"),
        (["--image", "drawings/drawing.png", "--strength", "0.1"], "strength 0.1 leaves none of 2 steps"),
        (["--mask", "drawings/mask.png"], "there is a mask without an image, expected both"),
        (["--image", "drawings/drawing.png", "--size", "80x64", "--mask", "black.png"], "the mask has no white"),
        (["--image", "drawings/drawing.png", "--size", "80x64", "--mask", "nowhere.png"], "nowhere.png is no file"),
        (["--weights", "inpainting.safetensors"], "tiny-inpainting is an inpainting model, expected an image and a"),
        (["another prompt", "--out", "one.png"], "one.png"),
        # presets and budgets
        (["--prune", "at-edm:color=red"], "color"),
        (["--budget", "90%"], "--prune"),
        (["--prune", "--budget", "10%"], "out of reach"),
        (["--prune", "at-edm:rho=0.5", "--budget", "90%"], "twice"),
        # files
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--image", "nowhere.png"], "nowhere.png is no file, expected a picture"),
        (["--image", "page.png"], "page.png cannot be read as a picture, expected"),
        (["--image", "half.png"], "half.png cannot be read as a picture"),
        (["--prompts", "nowhere.txt"], "nowhere.txt is no file, expected one of prompts"),
        (["--prompts", "large.txt"], "large.txt, line 2: picture width is 100 pixels, expected a multiple of 8"),
        (["--out", "picture.jpeg"], "picture.jpeg"),
        (["--json", "drawings"], "drawings is a folder"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    drawing: Path,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "half.png").write_bytes(drawing.read_bytes()[:200])
    Image.new("L", (60, 48)).save(tmp_path / "black.png")
    if "inpainting.safetensors" in arguments:
        tiny_file(tmp_path / "inpainting.safetensors", config=TINY_INPAINTING)
    (tmp_path / "large.txt").write_text("a red circle\na blue square --w 100")
    there = sorted(tmp_path.rglob("*.*"))
    assert named in refused(capsys, PROMPT, *QUICK, *arguments)
    assert sorted(tmp_path.rglob("*.*")) == there


def test_clips_vocabulary_is_refused_for_a_model_that_has_another(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tiny_file(tmp_path / "model.safetensors")
    said = refused(capsys, PROMPT, *QUICK, "--weights", str(file), "--out", str(tmp_path / "x.png"))
    assert "(49408, 49406, 49407), the text encoder takes (640, 638, 639)" in said
    assert "--tokenizer" in said and "a folder tokenizer beside the weights" in said
    assert list(tmp_path.iterdir()) == [file]


def test_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "mps" in refused(capsys, PROMPT, *QUICK, "--device", "mps", "--out", str(tmp_path))


def test_output_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, PROMPT, *QUICK, "--out", str(tmp_path / "file" / "x.png"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_to_full_disk(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half a picture")
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 100_000)

    monkeypatch.setattr(Image.Image, "save", save_to_full_disk)
    assert "No space left" in refused(capsys, PROMPT, *QUICK, "--out", str(tmp_path / "x.png"))
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_no_partial_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_until_interrupted(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save_until_interrupted)
    with pytest.raises(SystemExit) as stop:
        main([PROMPT, *QUICK, "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted: no partial picture was left\n"
    assert not list(tmp_path.iterdir())


def test_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minisdxl.sample", PROMPT, *QUICK, "--prune", "--out", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == "note: --prune is moving-grid, the best preset on shapes\n"  # no progress bar: no terminal
    assert Image.open(tmp_path / "x.png").size == (64, 64)
