"""Saves samples between two steps, so that one whose process was killed goes on from there, bit for bit.

A file holds what steps change (`Saved`) as safetensors, and the fingerprint of everything else that decides about a
sample's bits: the request, and the model as it runs here. The other stages are run again; what they make is the same. A
file that is damaged, or of anything else, is erased, and its sample starts anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from stepwell.cache.memory import Known
from stepwell.config.resolve import Plan
from stepwell.config.schema import EngineOptions
from stepwell.engine.checkpoint_files import erase, fingerprint, open_folder, path_of, write
from stepwell.stages.base import Stage, State
from stepwell.types import CacheReport, Request, replace

logger = logging.getLogger(__name__)
Named = dict[str, Tensor]
# options that change no picture; any other, also one to come, makes a checkpoint another one's
HARMLESS = {
    *("checkpoint_interval_s", "checkpoint_path", "scheduling_policy", "max_batch_tokens", "max_running_samples"),
    *("max_queued_samples", "max_queue_seconds", "hang_seconds", "prompt_cache_mb", "warmup_sizes", "profile"),
    *("num_profiled_timesteps", "profile_all_stages", "offload_path", "pin_cpu_memory", "model_path"),
}


@dataclass(frozen=True, slots=True)
class Saved:
    """A sample after so many steps of a stage: of each lane what its step cache knows, and its report once that is made."""

    stage: str
    step: int
    latents: Tensor
    memory: tuple[Tensor, ...]
    caches: tuple[Known | None, ...]
    report: CacheReport | None

    @classmethod
    def of(cls, state: State, stage: str, step: int) -> Saved:
        assert state.latents is not None
        caches = tuple(None if lane.cache is None else lane.cache.known for lane in state.lanes)
        return cls(stage, step, state.latents, state.memory, caches, state.cache)

    def put_back(self, state: State) -> None:
        state.latents, state.memory, state.cache = self.latents, self.memory, self.report
        for lane, known in zip(state.lanes, self.caches, strict=True):
            if lane.cache is not None:
                lane.cache.known = known


class Checkpoints:
    """One worker's. `model` is what `model_print` says; `interval_s` seconds of work lie between two files of a sample."""

    def __init__(self, folder: Path, interval_s: float, model: str, stages: Sequence[Stage]):
        self._folder, self._interval_s, self._model = folder, interval_s, model
        self._resumable = [stage for stage in stages if stage.resumes]
        self._places = {stage.name: place for place, stage in enumerate(stages)}
        self._prints: dict[str, str] = {}  # of the samples under way
        self._unsaved_s: dict[str, float] = {}
        self._found: dict[str, Saved] = {}  # what was not put back yet

    def find(self, sample_id: str, state: State) -> dict[str, int]:
        """Look for what an earlier process left of a sample: the steps, by stage, that need not be taken again."""
        same = replace(state.request, preview_every=0)
        self._prints[sample_id] = hashlib.sha256(f"{self._model}{fingerprint(same)}{state.index}".encode()).hexdigest()
        path = path_of(self._folder, sample_id)
        try:
            saved = _read(path, self._prints[sample_id])
            steps = self._steps_until(state.request, saved.stage, saved.step)
        except FileNotFoundError:
            return {}
        except Exception as error:  # a file can be broken in more ways than anybody lists
            logger.warning("the checkpoint of %s is of no use, it starts anew: %s", sample_id, error)
            path.unlink(missing_ok=True)
            return {}
        logger.warning("%s goes on from step %d of %s", sample_id, saved.step, saved.stage)
        self._found[sample_id] = saved
        return steps

    def _steps_until(self, request: Request, stage: str, step: int) -> dict[str, int]:
        place = self._places[stage]
        before = {each.name: each.steps(request) for each in self._resumable if self._places[each.name] < place}
        return {**before, stage: step}

    def before(self, stage: str, sample_id: str, state: State) -> None:
        """Put back what was found, once the stages that are run again have been."""
        saved = self._found.get(sample_id)
        if saved is not None and self._places[stage] >= self._places[saved.stage]:
            saved.put_back(state)
            del self._found[sample_id]

    def after(self, stage: Stage, sample_id: str, state: State, step: int, took_s: float) -> None:
        """Count a sample's work, and save it if there is enough that is not. `step` is how many it has taken. Whatever goes
        wrong is logged, and is not the sample's trouble."""
        if not stage.resumes:
            return
        unsaved_s = self._unsaved_s.get(sample_id, 0.0) + took_s
        if unsaved_s >= self._interval_s:
            unsaved_s = 0.0
            steps = sum(self._steps_until(state.request, stage.name, step).values())
            try:
                write(path_of(self._folder, sample_id), _pack(Saved.of(state, stage.name, step), self._prints[sample_id], steps))
            except Exception as error:
                logger.warning("no checkpoint of %s after step %d of %s: %s", sample_id, step, stage.name, error)
        self._unsaved_s[sample_id] = unsaved_s

    def leave(self, sample_ids: Iterable[str]) -> None:
        """These samples are no longer here; their files stay."""
        for sample_id in sample_ids:
            for table in (self._prints, self._unsaved_s, self._found):
                table.pop(sample_id, None)

    def erase(self, request: Request) -> None:
        """Nobody will come back for this request."""
        erase(self._folder, request)


