"""The evaluation: its captions, its rows, that stopped and sharded runs end as one that was not, and its report."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from minisdxl.pipeline import SDXL
from minisdxl.scale.store import Store
from tools.drawn.detector import check
from tools.evaluate import main
from tools.evaluation.metrics import psnr, ssim
from tools.evaluation.official_metrics import ClipScore, Fid, find_pictures, read_pixels
from tools.evaluation.rows import Row, parse_rows, read_rows

PRESET = "at-edm:rho=0.3"
QUICK = ("--steps", "2", "--size", "64x64", "--presets", PRESET, "--device", "cpu")
ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "weights" / "shapes" / "tokenizer"


@pytest.fixture(autouse=True)
def few_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.evaluation.set_metrics.REFERENCES", 10)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, load_once: Callable[..., SDXL]) -> None:
    monkeypatch.setattr("tools.evaluate.load", load_once)


def evaluate(out: Path, *arguments: str, batch: int = 1) -> None:
    main([*QUICK, "--batch", str(batch), "--out", str(out), *arguments])


def timeless(rows: list[Row]) -> list[Row]:
    return sorted((replace(row, seconds=0.0) for row in rows), key=lambda row: (row.preset, row.number))


def test_stopped_and_sharded_runs_make_the_same_rows(
    shapes: SDXL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(tmp_path / "straight", "--captions", "2")
    table = capsys.readouterr().out
    evaluate(tmp_path / "stopped", "--captions", "1")
    evaluate(tmp_path / "stopped", "--captions", "2")
    evaluate(tmp_path / "shards", "--captions", "2", "--shard", "2/2")
    assert "2 pictures are left to other shards" in capsys.readouterr().out
    evaluate(tmp_path / "shards", "--captions", "2", "--shard", "1/2")
    straight = timeless(read_rows(tmp_path / "straight" / "rows.csv"))
    stopped = timeless(read_rows(tmp_path / "stopped" / "rows.csv"))
    shards = timeless(
        [row for i in (1, 2) for row in read_rows(tmp_path / "shards" / f"rows-{i}-of-2.csv")],
    )
    assert straight == stopped == shards
    assert len(straight) == 4
    for name in ("stopped", "shards"):
        for file in (tmp_path / "straight").rglob("*/*"):
            if file.is_file():
                assert file.read_bytes() == (tmp_path / name / file.relative_to(tmp_path / "straight")).read_bytes()
    rows_are_right(shapes, straight)
    report_is_whole(tmp_path / "straight", table)


def test_the_folder_can_be_on_any_file_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{tmp_path.name}/evaluation"
    main([*QUICK, "--batch", "1", "--captions", "1", "--out", url])
    main([*QUICK, "--batch", "1", "--captions", "2", "--out", url])
    assert "captions 0 to 0" not in capsys.readouterr().out.split("1 captions.")[1]  # it goes on where it was
    evaluate(tmp_path / "local", "--captions", "2")
    there, here = Store(url), Store(str(tmp_path / "local"))
    assert there.names() == here.names() > {"rows.csv", "summary.json", "table.md", "latent-error.png"}
    for name in (name for name in here.names() if "/" in name):
        assert there.read(name) == here.read(name)
    assert timeless(parse_rows(there.read("rows.csv"), "there")) == timeless(parse_rows(here.read("rows.csv"), "here"))
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, "--batch", "2", "--captions", "2", "--out", url])
    assert stop.value.code == 2
    assert f"{url} was made with batch 1, not 2" in capsys.readouterr().err.splitlines()[-1]


def remember(latents: dict[str | None, Tensor], name: str | None, _: int, x: Tensor) -> None:
    latents[name] = x


def rows_are_right(shapes: SDXL, rows: list[Row]) -> None:
    """Made again by other means, picture by picture."""
    for row in rows:
        latents, made = dict[str | None, Tensor](), dict[str | None, Any]()
        for prune in (None, PRESET):
            settings: dict[str, Any] = {"steps": 2, "cfg": 4.0, "seed": row.seed, "size": (64, 64), "prune": prune}
            keep = partial(remember, latents, prune)
            made[prune] = np.asarray(shapes.generate([row.caption], **settings, on_step=keep)[0])
        picture = made[None if row.preset == "dense" else PRESET]
        verdict = check(picture, row.caption)
        assert (row.obeyed, row.reasons) == (verdict.right, "; ".join(verdict.reasons))
        assert row.held_out is True
        assert row.objects == len(verdict.found.objects)
        assert (row.psnr, row.ssim) == (psnr(picture, made[None]), ssim(picture, made[None]))
        if row.preset == "dense":
            assert (row.latent_error, row.flops_share) == (0, 1)
        else:
            assert row.latent_error == pytest.approx((latents[PRESET] - latents[None]).square().mean().item(), rel=1e-5)
            assert row.latent_error > 0
            assert 0.5 < row.flops_share < 1


def report_is_whole(folder: Path, table: str) -> None:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines] == ["| preset", "| ---", "| `dense`", f"| `{PRESET}`"]
    assert (folder / "table.md").read_text() in table
    report = json.loads((folder / "summary.json").read_text())
    assert (report["captions"], report["settings"]["steps"]) == (2, 2)
    assert len(report["settings"]["sha256"]) == 64
    assert [each["preset"] for each in report["presets"]] == ["dense", PRESET]
    assert report["presets"][0]["psnr"] == {"value": None, "low": None, "high": None}
    for name in ("caption-accuracy.png", "latent-error.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 5


def test_other_settings_and_bad_input_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path / "there", "--captions", "1", "--presets", "dense")
    (tmp_path / "two.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n')
    capsys.readouterr()
    for arguments, named in (
        (["--steps", "3"], "steps 2, not 3"),
        (["--cfg", "1"], "cfg 4.0, not 1.0"),
        (["--presets", "nonesuch"], "nonesuch"),
        (["--share", "0.1"], "out of reach"),
        (["--share", "2"], "share is 2.0"),
        (["--baseline", "tome"], "tome"),
        (["--captions", "0"], "--captions is 0"),
        (["--batch", "0", "--out", str(tmp_path / "new")], "batch is 0"),
        (["--shard", "3/2"], "--shard"),
        (["--size", "64x72", "--out", str(tmp_path / "new2")], "64x72"),
        (["--table", "--presets", "tome"], "no caption"),
        (["--clip", str(tmp_path)], "--prompts"),
        (["--references", str(tmp_path)], "--inception"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", str(tmp_path / "two.jsonl"), "--captions", "2"], "seed or negative"),
        (["--prompts", str(tmp_path / "two.jsonl"), "--captions", "3"], "2 prompts"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate(tmp_path / "there", "--captions", "1", *arguments)
        error = capsys.readouterr().err
        print(error, end="")
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert named in error


# FID and CLIP score, with stand-ins for the networks


class Colors(nn.Module):
    """Stands in for Inception: mean and mean square of each color of each half."""

    num_features = 12

    def forward(self, pictures: Tensor) -> Tensor:
        halves = torch.stack(pictures.double().div(255).chunk(2, dim=2), dim=1)
        return torch.cat([halves.mean(dim=(3, 4)).flatten(1), halves.square().mean(dim=(3, 4)).flatten(1)], dim=1)


def write_pictures(folder: Path, count: int, seed: int) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(count):
        colors = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colors).resize((32, 32)).save(folder / f"{index}.png")
    return find_pictures(folder)


def test_fid_is_that_of_scipy_on_the_same_features(tmp_path: Path) -> None:
    files = [write_pictures(tmp_path / name, 40, seed) for seed, name in enumerate(("reference", "made"))]
    fid = Fid(Colors(), files[0], torch.device("cpu"))
    features = []
    for group in files:
        pixels = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] for file in group]
        features.append(torch.cat([Colors()(each) for each in pixels]).numpy())
    x, y = features[1], features[0]
    first, second = np.cov(x.T), np.cov(y.T)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    for _ in range(2):  # references stay
        found = fid(map(read_pixels, files[1]))
        print(f"FID {found:.6f}, scipy {expected:.6f}")
        assert found == pytest.approx(expected, rel=1e-5)
    assert fid(map(read_pixels, files[0])) == pytest.approx(0, abs=1e-6)


def test_inceptions_file_must_hold_tensors_alone(tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "pictures", 2, 0)
    for name, content in (("code.pth", {"a": random.Random(0)}), ("list.pth", [torch.zeros(1)])):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="expected Inception's weights"):
            Fid(tmp_path / name, files, torch.device("cpu"))
    with pytest.raises(ValueError, match="0 pictures"):
        find_pictures(tmp_path)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip")


def write_clip(folder: Path) -> Path:
    """A CLIP of random weights, in a folder as transformers keeps them."""
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 640, "bos_token_id": 638, "eos_token_id": 639, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_mean_cosine(tmp_path: Path, clip: Path) -> None:
    files = write_pictures(tmp_path / "pictures", 3, 5)
    captions = ["a red circle", "a big blue square on a white background", "green"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    scores = []
    for _ in range(2):  # the score of opposite pairs is 0: once as it is, once with all texts turned round
        cosines = []
        with torch.no_grad():
            for file, caption in zip(files, captions, strict=True):
                output = model(**processor(text=[caption], images=[Image.open(file)], return_tensors="pt"))
                cosines.append(float((output.image_embeds * output.text_embeds).sum()))
            expected = max(0.0, 100 * sum(cosines) / 3)
            scores.append(ClipScore(clip, torch.device("cpu"))(map(read_pixels, files), captions))
            print(f"CLIP score {scores[-1]:.4f}, by the model's own embeddings {expected:.4f}")
            assert scores[-1] == pytest.approx(expected, abs=1e-3)
            model.text_projection.weight.neg_()
            model.save_pretrained(clip)
    assert max(scores) > 1


def test_prompts_get_fid_and_clip_score_in_the_table(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(_: Path, references: list[Path], device: torch.device) -> Fid:
        return Fid(Colors(), references, device)

    replacement: Callable[..., Fid] = stand_in
    monkeypatch.setattr("tools.evaluate.Fid", replacement)
    write_pictures(tmp_path / "references", 4, 0)
    (tmp_path / "captions.txt").write_text("a red thing\nfour blue birds\n")
    evaluate(
        tmp_path / "out", "--captions", "2", "--prompts", str(tmp_path / "captions.txt"), "--inception", "some.pth",
        "--references", str(tmp_path / "references"), "--clip", str(clip), batch=2,
    )  # fmt: skip
    head, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "| FID | CLIP |" in head
    assert "obeyed" not in head
    assert len(lines) == 2
    assert [row.obeyed for row in read_rows(tmp_path / "out" / "rows.csv")] == [None] * 4
