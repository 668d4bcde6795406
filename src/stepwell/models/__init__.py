"""The table of model families: which module knows which pipeline. Families are imported only when asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell.errors import Unsupported
from stepwell.weights.repository import Repository, read_json

if TYPE_CHECKING:
    from stepwell.models.spec import ModelSpec

# pipeline class in model_index.json -> module
FAMILIES = {
    "FluxPipeline": "stepwell.models.flux",
    "WanPipeline": "stepwell.models.wan",
    "WanImageToVideoPipeline": "stepwell.models.wan",
    "WanDMDPipeline": "stepwell.models.wan",
    "HunyuanVideoPipeline": "stepwell.models.hunyuan_video",
    "HunyuanVideoImageToVideoPipeline": "stepwell.models.hunyuan_video",
}

# architecture in the config.json of a text model, which is in transformers layout -> module
TEXT_FAMILIES = {
    "LLaDA2MoeModelLM": "stepwell.models.llada2",
    "SDARForCausalLM": "stepwell.models.sdar",
    "SDARMoeForCausalLM": "stepwell.models.sdar",
}


def text_architecture(folder: Path) -> str | None:
    """The architecture of a folder that holds a text model in transformers layout, None for any other."""
    if (folder / "model_index.json").is_file() or not (folder / "config.json").is_file():
        return None
    names = read_json(folder / "config.json").get("architectures")
    known = [name for name in names if name in TEXT_FAMILIES] if isinstance(names, list) else []
    return known[0] if known else None


def text_hub_ids() -> tuple[tuple[str, str], ...]:
    """(id on the hub, family) of every text model that is known by name."""
    modules = dict.fromkeys(TEXT_FAMILIES.values())
    return tuple((hub_id, name.rpartition(".")[2]) for name in modules for hub_id in import_module(name).HUB_IDS)


def specs() -> tuple[ModelSpec, ...]:
    """Every spec of every family."""
    return tuple(spec for module in dict.fromkeys(FAMILIES.values()) for spec in import_module(module).SPECS)


def find_spec(repository: Repository) -> ModelSpec:
    """The spec a repository's own files match; of several, the one it is named like on the hub, else the first."""
    name = repository.index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise Unsupported(f"{repository.id!r} is a {name}; this version runs {', '.join(FAMILIES)}", param="model_path")
    fitting: list[ModelSpec] = [
        spec for spec in import_module(FAMILIES[name]).SPECS if spec.matches(repository.index, repository.denoiser_config)
    ]
    called = Path(repository.id).name.lower()
    for spec in fitting:
        if any(hub_id.lower().endswith(f"/{called}") for hub_id in spec.hub_ids):
            return spec
    if fitting:
        return fitting[0]
    raise Unsupported(f"{repository.id!r} is a {name} of a kind this version does not know", param="model_path")
