"""Noise levels and preconditioning of every prediction, against diffusers and against the exact denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor

from minisdxl.config import NoiseConfig
from minisdxl.preconditioning import discrete_sigmas, flow_sigmas, lowest_and_highest, preconditioner, shifted
from minisdxl.sampler import denoise
from minisdxl.samplings import own_sigmas
from tests.minisdxl.denoisers import SHAPE, gaussian_denoiser

ZERO_SNR = NoiseConfig(prediction="v", zero_terminal_snr=True)
EDM = NoiseConfig(prediction="edm", sigma_min=0.002, sigma_max=80.0)
EDM_V = NoiseConfig(prediction="edm-v", sigma_min=0.002, sigma_max=120.0)
FLOW = NoiseConfig(prediction="flow")
MODELS = {
    "noise": NoiseConfig(),
    "v": NoiseConfig(prediction="v"),
    "v, zero terminal SNR": ZERO_SNR,
    "edm": EDM,
    "edm-v": EDM_V,
    "flow": FLOW,
    "flow, shifted": replace(FLOW, shift=3.0),
}


def target(prediction: str, x: Tensor, clean: Tensor, sigma: float) -> Tensor:
    """What a U-Net predicts for a latent ``x`` that is ``clean`` plus noise, by the definitions."""
    unit = (x - clean) / sigma
    alpha = 1 / math.sqrt(1 + sigma**2)
    match prediction:
        case "noise":
            return unit
        case "v" | "edm-v":  # arXiv:2202.00512, appendix D: alpha eps - sigma_t x, of data of deviation 1
            return alpha * unit - sigma * alpha * clean
        case "flow":
            return unit - clean
        case _:  # EDM, equation 8: (x - c_skip (y + n)) / c_out, at sigma_data 0.5
            return (clean - 0.25 / (sigma**2 + 0.25) * x) * math.sqrt(sigma**2 + 0.25) / (0.5 * sigma)


@dataclass
class Network:
    """Predicts ``answer``, and remembers what it was given."""

    answer: Tensor
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, scaled: Tensor, c_noise: Tensor) -> Tensor:
        self.seen.append(scaled)
        return self.answer


@pytest.mark.parametrize("name", MODELS)
def test_every_prediction_gives_back_the_exact_denoiser(name: str) -> None:
    noise = MODELS[name]
    scales, exact = preconditioner(noise), gaussian_denoiser(0.3, 0.7)
    errors = []
    for sigma in own_sigmas(50, noise)[:-1].tolist():
        x = math.sqrt(1 + sigma**2) * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
        clean = exact(x, sigma, 0)
        network = Network(target(noise.prediction, x, clean, sigma))
        errors.append((denoise(network, x, sigma, scales) - clean).abs().max().item())
        # What the U-Net sees has data and noise together at the deviation of training, or is the flow's mixture.
        width = {"edm": sigma**2 + 0.25, "flow": (1 + sigma) ** 2}.get(noise.prediction, sigma**2 + 1)
        assert torch.allclose(network.seen[0], x / math.sqrt(width), rtol=1e-12)
    print(f"{name}: max error of D over 50 noise levels {max(errors):.1e}")
    assert max(errors) < 1e-11


def test_zero_terminal_snr_equals_its_algorithm_written_out_and_diffusers() -> None:
    alphas_bar, abar = [], 1.0
    for i in range(1000):
        root = 0.00085**0.5 + (0.0120**0.5 - 0.00085**0.5) * i / 999
        abar *= 1 - root * root
        alphas_bar.append(abar)
    first, last = math.sqrt(alphas_bar[0]), math.sqrt(alphas_bar[-1])
    roots = [(math.sqrt(value) - last) * first / (first - last) for value in alphas_bar]
    assert roots[-1] == 0
    expected = torch.tensor([math.sqrt(1 / root**2 - 1) for root in roots[:-1]], dtype=torch.float64)
    kind: Any = EulerDiscreteScheduler
    peer = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
    levels = discrete_sigmas(ZERO_SNR)
    error = (levels[:-1] / expected - 1).abs().max().item()
    theirs = (levels / peer.sigmas[:-1].flip(0).double() - 1).abs().max().item()
    print(f"zero terminal SNR: max relative error of sigma {error:.1e}, of diffusers' in fp32 {theirs:.1e}")
    assert error < 1e-11
    assert theirs < 3e-5
    assert levels[-1] == pytest.approx(4096, abs=1e-3)  # noise alone but for 1 / 4096
    assert levels[0] == discrete_sigmas(NoiseConfig())[0]


@pytest.mark.parametrize("noise", [EDM, EDM_V], ids=lambda noise: noise.prediction)
def test_edm_equals_diffusers(noise: NoiseConfig) -> None:
    kind: Any = EDMEulerScheduler
    peer = kind(
        sigma_data=0.5 if noise == EDM else 1.0,
        prediction_type="epsilon" if noise == EDM else "v_prediction",
    )
    x, predicted = (torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    errors = []
    for sigma in own_sigmas(40, noise)[:-1].tolist():
        c_skip, c_out, c_in, c_noise = preconditioner(noise)(sigma)
        level = torch.tensor(sigma, dtype=torch.float64)
        pairs = (
            (c_skip * x + c_out * predicted, peer.precondition_outputs(x, predicted, level)),
            (c_in * x, peer.precondition_inputs(x, level)),
            (torch.tensor(c_noise, dtype=torch.float64), peer.precondition_noise(level)),
        )
        errors += [(ours - theirs).abs().max().item() for ours, theirs in pairs]
    print(f"{noise.prediction}: max error of inputs, outputs and c_noise {max(errors):.1e}")
    assert max(errors) < 1e-14


def test_c_noise_is_a_timestep_or_a_number() -> None:
    for name, noise in MODELS.items():
        sigma = own_sigmas(10, noise)[3].item()
        c_noise = preconditioner(noise)(sigma).c_noise
        assert isinstance(c_noise, int) == (noise.prediction in ("noise", "v")), name
    assert preconditioner(FLOW)(1.0).c_noise == 500
    assert preconditioner(EDM)(1.0).c_noise == 0
    assert preconditioner(ZERO_SNR)(4096.0).c_noise == 999


def test_a_flow_is_measured_by_its_mixture() -> None:
    t = torch.tensor([0.001, 0.5, 0.75, 1.0], dtype=torch.float64)
    sigmas = flow_sigmas(t)
    assert sigmas.tolist() == pytest.approx([0.001 / 0.999, 1.0, 3.0, 4095.0], rel=1e-12)
    assert torch.allclose(sigmas / (1 + sigmas), t.clamp(max=1 - 2**-12), rtol=1e-12)
    assert torch.allclose(shifted(t, 3.0), t * 3 / (1 + 2 * t), rtol=1e-12)
    assert torch.equal(shifted(t, 1.0), t)
    assert lowest_and_highest(replace(FLOW, shift=3.0)).tolist() == pytest.approx([3 / 1002, 1.0])


@pytest.mark.parametrize("noise", [EDM, EDM_V, FLOW], ids=lambda noise: noise.prediction)
def test_continuous_levels_have_no_timesteps(noise: NoiseConfig) -> None:
    with pytest.raises(ValueError, match=f"prediction '{noise.prediction}' has no timesteps, expected 'noise' or 'v'"):
        discrete_sigmas(noise)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prediction": "sample"}, "prediction is 'sample', expected one of noise, v, edm, edm-v, flow"),
        ({"zero_terminal_snr": True}, "expected a model with zero terminal SNR to predict 'v'"),
        ({"prediction": "v", "zero_terminal_snr": 1}, "zero_terminal_snr is 1"),
        ({"prediction": "edm"}, "sigma_min is None, sigma_max None"),
        ({"prediction": "edm", "sigma_min": 0.0, "sigma_max": 80.0}, "expected 0 < sigma_min < sigma_max"),
        ({"prediction": "edm-v", "sigma_min": 2.0, "sigma_max": math.inf}, "sigma_max inf"),
        ({"sigma_max": 80.0}, "None with others"),
        ({"shift": 3.0}, "1 if not 'flow'"),
        ({"prediction": "flow", "shift": -1.0}, "shift is -1.0"),
        ({"prediction": "flow", "shift": "3"}, "shift is '3'"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        NoiseConfig(**values)
    print(caught.value)
    assert expected in str(caught.value)
