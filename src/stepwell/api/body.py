"""Request bodies: validated by pydantic, refused in one line that names the field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from stepwell.cache.params import cache_of
from stepwell.config.load import message_of, nested_fields, path_of, shorten, unknown_name
from stepwell.config.schema import CacheMethod
from stepwell.errors import InvalidRequest, ModelNotFound, Unsupported
from stepwell.types import ModelInfo, Request, SamplingParams, replace

B = TypeVar("B", bound=BaseModel)
LISTS = ("scm_compute_bins", "scm_cache_bins")  # of an object in a form
Models = Mapping[str, ModelInfo]  # by the names under which they are served
INSTEAD = {"pictures": "/v1/images/generations", "videos": "/v1/videos", "text": "/v1/chat/completions"}
NO_EFFECT = ("quality", "style", "moderation", "user", "input_fidelity", "safety_identifier")  # of OpenAI's own models


class Body(BaseModel):
    """A request body: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_number(cls, value: Any, info: ValidationInfo) -> Any:
        """A form's numbers are text. Python takes 1_0 for 10; nobody else does."""
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if any("_" in text for text in texts) and _takes_numbers(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must be a number")
        return value


def _takes_numbers(annotation: Any) -> bool:
    """Whether a field's type has numbers in it, and no text."""
    kinds, found = [annotation], set()
    while kinds:
        found.add(kind := kinds.pop())
        kinds += get_args(kind)
    return bool(found & {int, float}) and str not in found


class WakeBody(Body):
    """Nothing: there is one way to wake."""


class SleepBody(Body):
    """How to fall asleep."""

    mode: Literal["finish", "abort"] = Field("finish", description="What becomes of requests under way.")


class Nvext(Body):
    """The `nvext` object of NVIDIA Dynamo's documents; the same names at the top level mean the same."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None


class Cache(Body):
    """The `cache` object: the step cache of one request. What is left out is the server's, or the method's default."""

    method: CacheMethod | None = None
    fn: int | None = Field(None, description="First blocks that are always computed.")
    bn: int | None = Field(None, description="Last blocks that are always computed.")
    warmup: int | None = Field(None, description="Steps that are computed first.")
    rdt: float | None = Field(None, description="Change from which a step is computed; 0 computes all.")
    mc: int | None = Field(None, description="Cached steps in a row, at most; -1 is no bound.")
    taylorseer: bool | None = Field(None, description="Extrapolate what is skipped instead of repeating it.")
    ts_order: int | None = Field(None, description="Order of that extrapolation, 1 or 2.")
    scm_preset: Literal["none", "slow", "medium", "fast", "ultra"] | None = None
    scm_policy: Literal["dynamic", "static"] | None = None
    scm_compute_bins: list[int] | None = Field(None, description="Lengths of the runs of computed steps.")
    scm_cache_bins: list[int] | None = Field(None, description="Lengths of the runs of cached steps between them.")


class SamplingBody(Body):
    """What every request for pictures or videos may say: OpenAI's fields first, then those of diffusion servers."""

    prompt: str
    model: str | None = None
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.")
    user: str | None = Field(None, description="No effect.")
    quality: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    max_sequence_length: int | None = None
    cache: Cache | None = None
    nvext: Nvext | None = None

    def sampling(self) -> SamplingParams:
        """These fields as parameters. Raises InvalidRequest for a field that is given twice, each time differently."""
        width, height = parse_size(self.size, self.width, self.height)
        nvext = self.nvext or Nvext()
        return SamplingParams(
            width=width,
            height=height,
            num_inference_steps=either("num_inference_steps", self.num_inference_steps, nvext.num_inference_steps),
            guidance_scale=either("guidance_scale", self.guidance_scale, nvext.guidance_scale),
            true_cfg_scale=self.true_cfg_scale,
            negative_prompt=either("negative_prompt", self.negative_prompt, nvext.negative_prompt),
            seed=either("seed", self.seed, nvext.seed),
            max_sequence_length=self.max_sequence_length,
            cache=None if self.cache is None else cache_of(self.cache.model_dump(exclude_none=True)),
        )

    def without_effect(self) -> list[str]:
        """Fields that were given and change nothing."""
        return [name for name in NO_EFFECT if name in self.model_fields_set and getattr(self, name) is not None]


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart body: its fields as strings, and its files, each by field name; `name[]` may come several times."""

    fields: Mapping[str, tuple[str, ...]]
    files: Mapping[str, tuple[bytes, ...]]


def parse_body(kind: type[B], body: Any, *, is_form: bool = False) -> B:
    """`body` as a `kind`. No unknown field passes; in JSON, no string passes for a number either."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body = {shorten(body)}: must be a JSON object")
    try:
        return kind.model_validate(body, strict=not is_form)
    except ValidationError as error:
        first = error.errors()[0]
        name = path_of(first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown_name(name, nested_fields(kind, first["loc"][:-1]), "in the body") from None
        if first["type"] == "missing":
            raise InvalidRequest(f"{name} is missing", param=name) from None
        raise InvalidRequest(f"{name} = {shorten(first['input'])}: {message_of(first)}", param=name) from None


def parse_form(kind: type[B], form: Form) -> B:
    """The fields of a form as a `kind`. Objects come as JSON text, or as `name[key]` fields; lists in them as JSON text, with
    commas, or as `name[key][]` fields."""
    fields: dict[str, Any] = {}
    for name, values in form.fields.items():
        match = re.fullmatch(r"([^][]+)\[([^][]+)\](\[\])?", name)
        outer, inner = (match[1], match[2]) if match and (match[2] in LISTS or not match[3]) else (name, None)
        if len(values) > 1 and not name.endswith("[]"):
            raise InvalidRequest(f"{name} is given twice", param=name)
        nested = fields.setdefault(outer, {}) if inner else fields
        if not isinstance(nested, dict) or (inner or outer) in nested:
            raise InvalidRequest(f"{outer} is given twice, once as {name}", param=outer)
        value = ",".join(values)
        opening = "[" if inner in LISTS else "{" if name == outer != "prompt" else None
        is_json = opening is not None and value.lstrip().startswith(opening)
        nested[inner or outer] = _json(name, value) if is_json else value.split(",") if inner in LISTS else value
    return parse_body(kind, fields, is_form=True)


def _json(name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not JSON: {error}", param=name) from None


def find_model(asked: str, models: Models) -> str:
    """The name under which a model is served, from that or its id. Raises ModelNotFound for one that is not served here."""
    for name in (asked, *(name for name, model in models.items() if model.id == asked)):
        if name in models:
            return name
    raise ModelNotFound(f"model = {asked[:200]!r}: this server serves {', '.join(map(repr, models))}", param="model")


def pick_model(asked: str | None, models: Models, wanted: Literal["pictures", "videos", "text"]) -> ModelInfo:
    """The model a request names, else the first that makes what is wanted. Raises ModelNotFound, or Unsupported if it makes
    other things."""
    fitting = (name for name, model in models.items() if model.makes == wanted)
    name = next(fitting, next(iter(models))) if asked is None else find_model(asked, models)
    made = models[name].makes
    if made != wanted:
        raise Unsupported(f"{name!r} makes {made}; use POST {INSTEAD[made]}", param="model")
    return models[name]


def parse_size(size: str | None, width: int | None = None, height: int | None = None) -> tuple[int | None, int | None]:
    """`size` as (width, height) in pixels, checked against those if they are given too; None where it is left open."""
    if size is None or size == "auto":
        return width, height
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", size, re.ASCII)
    if match is None:
        raise InvalidRequest(
            f"size = {shorten(size)}: must be 'WIDTHxHEIGHT' in pixels, such as '1024x768', or 'auto'", param="size"
        )
    sides = int(match[1]), int(match[2])
    for name, value, other in zip(("width", "height"), sides, (width, height), strict=True):
        if other is not None and other != value:
            raise InvalidRequest(f"{name} = {other} contradicts size = {size!r}; give one of them", param=name)
    return sides


def either(name: str, top: Any, nested: Any) -> Any:
    """A value that may be given at the top level or inside `nvext`."""
    if top is not None and nested is not None and top != nested:
        raise InvalidRequest(f"{name} = {top!r} contradicts nvext.{name} = {nested!r}; give one of them", param=name)
    return nested if top is None else top


def with_previews(request: Request, count: int) -> Request:
    """A complete request that asks for about so many previews."""
    steps = request.sampling.num_inference_steps
    assert steps is not None
    return replace(request, preview_every=math.ceil(steps / (count + 1)) if count else 0)


def size_of(request: Request) -> str:
    """A complete request's size, as the API writes it."""
    return f"{request.sampling.width}x{request.sampling.height}"
