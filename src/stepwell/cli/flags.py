"""Flags from the schema: what argparse knows of an option it knows from there."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from stepwell.config.load import load, unknown_name
from stepwell.config.schema import REPEATED, SECTIONS, Section, extra_of
from stepwell.errors import InvalidRequest

THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(message)


LISTS = {"text_encoder_precisions": "PRECISION", "warmup_sizes": "SIZE"}  # options that take several values at once


class Flags:
    """The parser of one command: its sections' options, `--config`, and what the command adds itself."""

    def __init__(self, command: str, description: str):
        self.sections = SECTIONS[command]
        self.parser = Parser(
            prog=f"stepwell {command}", description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        self.parser.add_argument("--config", metavar="FILE", help="Read options from a JSON or YAML file; flags beat it.")
        for section in self.sections:
            self._add(section)

    def _add(self, section: type[Section]) -> None:
        group = self.parser.add_argument_group((section.__doc__ or "").split("\n")[0].rstrip("."))
        for name, field in section.model_fields.items():
            extra = extra_of(field)
            spellings = [f"--{alias.replace('_', '-')}" for alias in (name, *extra["aliases"])]
            help_text = (field.description or "").replace("%", "%%")
            if extra["only"] is not None:
                help_text += f" [only {' or '.join(str(value) for value in extra['only'])}: {extra['why']}]"
            options: dict[str, Any] = {"dest": name, "help": help_text}
            if field.annotation is bool:
                group.add_argument(*spellings, nargs="?", const="true", metavar="true|false", **options)
                group.add_argument(*(f"--no-{s[2:]}" for s in spellings), dest=name, action="store_const", const="false",
                                   help=argparse.SUPPRESS)  # fmt: skip
            elif name in LISTS:
                group.add_argument(*spellings, nargs="+", metavar=LISTS[name], **options)
            else:
                action = "append" if name in REPEATED else "store"
                group.add_argument(*spellings, metavar=name.upper(), action=action, **options)

    def parse(self, arguments: list[str]) -> tuple[dict[str, Any], Path | None]:
        """(flags that were given, the config file). Dashes and underscores are the same; unknown flags are errors."""
        given, rest = self.parser.parse_known_args([_dashed(argument) for argument in arguments])
        if rest:
            known = [option for action in self.parser._actions for option in action.option_strings]
            raise unknown_name(rest[0].split("=")[0], known, "on the command line")
        values = vars(given)
        config = values.pop("config", None)
        return values, None if config is None else Path(config)

    def load(self, flags: dict[str, Any], file: Path | None, base: dict[str, Any] | None = None) -> dict[type[Section], Any]:
        """All sections of the command, from defaults, `base`, file, environment and flags."""
        return load(self.sections, flags=flags, file=file, base=base)


def quiet_threads() -> None:
    """Let idle OpenMP threads sleep instead of spin; must run before torch is imported.

    On a machine that does other work too, spinning barriers cost up to four times the wall-clock time of a step.
    """
    if "torch" not in sys.modules:
        for name, value in THREAD_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # noqa: TID251  (written, not read)


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