# ----------------------------------------------------------------------------------------------------------------- files
def _pack(saved: Saved, print_: str, steps_in_all: int) -> bytes:
    """As safetensors: the tensors by number, and the plain data around them, in which a tensor is its number and device."""
    tensors: list[Tensor] = []

    def keep(value: object) -> tuple[int, str]:
        assert isinstance(value, Tensor)
        tensors.append(value.detach().to("cpu", copy=True).contiguous())  # the format takes no two that share memory
        return len(tensors) - 1, value.device.type

    body = msgspec.msgpack.encode(saved, enc_hook=keep)
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    named["saved"] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    about = {"fingerprint": print_, "stage": saved.stage, "step": str(saved.step), "steps_in_all": str(steps_in_all)}
    return save(named, metadata={**about, "sha256": _digest(about, named)})


def _read(path: Path, print_: str) -> Saved:
    """The sample again. Raises FileNotFoundError, ValueError, or what else a damaged file leads to."""
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata() or {})
        if about.get("fingerprint") != print_:
            raise ValueError("it was made of another request, or by another model, version or machine")
        named: Named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    if about.pop("sha256", None) != _digest(about, named):
        raise ValueError("its checksum is wrong")

    def give(kind: type, value: tuple[int, str]) -> Tensor:
        return named[str(value[0])].to(value[1])

    return msgspec.msgpack.decode(named["saved"].numpy().tobytes(), type=Saved, dec_hook=give)


def _digest(about: dict[str, str], named: Named) -> str:
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(named.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# ----------------------------------------------------------------------------------------------------------------- opening
def open_checkpoints(options: EngineOptions, plan: Plan, model: Path, stages: Sequence[Stage]) -> Checkpoints | None:
    """What the options ask for; None where they ask for none. `model` is the repository's folder."""
    if options.checkpoint_path is None:
        if "checkpoint_interval_s" in options.model_fields_set:
            logger.warning("checkpoint_interval_s does not apply: there is no checkpoint_path")
        return None
    if options.checkpoint_interval_s < 0:
        return None
    return Checkpoints(
        open_folder(options.checkpoint_path), options.checkpoint_interval_s, model_print(options, plan, model), stages
    )


def model_print(options: EngineOptions, plan: Plan, model: Path) -> str:
    """The same where a model computes the same bits: versions, machine, options, choices, and files by size and date."""
    machine = torch.cuda.get_device_name() if plan.device.value != "cpu" else torch.backends.cpu.get_cpu_capability()
    choices = [line[:2] for line in plan.lines() if line[0] != "batch_tokens"]
    places = [model, *(Path(path) for path in (options.transformer_path, options.vae_path) if path is not None)]
    files = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for place in places for file in _files(place))
    facts = [version("stepwell"), torch.__version__, machine, options.model_dump(mode="json", exclude=HARMLESS), choices, files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _files(place: Path) -> Iterator[Path]:
    """A file, or those of a folder and of the folders in it; what is none, such as a hub id, says all by its name."""
    return (file for file in (place, *place.glob("*"), *place.glob("*/*")) if file.is_file())
