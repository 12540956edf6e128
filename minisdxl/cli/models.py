"""The options that name a model, and the model that they name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from minisdxl.checkpoint.embeddings import EmbeddingFile, read_embeddings
from minisdxl.checkpoint.layouts import PARTS
from minisdxl.checkpoint.lora import LoRA, open_loras
from minisdxl.checkpoint.modules import open_source
from minisdxl.checkpoint.resolve import Source
from minisdxl.cli.options import DTYPES, Options, add_device, add_prediction, find_device
from minisdxl.config import ModelConfig, check_refiner
from minisdxl.loading import load, weights_path
from minisdxl.pipeline import SDXL
from minisdxl.prompting.chunks import Embedding
from minisdxl.settings import REFINER_START


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`open_model` and :func:`load_model` read, but for those of a refiner."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add(
        "--weights",
        default="shapes",
        metavar="NAME|PATH",
        help="the bundled 'shapes' (default), an SDXL .safetensors file, a diffusers folder, a name of "
        "minisdxl.download, or an id on the Hugging Face hub",
    )
    add_parts(group)
    add_prediction(group)
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|DIR[:SCALE[:SCALE]]",
        help="merge this LoRA (also LyCORIS, DoRA) into the weights, the text encoders' at the second scale; may be "
        "given several times",
    )
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:NAME]",
        help="a textual inversion, used in prompts by its name (default: the file's); may be given several times",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="folder of vocab.json and merges.txt (default: 'tokenizer' in or beside the weights, else CLIP's own)",
    )
    add("--dtype", choices=DTYPES, default="fp32", help="of all weights but the VAE's (default: %(default)s)")
    add_device(group)


def add_refiner(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the refiner, which :func:`open_refiner` and :func:`load_model` read."""
    add = parser.add_argument_group("the refiner").add_argument
    add("--refiner", metavar="NAME|PATH", help="the SDXL refiner, in the forms of --weights: it does the last steps")
    add(
        "--refiner-start",
        type=float,
        metavar="SHARE",
        help=f"share of the noise schedule that the base model does before it (default: {REFINER_START})",
    )


def add_parts(parser: Options) -> None:
    """Adds the options that :func:`parts_of` reads."""
    add = parser.add_argument
    add("--vae", metavar="FILE|DIR", help="take the VAE from here, such as the fp16-fix one, in either layout")
    add("--unet", metavar="FILE|DIR", help="take the U-Net from here, such as LCM-SDXL, in either layout")
    add("--text-encoder", metavar="FILE|DIR", help="take the first text encoder from here, such as clip_l.safetensors")
    add(
        "--text-encoder-2",
        metavar="FILE|DIR",
        help="take the second text encoder from here, such as clip_g.safetensors",
    )


def parts_of(options: argparse.Namespace) -> dict[str, str | None]:
    """The files and folders of parts, as :func:`minisdxl.loading.load` and ``open_source`` take them."""
    return {part: getattr(options, part) for part in PARTS}


def open_model(options: argparse.Namespace) -> tuple[Source, Mapping[str, Embedding]]:
    """Where the model's tensors are, and its embeddings by their names; no weights are loaded.

    In ``options``, LoRAs and embeddings are replaced by what they name. Raises ``ValueError`` or ``OSError`` for files
    that are missing, damaged or not this model's.
    """
    weights = open_source(
        weights_path(options.weights), DTYPES[options.dtype], prediction=options.prediction, **parts_of(options)
    )
    options.lora = [LoRA.parse(text) for text in options.lora]
    open_loras(options.lora, weights.config, weights.shapes)
    options.embedding = [EmbeddingFile.parse(text) for text in options.embedding]
    return weights, read_embeddings(options.embedding, [lora.file for lora in options.lora], weights.config)


def open_refiner(options: argparse.Namespace, base: ModelConfig) -> Source | None:
    """Where the tensors of the refiner are, or ``None`` without one.

    Raises ``ValueError`` or ``OSError`` for files that are missing, damaged, or no refiner of ``base``.
    """
    if options.refiner is None:
        return None
    source = open_source(weights_path(options.refiner), DTYPES[options.dtype])
    check_refiner(options.refiner, source.config, base)
    return source


def load_model(options: argparse.Namespace) -> SDXL:
    """The model of options that :func:`open_model` has read. Raises as :func:`minisdxl.loading.load`."""
    return load(
        options.weights,
        device=find_device(options.device),
        dtype=DTYPES[options.dtype],
        loras=options.lora,
        embeddings=options.embedding,
        tokenizer=options.tokenizer,
        prediction=options.prediction,
        refiner=options.refiner,
        vae_encoder=options.image is not None,
        **parts_of(options),
    )
