"""`argus profile`: measures the times of a family's models on this machine."""

from __future__ import annotations

import io
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from argus.core.errors import ArgusError, BadRequest, ModelError, NotEnoughMemory
from argus.core.family import Family, Variant
from argus.core.job import Job
from argus.core.machine import cores
from argus.core.profile import ModelProfile, Profile
from argus.engine.engine import Engine, Result
from argus.engine.memory import memory_errors
from argus.engine.sources import default_dtype, fingerprint, model_folder, portable

if TYPE_CHECKING:
    from argus.workers.ray import RayCluster

BATCHES = (1, 2, 4, 8, 16, 32)
WARM_UP, REPEATS, ROUNDS = 2, 9, 2
PROMPT = "a picture of two small things, one above the other"


def profile(
    family: Family,
    device: str,
    dtype: str,
    batches: Collection[int] = BATCHES,
    repeats: int = REPEATS,
    workers: int = 1,
    on_model: Callable[[str], None] = lambda name: None,
    rounds: int = ROUNDS,
    threads: int | None = None,
) -> Profile:
    """Measure every model of a family, each in a process of its own, one after the other, and all
    of them again in every round: the least time counts, since other processes only add to it.

    With several `workers`, as many processes measure side by side, each with its share of the CPU's
    cores, as a server's workers on one CPU; their means count. A single one has `threads` (None:
    torch's default). `on_model` is called with the model that comes next. Raises what loading a
    model raises.
    """
    folders = {name: model_folder(source) for name, source in family.models.items()}
    measured: dict[str, list[ModelProfile]] = {name: [] for name in family.models}
    if workers > 1:
        threads = max(1, cores() // workers)
    for _ in range(rounds):
        for name in family.models:
            on_model(name)
            variant = next((v for v in family.variants.values() if v.model == name), family.exact)
            asked = (str(folders[name]), variant, device, dtype, tuple(batches), repeats, threads)
            with ThreadPoolExecutor(workers) as together:
                side_by_side = list(together.map(_in_a_process, [asked] * workers))
            measured[name].append(_combined(side_by_side, statistics.fmean))
    models = {name: _combined(found, min) for name, found in measured.items()}
    weights = {name: fingerprint(folder) for name, folder in folders.items()}
    exact, where = family.exact, describe(device, dtype)
    if threads is not None:
        where |= {"threads": threads}
    if workers > 1:
        where |= {"side_by_side": workers}
    return Profile(family.name, where, exact.width, exact.height, weights, models)


def profile_on(
    cluster: RayCluster,
    name: str,
    family: Family,
    dtype: str | None = None,
    batches: Collection[int] = BATCHES,
    repeats: int = REPEATS,
    rounds: int = ROUNDS,
) -> Profile:
    """As `profile`, on a node of the cluster's type `name`, with what a worker takes of it.

    Raises BadRequest for a type that the cluster does not have or has no node for.
    """
    if name not in cluster.types:
        raise BadRequest(
            f"The cluster has no type {name!r}; its types are {', '.join(cluster.types)}."
        )
    kind = list(cluster.types).index(name)
    there = {model: portable(source) for model, source in family.models.items()}
    device = cluster.device(kind)
    arguments = (
        replace(family, models=there), device, dtype or default_dtype(device), tuple(batches),
        repeats, rounds, cluster.threads(kind),
    )  # fmt: skip
    measured: Profile = cluster.run(kind, _profile_here, *arguments)
    return replace(measured, device={**measured.device, "type": name})


def _profile_here(
    family: Family,
    device: str,
    dtype: str,
    batches: Collection[int],
    repeats: int,
    rounds: int,
    threads: int | None,
) -> Profile:
    return profile(family, device, dtype, batches, repeats, rounds=rounds, threads=threads)


def describe(device: str, dtype: str) -> dict[str, Any]:
    """The device and the software of a measurement."""
    cuda = device.startswith("cuda")
    return {
        "name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else io.StringIO() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


Asked = tuple[str, Variant, str, str, tuple[int, ...], int, int | None]


def _combined(measured: Sequence[ModelProfile], of: Callable[[list[float]], float]) -> ModelProfile:
    """Several measurements of a model as one, with the batch sizes that all of them have."""

    def over(name: str) -> dict[Any, float]:
        dicts = [getattr(one, name) for one in measured]
        keys = [key for key in dicts[0] if all(key in one for one in dicts)]
        return {key: of([one[key] for one in dicts]) for key in keys}

    return ModelProfile(
        step_s=over("step_s"),
        decode_s=over("decode_s"),
        encode_s=of([one.encode_s for one in measured]),
        picture_s=of([one.picture_s for one in measured]),
        load_s=over("load_s"),
        peak_bytes=max(one.peak_bytes for one in measured),
    )


def _in_a_process(asked: Asked) -> ModelProfile:
    """`measure` in a new process, so that the peak of memory is this model's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_and_send, args=(theirs, asked))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise ModelError(
            f"Measuring {asked[0]} ended without a result (exit code {process.exitcode})."
        ) from None
    process.join()
    if isinstance(answer, Exception):
        raise answer
    result: ModelProfile = answer
    return result


def _measure_and_send(pipe: Any, asked: Asked) -> None:
    try:
        pipe.send(measure(*asked))
    except ArgusError as error:
        pipe.send(error)


def measure(
    folder: str,
    variant: Variant,
    device: str,
    dtype: str,
    batches: tuple[int, ...],
    repeats: int,
    threads: int | None = None,
) -> ModelProfile:
    """Measure one model with a variant's sampler, size and guidance. Medians of `repeats`.

    Batches that do not fit into memory are left out.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    engine = Engine.load(folder, device, dtype, variant.sampler)  # so that no import is timed below
    load_s = {}
    for name in ("disk", "page_cache"):
        del engine
        if name == "disk":
            _forget_pages(Path(folder))
        begun = time.perf_counter()
        engine = Engine.load(folder, device, dtype, variant.sampler)
        load_s[name] = time.perf_counter() - begun
    step_s, decode_s = {}, {}
    for batch in sorted(batches):
        try:
            step_s[batch], decode_s[batch] = _times(engine, variant, batch, repeats)
        except NotEnoughMemory:
            break
    if not step_s:
        raise NotEnoughMemory(f"{folder} has no room for a single picture on {device}.")
    return ModelProfile(
        step_s=step_s,
        decode_s=decode_s,
        encode_s=_encode_s(engine, variant, repeats),
        picture_s=_picture_s(engine, variant, repeats),
        load_s=load_s,
        peak_bytes=_peak_bytes(device),
    )


def _times(engine: Engine, variant: Variant, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a step and of decoding, for `batch` pictures."""
    steps = WARM_UP + repeats
    engine.max_batch = batch
    for seed in range(batch):
        engine.admit(_job(variant, seed, steps + 1))
    engine.fill()
    seconds = []
    for _ in range(steps):
        begun = engine.now()
        outcomes = engine.step()
        seconds.append(engine.now() - begun)
        for _, outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
    outcomes = engine.step()
    latents = [outcome.final for _, outcome in outcomes if isinstance(outcome, Result)]
    if engine.max_batch < batch or len(latents) < batch:
        _drain(engine)
        raise NotEnoughMemory(f"{batch} pictures do not fit.")
    return statistics.median(seconds[WARM_UP:]), _decode_s(engine, latents, repeats)


@torch.inference_mode()
def _decode_s(engine: Engine, latents: Sequence[Tensor], repeats: int) -> float:
    """Median seconds of decoding all the latents, at once or, if they do not fit, in halves."""
    try:
        with memory_errors(engine.pipeline.unet.device):
            return _median(lambda: engine.decoder.decode(latents), engine, repeats)
    except NotEnoughMemory:
        half = len(latents) // 2
        if not half:
            raise
    return sum(_decode_s(engine, some, repeats) for some in (latents[:half], latents[half:]))


def _job(variant: Variant, seed: int, steps: int) -> Job:
    return replace(variant, steps=steps, skip=0).job(PROMPT, seed)


def _drain(engine: Engine) -> None:
    for ticket in engine.in_flight:
        engine.cancel(ticket)


def _encode_s(engine: Engine, variant: Variant, repeats: int) -> float:
    numbers = iter(range(1000 * repeats))

    def encode() -> None:
        engine.admit(Job(f"{PROMPT} {next(numbers)}", steps=2, guidance=variant.guidance))
        engine.fill()
        _drain(engine)

    return _median(encode, engine, repeats)


def _picture_s(engine: Engine, variant: Variant, repeats: int) -> float:
    image = engine.run(_job(variant, 0, 2)).image
    return _median(lambda: image.save(io.BytesIO(), "PNG"), engine, repeats)


def _median(work: Callable[[], object], engine: Engine, repeats: int) -> float:
    seconds = []
    for _ in range(WARM_UP + repeats):
        begun = engine.now()
        work()
        seconds.append(engine.now() - begun)
    return statistics.median(seconds[WARM_UP:])


def _forget_pages(folder: Path) -> None:
    """Drop the folder's files from the page cache, where the system can do that."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with _opened(path) as number:
                os.fsync(number)
                os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
