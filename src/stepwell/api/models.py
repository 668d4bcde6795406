"""What is served: `GET /models` in the shape of SGLang Diffusion, `GET /v1/models` in OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stepwell.api.body import Models
from stepwell.errors import InvalidRequest
from stepwell.types import ModelInfo


def check_names(names: Sequence[str], paths: Sequence[str]) -> None:
    """Refuse names to serve models under that are too many, or another one's path."""
    blank = next((name for name in names if name != name.strip() or not name), None)
    if blank is not None:
        raise InvalidRequest(
            f"served_model_name = {blank!r}: must be a name, without blanks around it", param="served_model_name"
        )
    if len(names) > len(paths) or set(names) & set(paths[len(names) :]):
        raise InvalidRequest(
            f"served_model_name = {list(names)}: one for each of {len(paths)} models at most, and no other's path",
            param="served_model_name",
        )


def named(models: Sequence[ModelInfo], names: Sequence[str]) -> Models:
    """Models by the names under which they are served: those given, in the same order, else their own."""
    return {(names[place : place + 1] or (model.id,))[0]: model for place, model in enumerate(models)}


def describe(models: Models) -> dict[str, Any]:
    """The body of `GET /models`: the first model, then all of them."""
    every = [_described(model) for model in models.values()]
    return {**every[0], "models": every}


def _described(model: ModelInfo) -> dict[str, Any]:
    return {
        "model_path": model.id,
        "task_type": model.tasks[0].value,
        "pipeline_name": f"{model.family}_pipeline",
        "pipeline_class": model.pipeline_class,
        "num_gpus": model.num_gpus,
        "dit_precision": model.dit_precision,
        "vae_precision": model.vae_precision,
    }


def card(model: ModelInfo, served_name: str, created: int) -> dict[str, Any]:
    """One entry of `GET /v1/models`: OpenAI's fields, then what the model does by default and at most."""
    return {
        "id": served_name,
        "object": "model",
        "created": created,
        "owned_by": "stepwell",
        "root": model.id,
        "parent": None,
        **{key: value for key, value in _described(model).items() if key != "model_path"},
        "supported_task_types": [task.value for task in model.tasks],
        "defaults": {name: value for name, value in asdict(model.defaults).items() if value is not None},
        "limits": asdict(model.limits),
        "text": None if model.text is None else asdict(model.text),
    }


def listing(models: Models, created: int) -> dict[str, Any]:
    """The body of `GET /v1/models`."""
    return {"object": "list", "data": [card(model, name, created) for name, model in models.items()]}
