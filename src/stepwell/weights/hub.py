"""Finds a model: bundled with the package, a local folder, or a repository on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from stepwell.errors import ModelNotFound

BUNDLED = {f"stepwell/{name}": name for name in ("tiny-flux", "tiny-wan", "tiny-llada")}
SUFFIXES = ("json", "safetensors", "txt", "model", "jinja")
TOP_FILES = ("model_index.json", "generation_config.json")


def locate(model: str, param: str = "model_path") -> Path:
    """The local folder of a model. A hub id is downloaded to the hub's cache: only its parts, only safe files."""
    if model in BUNDLED:
        return Path(str(resources.files("stepwell.zoo") / BUNDLED[model]))
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise ModelNotFound(f"{param} = {model!r} is a file; a model is a folder in diffusers layout", param=param)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not model.startswith("~"):
        return _download(model, param)
    raise ModelNotFound(
        f"{param} = {model!r}: no such folder, and not a hub id (owner/name); bundled models: {', '.join(BUNDLED)}", param=param
    )


def _download(repo: str, param: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        try:
            index = Path(hf_hub_download(repo, "model_index.json"))
            folders = [name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)]
        except EntryNotFoundError:
            folders = [""]  # one part by itself, such as a VAE
        return Path(snapshot_download(repo, allow_patterns=list(_patterns(folders))))
    except GatedRepoError:
        reason = "the repository is gated; accept its licence on the hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no such folder here and no such repository on the hub (a private one needs HF_TOKEN)"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"no such folder here, and the hub can't be asked: {' '.join(str(error).split())[:300]}"
    raise ModelNotFound(f"{param} = {repo!r}: {reason}", param=param)


def _patterns(folders: Iterable[str]) -> Iterable[str]:
    yield from TOP_FILES
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        yield from (f"{prefix}*.{suffix}" for suffix in SUFFIXES)
