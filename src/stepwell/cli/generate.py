"""stepwell generate: one prompt, some pictures or videos, saved; or a text, printed as it is made."""

from __future__ import annotations

import contextlib
import logging
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwell.cli.flags import Flags, quiet_threads
from stepwell.cli.following import follows
from stepwell.cli.perf import Stopwatch, check_path, write
from stepwell.config.paths import make_folder, unwritable
from stepwell.config.schema import EngineOptions, OutputOptions, SamplingOptions, Section, ServerOptions
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.media.images import Parameters, file_stem, unused
from stepwell.media.video import check_name, parameters_in
from stepwell.types import Chunk, Event, ModelInfo, Progress, replace

if TYPE_CHECKING:
    from rich.console import Console

    from stepwell.generator import DiffGenerator, GeneratedOutput

DESCRIPTION = "Make pictures or videos from a prompt and save them, or print a text. HTTP options are accepted and do not apply."

OF_TEXTS = frozenset(("max_tokens", "temperature", "top_p"))


def run(arguments: list[str]) -> int:
    """Returns the exit code."""
    flags = Flags("generate", DESCRIPTION)
    flags.parser.add_argument(
        "--from", dest="from_picture", metavar="FILE", help="Repeat a picture or video from what it carries."
    )
    given, file = flags.parse(arguments)
    base = _from_picture(given.pop("from_picture", None))
    options = flags.load(given, file, base)
    if follows(options[EngineOptions]):
        return 0
    sampling, output = options[SamplingOptions], options[OutputOptions]
    if sampling.prompt is None:
        raise InvalidRequest("prompt is missing: give --prompt, or a config file that has one", param="prompt")
    paths = options[EngineOptions].model_paths
    if len(paths) > 1:
        raise InvalidRequest(f"model_path = {list(paths)}: generate runs one model", param="model_path")
    target = Target.of(output)
    perf_path = None if output.perf_dump_path is None else Path(output.perf_dump_path)
    _note_what_does_not_apply(options)
    if "strength" in base and sampling.image_path is None:
        print("note: that was made from a picture, which it does not carry; --image-path gives it again", file=sys.stderr)

    quiet_threads()
    for name in ("worker", "core"):  # a failed step is one line here, not a traceback
        logging.getLogger(f"stepwell.engine.{name}").setLevel(logging.CRITICAL)
    target.prepare()
    if perf_path is not None:
        check_path(perf_path)
    from stepwell.generator import DiffGenerator

    engine_options = options[EngineOptions].model_dump(exclude_unset=True)
    bar = ProgressBar()
    with bar.loading(paths[0]):
        generator = DiffGenerator.from_pretrained(**engine_options)
    with generator:
        if generator.model.text is not None:
            return _write_text(generator, sampling)
        target = target.of_model(generator.model, sampling)
        watch = Stopwatch()
        outputs = _generate(generator, sampling, bar)
        watch.generated()
        for index, made in enumerate(outputs):
            _save(made, target, index, len(outputs))
        if perf_path is not None:
            write(perf_path, outputs, watch, options[EngineOptions])
            print(f"saved {perf_path} (timing report)")
    return 0


def _generate(generator: DiffGenerator, sampling: SamplingOptions, bar: ProgressBar) -> list[GeneratedOutput]:
    wanted = sampling.model_dump(exclude_none=True, exclude={"prompt", "image_path"})
    for name in OF_TEXTS & wanted.keys():
        raise Unsupported(f"{name} does not apply: {generator.model.id} makes {generator.model.makes}", param=name)
    assert sampling.prompt is not None
    with bar.running(sampling.num_outputs_per_prompt or 1), bar.notices():
        return generator.generate(sampling.prompt, image=sampling.image_path, on_event=bar.show, **wanted)


def _write_text(generator: DiffGenerator, sampling: SamplingOptions) -> int:
    """A text goes to standard output as it is made, and nothing else does; a terminal shows its blocks being filled too."""
    wanted = sampling.model_dump(exclude_none=True, exclude={"prompt"})
    for name in wanted.keys() - OF_TEXTS - {"seed"}:
        raise Unsupported(f"{name} does not apply: {generator.model.id} writes text", param=name)
    assert sampling.prompt is not None
    if sys.stdout.isatty():
        from stepwell.cli.refining import Refining

        with Refining() as screen:
            generator.generate(sampling.prompt, on_event=screen.show, preview_every=1, **wanted)
        print(screen.words)
        return 0

    def show(event: Event) -> None:
        if isinstance(event, Chunk):
            print(event.text, end="", flush=True)

    generator.generate(sampling.prompt, on_event=show, **wanted)
    print()
    return 0


def _from_picture(path: str | None) -> dict[str, Any]:
    return {} if path is None else parameters_in(Path(path))


