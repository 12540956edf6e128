"""The program without the folder ``fast``: delete it, its import and its decorators, and the output is the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from atedm import PRESETS
from minisdxl.fast import CHOICES, winograd

ROOT = Path(__file__).parents[3]

# A U-Net that is wide enough for Winograd's algorithm. Attention is sharper than in random weights, as in trained ones.
# At this seed no two tokens are so nearly equal that rounding decides which one stays; either would be right.
CALLS = """
import json, sys
import torch
from atedm import DENSE, PRESETS, parse_preset
from minisdxl.config import Level, UNetConfig
from minisdxl.unet import UNet

config = UNetConfig(64, (Level(1, 0), Level(4, 2), Level(4, 2)), 2, 1, 64, 32, 16)
torch.manual_seed(0)
unet = UNet(config).eval().requires_grad_(False)
for name, weight in unet.named_parameters():
    if name.endswith(("to_q.weight", "to_k.weight")):
        weight.mul_(2)
x, context, vector = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 32), torch.randn(2, 16)
plans = {name: parse_preset(name).plan(49, 50, config.attention_sites()) for name in PRESETS}
with torch.no_grad():
    outputs = {
        name: unet(x, torch.tensor([801, 13]), context, vector, plan)
        for name, plan in {"dense": DENSE, **plans}.items()
    }
torch.save(outputs, "outputs.pt")
print(json.dumps([name for name in sys.modules if name.startswith("minisdxl.fast")]))
"""


def run(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The outputs of the packages in ``folder``, and which modules of ``fast`` they imported."""
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs.pt"), json.loads(done.stdout)


def copy_packages(folder: Path) -> Path:
    for package in ("atedm", "minisdxl"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_without_it_the_output_is_the_same(tmp_path: Path) -> None:
    fast, plain = copy_packages(tmp_path / "fast"), copy_packages(tmp_path / "plain")
    shutil.rmtree(plain / "minisdxl" / "fast")
    operators = plain / "minisdxl" / "operators.py"
    text = operators.read_text()
    assert text.count("from minisdxl.fast import faster\n") == 1
    assert text.count("@faster\n") == len(CHOICES) == 4
    operators.write_text(text.replace("from minisdxl.fast import faster\n", "").replace("@faster\n", ""))

    (ours, modules), (theirs, none) = run(fast), run(plain)
    assert "minisdxl.fast.winograd" in modules
    assert none == []
    assert winograd.pays(torch.empty(2, 256, 16, 16), torch.empty(256, 256, 3, 3))  # of the second level above
    assert list(ours) == list(theirs) == ["dense", *PRESETS]
    errors = {name: ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in ours}
    print("max error / max, fast and plain: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < 2e-5  # fp32 through all layers; measured 4e-6
    assert all(not torch.equal(ours["dense"], output) for name, output in ours.items() if name != "dense")


def test_only_operators_imports_it() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for package in ("atedm", "minisdxl")
        for path in sorted((ROOT / package).rglob("*.py"))
        if "minisdxl.fast" in path.read_text() and path.parent.name != "fast"
    ]
    assert users == ["minisdxl/operators.py"]
