"""What the store keeps of a request for a video, and the request again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec

from stepwell.media.storage import new_key
from stepwell.serve.jobs import Job
from stepwell.types import Frames, Request, SamplingParams, replace

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


def to_request(job: Job, image: Frames | None = None) -> Request:
    """A stored job's request again; its id is the job's."""
    plain = {"prompt": job.request["prompt"], "task": job.request["task"], "sampling": job.request["sampling"], "id": job.id}
    return replace(msgspec.convert(plain, Request), image=image)


def sampling_of(job: Job) -> SamplingParams:
    """What the job was asked for, complete."""
    return msgspec.convert(job.request["sampling"], SamplingParams)
