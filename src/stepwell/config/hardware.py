"""What machine this is: the facts automatic choices rest on. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Hardware:
    """`threads` is what torch uses when nothing is asked for; `measured` holds rates and ratios timed on this machine
    (see `engine.measure`) and is empty where nothing was timed. `vnni` says that the CPU sums products of int8 exactly;
    `capability` is the GPU's compute capability, (8, 9) for SM89; `triton` is its version, None where it is not installed;
    `packages` are the modules of optional vendor libraries that are installed, `broken` what is wrong with those of them that
    were tried and can't be used."""

    cpu: str = "unknown CPU"
    cores: int = 1
    memory_bytes: int = 8 * 2**30
    gpu: str | None = None
    vnni: bool = False
    threads: int = 1
    triton: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    rocm: bool = False
    packages: frozenset[str] = frozenset()
    broken: Mapping[str, str] = field(default_factory=dict)


def detect_cpu() -> Hardware:
    """The CPU side of this machine."""
    text = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", text)
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    return Hardware(
        cpu=model.group(1).strip() if model else "unknown CPU",
        cores=usable_cores(),
        memory_bytes=int(memory.group(1)) * 1024 if memory else 8 * 2**30,
        threads=usable_cores(),
        vnni=re.search(r"\b(avx512_vnni|avx_vnni)\b", text) is not None,
    )


def usable_cores() -> int:
    """Cores this process may use, which inside a container are fewer than the machine has."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class HostMemory:
    """This process's memory: resident, the part of it that no file backs, and the most that was ever resident."""

    resident_bytes: int
    anonymous_bytes: int
    peak_bytes: int


def host_memory() -> HostMemory:
    """Zeros where the system does not say."""
    found = dict(re.findall(r"(VmRSS|RssAnon|VmHWM):\s*(\d+) kB", _read("/proc/self/status")))
    return HostMemory(*(int(found.get(name, 0)) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM")))


def installed(modules: Iterable[str]) -> frozenset[str]:
    """Those of these modules that could be imported. Nothing is: vendor libraries start GPUs when they are."""
    return frozenset(module for module in modules if _is_installed(module))


def _is_installed(module: str) -> bool:
    path: Iterable[str] | None = None
    origin = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), None if path is None else list(path))
        if spec is None:
            return False
        path, origin = spec.submodule_search_locations or [], spec.origin
    return origin is not None  # a folder without __init__.py is no library


def available_bytes() -> int:
    """Memory this process could still take: the machine's, or less where its container allows less."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
    free = int(found.group(1)) * 1024 if found else 4 * 2**30
    most, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(free, max(0, int(most) - int(used))) if most.isdigit() and used.isdigit() else free


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
