"""Checks of this machine: Python and its packages, devices, memory, processes."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from argus.config import Settings
from argus.core.family import UPSTREAM, Family
from argus.core.machine import cores
from argus.core.profile import Profile
from argus.server.doctor.finding import Finding, ok, problem, sized, warning

START_S = 20.0  # for a process
GPUS = "nvidia[0-9]*"  # in /dev
FEW_FILES = 1024


def python(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """Python, and the packages that the settings need."""
    needed = {"torch": "engine", "diffusers": "engine", "fastapi": "serve", "highspy": "serve"}
    if settings.workers == "ray":
        needed["ray"] = "ray"
    if (settings.cache_catalogue or "").startswith("postgres"):
        needed["psycopg"] = "postgres"
    if (settings.cache_latents or "").startswith("s3"):
        needed["s3fs"] = "s3"
    if settings.otlp_endpoint is not None:
        needed["opentelemetry.sdk"] = "otel"
    lacking = 0
    for package, extra in needed.items():
        try:
            import_module(package)
        except ImportError as error:
            lacking += 1
            advice = f"pip install 'argus-t2i[{extra}]'"
            yield problem("python", f"{package} cannot be imported: {error}", advice)
    if not lacking:
        versions = [f"{name} {metadata.version(name)}" for name in ("torch", "diffusers")]
        yield ok("python", f"Python {platform.python_version()}, {', '.join(versions)}")
    yield from _open_files()


def _open_files() -> Iterator[Finding]:
    if sys.platform == "win32":
        return
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= most <= FEW_FILES:
        yield warning(
            "python", f"this process may open {most} files, connections included",
            "Raise it for a server with many clients: ulimit -n 65536, or LimitNOFILE in systemd.",
        )  # fmt: skip


def device(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """The device of this machine's workers."""
    import torch

    from argus.engine.sources import settled

    if not runs_here(settings, family):
        yield ok("device", "no worker runs on this machine")
        return
    where, dtype = settled(settings.device, settings.dtype)
    if where.startswith("cuda"):
        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
        yield ok("device", f"{count} GPU: {names}, {dtype}")
        workers = settings.workers if isinstance(settings.workers, int) else None
        if workers is not None and workers < count and ":" not in where:
            yield warning(
                "device", f"{workers} workers leave {count - workers} GPUs unused",
                "Leave `workers` out: there is one a GPU then.",
            )  # fmt: skip
        return
    yield ok("device", f"CPU with {cores()} cores, {dtype}")
    if settings.device is None and any(Path("/dev").glob(GPUS)):
        yield warning(
            "device", "this machine has an NVIDIA GPU that torch cannot use",
            "Install a torch build for CUDA, and see that nvidia-smi shows the GPU.",
        )  # fmt: skip
    if family is not None and not family.bundled:
        yield warning(
            "device", f"{family.name} runs on a CPU: a picture may take minutes",
            "Serve it from a machine with a GPU, from upstreams, or from a Ray cluster.",
        )  # fmt: skip


def memory(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """The memory of the device against what the family's models take, as the profile says."""
    import torch

    from argus.engine.memory import free_and_total
    from argus.engine.sources import settled
    from argus.server.model import CPU_WORKERS
    from argus.server.upstreams import own_models

    if family is None or not runs_here(settings, family):
        return
    where, _ = settled(settings.device, settings.dtype)
    cuda = where.startswith("cuda")
    free, total = free_and_total(torch.device(where))
    if cuda:
        what, workers = "GPU", 1
    else:
        usual = 1 if len(own_models(family)) == 1 else CPU_WORKERS
        what, workers = "memory", settings.workers if isinstance(settings.workers, int) else usual
    needs = _needs(settings, family, cuda)
    has = f"{sized(free)} of {sized(total)} of the {what} are free"
    if not needs:
        yield warning(
            "memory", f"{has}; how much the models take was not measured",
            "`argus profile` measures it. A model that does not fit is said when it is loaded.",
        )  # fmt: skip
        return
    largest = max(needs, key=lambda name: needs[name])
    takes = workers * needs[largest]
    each = f"{workers} workers with {largest}" if workers > 1 else largest
    says = f"{has}; {each} took {sized(takes)} at most when they were profiled"
    if takes > total:
        yield problem(
            "memory", says,
            "Leave the model out of the family's file, set fewer workers, or dtype: float16.",
        )  # fmt: skip
    elif takes > free:
        yield warning("memory", says, "End what else uses it, or set a smaller max_batch.")
    else:
        yield ok("memory", says)


def _needs(settings: Settings, family: Family, cuda: bool) -> dict[str, int]:
    """Peak bytes of each model by the profile in force; nothing without one for the device."""
    from argus.server.model import PROFILE, profile_of
    from argus.server.upstreams import own_models

    file = settings.profile or Path(family.folder) / PROFILE
    if not file.is_file():
        return {}
    profile: Profile | None = profile_of(
        settings.profile, family, "cuda" if cuda else "cpu", own_models(family)
    )
    return {} if profile is None else {m: one.peak_bytes for m, one in profile.models.items()}


def processes(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """Whether processes can be started as those of workers are."""
    if not runs_here(settings, family):
        return
    import multiprocessing

    from argus.engine.sources import settled
    from argus.workers import forking

    where, _ = settled(settings.device, settings.dtype)
    method = forking.method(where)
    # without what the server preloads, which takes seconds
    context = forking.spawning() if method == "spawn" else multiprocessing.get_context(method)
    process = context.Process(target=os.getpid, daemon=True)
    process.start()
    process.join(START_S)
    if process.exitcode == 0:
        yield ok("processes", f"worker processes start ({method})")
        return
    process.kill()
    yield problem(
        "processes",
        f"a process started by {method} ends with {process.exitcode}",
        "See that /tmp and /dev/shm can be written, and `ulimit -u` allows more processes.",
    )


def runs_here(settings: Settings, family: Family | None) -> bool:
    """Whether workers run on this machine."""
    here = family is None or any(
        family.models[one.model] != UPSTREAM for one in family.variants.values()
    )
    return here and settings.workers != "ray"
