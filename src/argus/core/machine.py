"""What of this machine a process may use: it may be less than there is."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

# A container's limit and use of memory in bytes, and what of the latter is pages of files that
# nobody uses: version 2 of control groups, and version 1.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)  # fmt: skip


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> tuple[int, int]:
    """The free bytes and all bytes of memory, of the machine or of the container."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for folder, limit, use, idle in CGROUPS:
        try:
            most, used = (int((Path(folder) / name).read_text()) for name in (limit, use))
            stat = dict(
                line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines()
            )
            used -= int(stat.get(idle, 0))
        except (OSError, ValueError):  # there is none, or "max": no limit
            continue
        if most < total:
            free, total = min(free, max(0, most - used)), most
    return free, total