def _note_what_does_not_apply(options: dict[type[Section], Any]) -> None:
    """The spec's rule: HTTP arguments are ignored here. They are named, so that nobody wonders."""
    ignored = sorted(options[ServerOptions].model_fields_set)
    if ignored:
        print(f"note: {', '.join(ignored)} do not apply to generate, which starts no server", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Target:
    """Where results go: a folder, a name without suffix (None: from the prompt), a suffix (empty: the model's own)."""

    folder: Path
    stem: str | None
    suffix: str
    saves: bool
    saves_frames: bool

    @classmethod
    def of(cls, output: OutputOptions) -> Target:
        name = output.output_file_name
        if name is None:
            return cls(Path(output.output_path), None, "", output.save_output, output.return_frames)
        path = Path(name)
        if path.name != name or name in ("", ".", ".."):
            raise InvalidRequest(
                f"output_file_name = {name!r}: must be a file name; the folder is --output-path", param="output_file_name"
            )
        suffix = path.suffix.lower()
        if suffix:
            check_name(name)
        return cls(Path(output.output_path), path.stem, suffix, output.save_output, output.return_frames)

    def of_model(self, model: ModelInfo, sampling: SamplingOptions) -> Target:
        """The same with a suffix that fits what this model makes. Raises InvalidRequest where a result could not be saved."""
        is_video, frames = model.makes_video, sampling.num_frames or model.defaults.num_frames or 1
        if self.suffix:
            fps = sampling.fps or model.defaults.fps or 1
            check_name(f"{self.stem}{self.suffix}", frames, fps, is_video=is_video)
        made = replace(self, suffix=self.suffix or (".mp4" if is_video else ".png"))
        for index in range(count := sampling.num_outputs_per_prompt or 1):
            if made.saves and made.stem is not None:
                made.check(made.folder / made.name(index, count), is_folder=made.suffix == ".png" and frames > 1)
        return made

    def name(self, index: int, count: int) -> str:
        """Of one result of several, as it was asked for."""
        return f"{self.stem}-{index}{self.suffix}" if count > 1 else f"{self.stem}{self.suffix}"

    @staticmethod
    def check(path: Path, *, is_folder: bool) -> None:
        """Find out before anything slow what stands where a result goes."""
        place = path.with_suffix("") if is_folder else path
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # too long a name, or a NUL in it
            raise unwritable(error, "output_file_name", f"output_file_name = {path.name!r}") from None
        if stat.S_ISDIR(mode) != is_folder:
            there, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
            message = f"output_file_name = {path.name!r}: {place} is {there}, where {wanted} would go"
            raise InvalidRequest(message, param="output_file_name")

    def prepare(self) -> None:
        """Find out before loading a model whether its pictures can be saved."""
        if not (self.saves or self.saves_frames):
            return
        make_folder(self.folder, "output_path", f"output_path = {str(self.folder)!r}")

    def path(self, parameters: Parameters, index: int, count: int) -> Path:
        """A name that was asked for replaces what has it; one made up from the prompt does not."""
        if self.stem is None:
            return unused(self.folder / f"{file_stem(parameters)}{self.suffix}")
        return self.folder / self.name(index, count)


def _save(made: GeneratedOutput, target: Target, index: int, count: int) -> None:
    length = f"{len(made.frames)} frames, " if len(made.frames) > 1 else ""
    summary = f"{length}seed {made.seed}, {made.timings['total'] / 1e3:.2f} s"
    path = target.path(made.parameters, index, count)
    if target.saves:
        print(f"saved {made.save(path)} ({summary})")
    else:
        print(f"not saved ({summary})")
    if target.saves_frames:
        import io

        import numpy as np

        from stepwell.media.images import write_whole

        buffer = io.BytesIO()
        np.save(buffer, made.frames)
        write_whole(path.with_suffix(".npy"), buffer.getvalue())
        print(f"saved {path.with_suffix('.npy')} (raw frames {made.frames.shape})")


class Notices(logging.Handler):
    """Prints what is logged as lines of a console, however long."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


class ProgressBar:
    """Progress on standard error: a spinner while loading, then the stage, its steps, and how much of all work is done."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None
        self._shares: dict[tuple[str, int], float] = {}
        self._count = 1
        self._stage, self._since, self._taken = "", 0.0, 0

    @contextlib.contextmanager
    def loading(self, model: str) -> Iterator[None]:
        with self._console.status(f"loading {model}"):
            yield

    @contextlib.contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Shows a bar for so many outputs from the first step on, so that a request refused leaves nothing but its error."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar, self._count = Progress(*columns, console=self._console), count
        try:
            yield
        finally:
            if self._task is not None:
                self._bar.stop()

    @contextlib.contextmanager
    def notices(self) -> Iterator[None]:
        """Shows what is said about traces, above the bar."""
        log, handler = logging.getLogger("stepwell.profiling"), Notices(self._console)
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)

    def show(self, event: Event) -> None:
        if not isinstance(event, Progress) or not event.step:
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._count)
        self._shares[event.request_id, event.index] = event.share
        now = time.perf_counter()
        if event.stage != self._stage:
            self._stage, self._since, self._taken = event.stage, now, 0
        else:
            self._taken += 1
        rate = f", {self._taken / (now - self._since):.1f} steps/s" if self._taken else ""
        text = f"{event.stage} {event.step}/{event.total}{rate}"
        self._bar.update(self._task, description=text, completed=sum(self._shares.values()))
