"""``minisdxl.load``: a model from a name, a checkpoint file or a diffusers folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from minisdxl.bundled import BUNDLED
from minisdxl.checkpoint import modules
from minisdxl.checkpoint.embeddings import EmbeddingFile, read_embeddings
from minisdxl.checkpoint.lora import LoRA
from minisdxl.checkpoint.published import find_weights
from minisdxl.config import check_refiner
from minisdxl.pipeline import SDXL
from minisdxl.prompting.encoders import PromptEncoders
from minisdxl.tokenizer import Tokenizer, load_vocabulary


def load(
    weights: str | Path = "shapes",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    loras: Sequence[str | Path | LoRA] = (),
    embeddings: Sequence[str | Path | EmbeddingFile] = (),
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
    refiner: str | Path | None = None,
    vae_encoder: bool = True,
) -> SDXL:
    """Loads a model.

    On the CPU, large weights that the file holds in the wanted dtype are memory-mapped, not copied. The file may be
    replaced or deleted while the model is in use, but must not be written into (``TensorFile.map``).

    Args:
        weights: ``"shapes"`` for the bundled model, a single-file checkpoint in the official layout, or a diffusers
            folder. Here and below, a name of ``minisdxl.download`` or an id of the hub stands for its copy on this
            machine.
        device: where the model runs.
        dtype: of U-Net and text encoders. The VAE stays in fp32, because the official one overflows in fp16; convert it
            by ``sdxl.vae.to(dtype)``.
        vae: a file or folder with another VAE, in the official or the diffusers layout.
        unet: the same for the U-Net; LCM-SDXL and SDXL-Lightning are published so.
        text_encoder: the same for the first text encoder (CLIP-L), under the names of transformers or of OpenCLIP.
        text_encoder_2: the same for the second one (CLIP-G). With all other parts given, ``weights`` may be one part.
        loras: files of LoRAs, in the format of kohya's scripts, LyCORIS or diffusers, or diffusers' folders. They are
            merged into U-Net and text encoders: ``"FILE"``, ``"FILE:SCALE"``, ``"FILE:SCALE:SCALE"`` with a scale of
            its own for the text encoders, or a :class:`minisdxl.checkpoint.lora.LoRA`.
        embeddings: files of textual inversions, ``"FILE"`` or ``"FILE:NAME"``. Prompts use one by its name, or by
            ``embedding:NAME``. Those that a LoRA's file bundles are loaded with it.
        tokenizer: folder with the model's ``vocab.json`` and ``merges.txt``. ``None`` takes the folder ``tokenizer`` in
            or beside the weights, or else CLIP's own vocabulary.
        prediction: what the U-Net predicts, where its files do not say it or say something else: ``"noise"``, ``"v"``,
            ``"edm"``, ``"edm-v"`` or ``"flow"``, with settings as in ``"v:ztsnr=0"`` or ``"flow:shift=3"``.
        refiner: the SDXL refiner, in the forms of ``weights``; it does the last steps, and reads the same prompts with
            a text encoder of its own.
        vae_encoder: ``False`` leaves out the VAE's encoder, which pictures from text do not need: 0.13 GiB of SDXL's.

    Raises:
        CheckpointError: if a file is damaged, or is not an SDXL model, or a LoRA or embedding for one. The message
            says what it is.
        ValueError: if the prediction is unknown, the scale of a LoRA is not a finite number, a prompt cannot hold the
            name of an embedding or two have it, a vocabulary is not the model's, or ``refiner`` is none of it.
        FileNotFoundError: if a file is missing.
    """
    path = weights_path(weights)
    merged = [lora if isinstance(lora, LoRA) else LoRA.parse(str(lora)) for lora in loras]
    with _no_garbage_collection():
        vocabulary = load_vocabulary(path, tokenizer)
        config, parts = modules.load(
            path,
            device,
            dtype,
            vae=vae,
            unet=unet,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            loras=merged,
            prediction=prediction,
            vae_encoder=vae_encoder,
        )
        known = read_embeddings(embeddings, [lora.file for lora in merged], config)
        text, tokens = PromptEncoders(parts.text, known), Tokenizer(*vocabulary, config.text)
        second = None
        if refiner is not None:
            check_refiner(refiner, modules.read_config(weights_path(refiner)), config)
            theirs, refining = modules.load(weights_path(refiner), device, dtype, vae_encoder=False)  # ours
            encoder = PromptEncoders(refining.text, known)
            second = SDXL(theirs, refining.unet, parts.vae, encoder, Tokenizer(*vocabulary, theirs.text))
        return SDXL(config, parts.unet, parts.vae, text, tokens, refiner=second)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns the collector off: loading makes hundreds of thousands of objects and frees hardly any."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def weights_path(weights: str | Path) -> Path:
    """The path of a bundled model's name, of a published one's, or of a path.

    Raises ``CheckpointError`` as :func:`minisdxl.checkpoint.published.find_weights`.
    """
    return BUNDLED.get(str(weights)) or find_weights(weights)
