"""Reads options from everywhere they may come from: defaults < config file < environment < flags.

The only reader of the environment. Unknown names are errors with a suggestion, wrong values name the option, the
value and what would be right.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from stepwell.config.paths import reason
from stepwell.config.schema import REPEATED, SECTIONS, EngineOptions, Section, extra_of
from stepwell.errors import InvalidRequest

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class Place:
    """A process's among the ranks of one model, and where they meet; `has_store`: somebody else keeps the store there."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    has_store: bool


def torchrun_place(environ: Mapping[str, str] | None = None) -> Place | None:
    """What torchrun says to the processes it starts; None where it did not. Raises InvalidRequest for what can't be read."""
    environ = os.environ if environ is None else environ
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    try:
        rank, size, local_rank, local_size, port = (int(environ[name]) for name in names)
        has_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Place(rank, size, local_rank, local_size, environ["MASTER_ADDR"], port, has_store)
    except (KeyError, ValueError) as error:
        raise InvalidRequest(
            f"the environment says RANK = {environ['RANK']}, but not all of {', '.join(names)} and MASTER_ADDR as torchrun "
            f"does ({error}); start this with torchrun, or unset RANK"
        ) from None


PREFIX = "STEPWELL_"
FOREIGN_PREFIX = "SGLANG_CACHE_DIT_"


def load(
    sections: tuple[type[Section], ...],
    *,
    flags: Mapping[str, Any],
    file: Path | None = None,
    base: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[type[Section], Any]:
    """One instance per section, from flags (by field name or alias), a config file and the environment.

    base: values that even the file beats, such as the parameters a picture carries.
    """
    names = _names(sections)
    given = {} if file is None else _canonical(read_file(file), names, f"in {file}")
    given.update(_from_environment(names, sections, os.environ if environ is None else environ))
    by_flag = _canonical(flags, names, "as an option")
    given.update(by_flag)
    merged = {**_still_valid(base or {}, given, by_flag), **given}
    made = {}
    for section in sections:
        own = {name: merged[name] for name in section.model_fields if name in merged}
        made[section] = validate(section, own)
        made[section].refuse_what_is_missing()
    return made


def _still_valid(base: Mapping[str, Any], given: Mapping[str, Any], by_flag: Mapping[str, Any]) -> dict[str, Any]:
    """What holds of a base: its step cache's values go with its method, and one mask replaces another."""
    carried = base.get("cache_method")
    asked = given.get("cache_method", carried)
    if "cache_method" not in given and "cache_dit_enabled" in by_flag:
        is_on = validate(EngineOptions, {"cache_dit_enabled": by_flag["cache_dit_enabled"]}).cache_dit_enabled
        asked = "dbcache" if is_on else "none"
    if asked != carried:
        return {name: value for name, value in base.items() if not name.startswith("cache_")}
    mask = {"cache_dit_scm_preset", "cache_dit_scm_compute_bins", "cache_dit_scm_cache_bins"}
    return {name: value for name, value in base.items() if name not in mask or given.keys().isdisjoint(mask)}


def validate(section: type[S], values: Mapping[str, Any]) -> S:
    """An instance of `section`, or InvalidRequest for the first wrong value."""
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or section.__name__
        if first["type"] == "extra_forbidden":
            raise unknown_name(name, nested_fields(section, first["loc"][:-1]), "as an option") from None
        raise InvalidRequest(f"{name} = {shorten(first['input'])}: {message_of(first)}", param=name) from None


def message_of(error: Mapping[str, Any]) -> str:
    """What pydantic says of a wrong value, as the end of a sentence."""
    if error["type"] in ("model_type", "dict_type"):  # whose own words name a class of ours, or Python's
        return "must be an object"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def read_file(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping; the suffix decides, anything but .json is read as YAML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"config file {path}: {reason(error)}", param="config") from None
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except ValueError as error:
        raise InvalidRequest(f"config file {path}: {error}", param="config") from None
    except Exception as error:  # yaml's errors share no base with the standard library's
        raise InvalidRequest(f"config file {path}: {' '.join(str(error).split())}", param="config") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidRequest(f"config file {path} must hold a mapping of options, not {type(content).__name__}", param="config")
    return content


def unknown_name(name: str, known: Iterable[str], where: str) -> InvalidRequest:
    """The error for a name nobody knows here, with the command that does know it, or the nearest name that is known."""
    near = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    field = name.lstrip("-").replace("-", "_")
    commands = [command for command, sections in SECTIONS.items() if any(field in section.model_fields for section in sections)]
    if commands:
        hint = f"; it is an option of stepwell {', '.join(commands)}"
    return InvalidRequest(f"unknown name {shorten(name)} {where}{hint}", param=name)


def _names(sections: tuple[type[Section], ...]) -> dict[str, str]:
    """Every accepted name, aliases included, and the field it stands for."""
    names = {}
    for section in sections:
        for field, info in section.model_fields.items():
            for alias in (field, *extra_of(info)["aliases"]):
                names[alias] = field
    return names


def nested_fields(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the object at `path` inside `model`, each with that path."""
    for part in path:
        if isinstance(part, str) and part in model.model_fields:  # and not the member of a union
            model = next(_models_in(model.model_fields[part].annotation))
    prefix = path_of(path)
    return [f"{prefix}.{name}" if prefix else name for name in model.model_fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type names, in lists and unions too."""
    arguments = get_args(annotation)
    if not arguments and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in arguments:
        yield from _models_in(argument)


def path_of(place: tuple[str | int, ...]) -> str:
    """Where pydantic found an error, without the members of unions that it tried: messages[0].role"""
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("float", "str", "int", "bool") and not part.startswith(("list[", "dict[", "literal[", "constrained-")):
            path += f".{part}" if path else part
    return path


def shorten(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def _canonical(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        field = names.get(str(name).replace("-", "_"))
        if field is None:
            raise unknown_name(str(name), names, where)
        out[field] = value
    return out


def _from_environment(
    names: Mapping[str, str], sections: tuple[type[Section], ...], environ: Mapping[str, str]
) -> dict[str, Any]:
    variables = {PREFIX + field.upper(): field for field in names.values()}
    for section in sections:
        for field, info in section.model_fields.items():
            variables.update(dict.fromkeys(extra_of(info)["env"], field))
    known_anywhere = set(variables) | {PREFIX + field.upper() for field in _every_field()}
    found = {}
    for variable, value in environ.items():
        if re.fullmatch(r"STEPWELL_(SERVICE|PORT)_.+", variable) or value.startswith("tcp://"):
            continue  # Kubernetes sets these for a Service of that name
        if variable in variables:
            if value != "":
                field = variables[variable]
                several = field in REPEATED and "," in value  # nothing can be repeated here
                found[field] = [part.strip() for part in value.split(",")] if several else value
        elif variable.startswith((PREFIX, FOREIGN_PREFIX)) and variable not in known_anywhere:
            raise unknown_name(variable, variables, "in the environment")
    return found


def _every_field() -> set[str]:
    """Options of commands other than the one at hand may be set in the environment too."""
    return {field for sections in SECTIONS.values() for section in sections for field in section.model_fields}
