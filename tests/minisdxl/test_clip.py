"""The layers of the text encoders against those of transformers, with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from minisdxl.clip import TextTransformer
from minisdxl.config import TextConfig

CONFIGS = {
    activation: TextConfig(64, 6, 4, activation, 640, start_token=638, end_token=639, pad_token=639)
    for activation in ("quick_gelu", "gelu")
}


def peer(config: TextConfig) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act=config.activation,
            bos_token_id=config.start_token,
            eos_token_id=config.end_token,
        )
    ).eval()


def weights(model: CLIPTextModel) -> dict[str, Tensor]:
    """Some releases of transformers put ``text_model.`` before the names."""
    return {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("activation", CONFIGS)
@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_parity_with_transformers(activation: str, spread: float, dtype: torch.dtype) -> None:
    config = CONFIGS[activation]
    torch.manual_seed(0)
    theirs = peer(config).to(dtype)
    theirs.get_input_embeddings().weight.mul_(50 * spread)
    ours = TextTransformer(config).to(dtype).eval()
    ours.load_state_dict(weights(theirs))
    ids = torch.randint(0, 638, (3, 77))
    expected = theirs(ids, output_hidden_states=True)
    hidden = ours(ids)
    bound = 8 * torch.finfo(dtype).eps
    for name, mine, other in (
        ("before the last layer", hidden, expected.hidden_states[-2]),
        ("after it", ours.finish(hidden), expected.last_hidden_state),
    ):
        error = ((mine - other).abs().max() / other.abs().max()).item()
        print(f"{activation}, {dtype}, spread {spread}, {name}: error {error:.1e}, bound {bound:.1e}")
        assert error <= bound


@torch.no_grad()
def test_tokens_see_none_that_follow() -> None:
    model = TextTransformer(CONFIGS["gelu"])
    ids = torch.randint(0, 638, (1, 20))
    changed = ids.clone()
    changed[0, 12:] = 5
    first, second = (model.finish(model(each)) for each in (ids, changed))
    assert torch.equal(first[:, :12], second[:, :12])
    assert ((first[:, 12:] - second[:, 12:]).abs().amax(dim=-1) > 1e-3).all()


def test_weights_start_as_in_transformers() -> None:
    """Spread by spread, of a config wide enough to tell them apart."""
    config = CONFIGS["gelu"]
    ours, theirs = TextTransformer(config).state_dict(), weights(peer(config))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.ndim == 2:
            assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
            assert abs(value.mean().item()) < 0.1 * value.std().item(), name
        else:
            assert torch.equal(value, theirs[name]), name
