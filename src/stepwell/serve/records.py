"""What the store keeps of a request for a video, and the request again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec

from stepwell.api.body import Models
from stepwell.errors import ModelNotFound
from stepwell.media.storage import new_key
from stepwell.serve.jobs import Job
from stepwell.types import Frames, ModelInfo, Request, SamplingParams, replace

VARIANTS = {"video": "mp4", "thumbnail": "webp", "spritesheet": "jpg"}  # and the suffixes of their files


def to_record(request: Request, model: str, image_key: str | None, body_hash: str) -> dict[str, Any]:
    """What the store keeps of a complete request, and the name of the model it was made to."""
    return {
        "model": model,
        "prompt": request.prompt,
        "task": request.task,
        "sampling": asdict(request.sampling),
        "image_key": image_key,
        "keys": {name: new_key("video", suffix) for name, suffix in VARIANTS.items()},  # of the files to come
        "body_hash": body_hash,
    }


def to_request(job: Job, models: Models, image: Frames | None = None) -> Request:
    """A stored job's request again; its id is the job's. Raises ModelNotFound if its model is gone."""
    model = model_of(job, models)
    plain = {"prompt": job.request["prompt"], "task": job.request["task"], "sampling": job.request["sampling"], "id": job.id}
    return replace(msgspec.convert(plain, Request), image=image, model=model.id)


def model_of(job: Job, models: Models) -> ModelInfo:
    """The model a job was asked of. Raises ModelNotFound."""
    name = job.request["model"]
    if name not in models:
        raise ModelNotFound(f"the job was asked of {name!r}; this server serves {', '.join(map(repr, models))}", param="model")
    return models[name]


def sampling_of(job: Job) -> SamplingParams:
    """What the job was asked for, complete."""
    return msgspec.convert(job.request["sampling"], SamplingParams)
