"""Finds weights by the names of ``minisdxl.download`` and by Hugging Face hub ids, instead of paths.

Nothing is downloaded here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from minisdxl.bundled import WEIGHTS
from minisdxl.checkpoint.errors import CheckpointError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What ends a path to a file, and no id of the hub.
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".msgpack", ".json")


def find_weights(name: str | Path) -> Path:
    """The file or folder of a path, of a name of ``minisdxl.download``, or of a hub id.

    A path that exists comes first. The file of a name of ``minisdxl.download`` may lie in the current folder, where
    that command puts it, or in the hub's cache; the folder of an id of the hub, ``owner/name``, in that cache.

    Raises:
        CheckpointError: if a name's files are not on this machine; says how to get them. Whatever is no name is a path.
    """
    path, text = Path(name), Path(name).as_posix()
    if path.exists():
        return path
    if (published := _downloads().get(text)) is not None:
        return _published_file(text, published)
    return _snapshot(text) if is_hub_id(text) else path


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id and cannot be meant as a path."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(SUFFIXES) and not Path(name).parent.is_dir()


def _downloads() -> dict[str, dict[str, Any]]:
    """What ``minisdxl.download`` knows, where it is weights: the first file of each name."""
    table = json.loads((WEIGHTS / "downloads.json").read_text(encoding="utf-8"))
    first = {name: entry["files"][0] for name, entry in table.items()}
    return {name: file for name, file in first.items() if file["file"].endswith(".safetensors")}


def _published_file(name: str, file: dict[str, Any]) -> Path:
    from huggingface_hub import try_to_load_from_cache  # not above: it takes longer to import than all else here

    here = Path(file["save_as"])
    if here.is_file():
        return here
    cached = try_to_load_from_cache(file["repo"], file["file"])
    if isinstance(cached, str):
        return Path(cached)
    raise CheckpointError(
        f"{name} is not on this machine, neither as {here} in this folder nor in the hub's cache; "
        f"python -m minisdxl.download {name} gets it ({file['bytes'] / 1e9:.1f} GB)"
    )


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download  # as above
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        folder = None
    if folder is None or next(folder.rglob("*.safetensors"), None) is None:
        raise CheckpointError(
            f"{name} does not exist, and the hub's cache on this machine has no weights of that name; "
            f"hf download {name} gets them, if it is a name on the hub"
        )
    return folder
