"""Writes what is generated from the schema: docs/config.md, docs/config.schema.json and docs/config.example.yaml.

    python -m stepwell.config.render [--check]

With --check nothing is written; exit code 1 says that a file is not what the schema says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from stepwell.config.schema import (
    EngineOptions,
    OutputOptions,
    SamplingOptions,
    Section,
    ServerOptions,
    ServingOptions,
    WorkerOptions,
    extra_of,
)

SECTIONS = (EngineOptions, SamplingOptions, OutputOptions, ServingOptions, ServerOptions, WorkerOptions)
DOCS = Path("docs")


def own_fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The options that a section does not have from another one."""
    parent = section.__base__
    inherited = parent.model_fields if parent is not None and issubclass(parent, Section) else {}
    return {name: field for name, field in section.model_fields.items() if name not in inherited}


def table() -> str:
    """Every option as Markdown."""
    lines = [
        "# Options",
        "",
        "Generated from `src/stepwell/config/schema.py` by `make docs`. The name in the first column is the key of a config",
        "file; `--name-with-dashes` is the flag, `STEPWELL_NAME` the environment variable.",
        "Defaults < the model's own < config file < environment < flags.",
    ]
    for section in SECTIONS:
        lines += [
            "",
            f"## {(section.__doc__ or '').splitlines()[0].rstrip('.')}",
            "",
            "| option | values | default | what |",
            "|---|---|---|---|",
        ]
        lines += [_row(name, field) for name, field in own_fields(section).items()]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    extra = extra_of(field)
    text = field.description or ""
    if extra["aliases"]:
        text += f" Also `{'`, `'.join(extra['aliases'])}`."
    if extra["env"]:
        text += f" Also read from `{'`, `'.join(extra['env'])}`."
    if extra["only"] is not None:
        text += f" **Only {' or '.join(f'`{value}`' for value in extra['only'])}**: {extra['why']}."
    default = field.get_default()
    shown = "" if default is None else f"`{default.model_dump() if isinstance(default, Section) else default}`"
    return f"| `{name}` | {_type(field.annotation)} | {shown} | {text} |".replace("\n", " ")


def _type(annotation: Any) -> str:
    if isinstance(annotation, type):
        return "object" if issubclass(annotation, Section) else annotation.__name__
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is list:
        return f"list of {_type(arguments[0])}"
    if get_origin(annotation) is dict:
        return "object"
    if all(isinstance(a, str) for a in arguments):
        return ", ".join(f"`{a}`" for a in arguments)
    return " or ".join(_type(a) for a in arguments)


def schema() -> str:
    """The JSON schema of a config file, for editors."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for section in SECTIONS:
        made = section.model_json_schema()
        definitions.update(made.get("$defs", {}))
        for name, content in made["properties"].items():
            properties[name] = content
            properties.update({alias: content for alias in content["aliases"]})
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stepwell config file",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": definitions,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def example() -> str:
    """A config file that holds every option with its default, commented out where that is "not set", or where `generate` has
    no such option."""
    lines = ["# Every option, with its default. stepwell generate --config FILE"]
    for section in SECTIONS:
        lines += ["", f"# {(section.__doc__ or '').splitlines()[0]}"]
        for name, field in own_fields(section).items():
            default = field.get_default()
            plain = default.model_dump() if isinstance(default, Section) else default
            text = yaml.safe_dump({name: plain}, default_flow_style=False, sort_keys=False, width=200).strip()
            comment = "# " if plain is None or section is WorkerOptions else ""
            lines += [f"{comment}{line}" for line in text.splitlines()]
    return "\n".join(lines) + "\n"


FILES = {"config.md": table, "config.schema.json": schema, "config.example.yaml": example}


def main(arguments: list[str]) -> int:
    """Write the files, or check them."""
    stale = [name for name, make in FILES.items() if _read(DOCS / name) != make()]
    if "--check" in arguments:
        if stale:
            sys.stderr.write(f"not up to date: {', '.join(stale)}; run `make docs`\n")
        return int(bool(stale))
    for name in stale:
        DOCS.mkdir(exist_ok=True)
        (DOCS / name).write_text(FILES[name](), encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
