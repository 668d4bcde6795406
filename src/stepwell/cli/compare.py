"""stepwell compare BASE NEW …: what changed between the timing reports of runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from stepwell.cli.flags import Parser
from stepwell.errors import InvalidRequest
from stepwell.profiling.compare import compare
from stepwell.profiling.report import read_report

DESCRIPTION = "Compare timing reports, written by generate --perf-dump-path, with the first of them. Prints Markdown."


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="stepwell compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="Two reports or more; the first is the baseline.")
    files: list[Path] = parser.parse_args(arguments).files
    if len(files) < 2:
        raise InvalidRequest("Need at least 2 files to compare", param="files")
    stems = Counter(file.stem for file in files)
    labels = [file.stem if stems[file.stem] == 1 else str(file) for file in files]
    print(compare([(label, read_report(file)) for label, file in zip(labels, files, strict=True)]))
    return 0
