"""What machine this is: the facts automatic choices rest on. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Hardware:
    """`threads` is what torch uses when nothing is asked for; `measured` holds rates and ratios timed on this machine
    (see `engine.measure`) and is empty where nothing was timed; `triton` is its version, None where it is not installed."""

    cpu: str = "unknown CPU"
    cores: int = 1
    memory_bytes: int = 8 * 2**30
    gpu: str | None = None
    threads: int = 1
    triton: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


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
    )


def usable_cores() -> int:
    """Cores this process may use, which inside a container are fewer than the machine has."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def resident_bytes() -> int:
    """This process's resident memory."""
    kilobytes = re.search(r"VmRSS:\s*(\d+) kB", _read("/proc/self/status"))
    return int(kilobytes.group(1)) * 1024 if kilobytes else 0


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
