"""Does a real server hold its promise through a burst, and did the simulator predict it?

    python benchmarks/serving.py [--policies price,clipper-ha] [--pairs 5] [--out DIR] [--json]

For each policy a real server (`argus serve`, two workers) gets the same requests at the same
moments: prompts of the workload generator, a trace whose height is `--peak` times what the server
can carry of exact pictures (the most that `clipper-ha` answers in time at any of a few loads),
compressed in time. The client is open-loop: it waits for nobody, tries
nothing twice, and accounts for every request. All begin with the same cache, warmed with prompts
from before. The profile is measured first, with as many processes side by side as there are
workers. Afterwards every picture is scored beside the exact one of the same prompt and seed;
quality is 1 + (s - s_exact) / mean(s_exact - s0). `simulated` is the same arrivals on the virtual
cluster, with the measured profile and with what the predictor says of the same prompts for truth.
Server and client compute on the same cores as the workers, which a profile does not know: the
simulation's workers are at every moment as much slower as the server saw its own (`slowness`).

With `--pairs`, `price` and `price-blind` get so many more bursts, both the same, first in turn;
told is the mean difference in the burst, with its 95 % interval by Student's t. With `--cores`
every server and its client have so many cores, and as many pairs as there are cores for run side by
side; profile and capacity are measured while the others are idle.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import httpx
import numpy as np
import openai
import pandas as pd
import psutil
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import t

from argus.control.policies import new_policy
from argus.control.policy import Slo
from argus.control.variants import EXACT, DeviceType, Numbers, VariantTable, variant_table
from argus.core import machine
from argus.core.family import Family
from argus.core.profile import Profile
from argus.engine.engine import Engine
from argus.engine.sources import family_fingerprint, model_folder
from argus.families.catalog import default_family
from argus.lab.painting import Commission, paint
from argus.lab.prompts import ideas_of
from argus.lab.workload import workload
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor
from argus.quality.scorers import load_scorer
from argus.server.preparation import OTHERS
from argus.server.slo import MARGIN
from argus.simulator.cluster import Setup, Simulation
from argus.simulator.report import HIGH, Figures, figures
from argus.simulator.requests import DROPPED, FAILED, LATE, ON_TIME, SHED, Requests
from argus.simulator.requests import OUTCOMES as OUTCOME_NAMES
from argus.simulator.traces import arrivals, rates_of
from argus.simulator.world import Drawing, Neighbourhood, Store, World

POLICIES = "price,price-blind,argus,proteus,nirvana,clipper-ht,clipper-ha"
COMMAND = [sys.executable, "-c", "from argus.cli.main import main; main()"]
EXCERPT = slice(130, 290)  # of the bursty trace, minutes: a burst with its flanks
OUTCOMES = {429: SHED, 504: DROPPED}
GIVE_UP_S = 60.0
WATCH_S = 1.0
TWINS = ("price", "price-blind")
PAIRED = ("effective_quality", "quality", "violation_ratio", "throughput_qpm")
LOADS, LOAD_S = (0.4, 0.5, 0.6, 0.7), 15.0  # tried for what exact can carry


def main(
    policies: Annotated[str, typer.Option(help="Parted by commas.")] = POLICIES,
    out: Annotated[Path, typer.Option(help="Folder for servers' data and results.")] = Path(
        "serving"
    ),
    workers: Annotated[int, typer.Option(help="Workers of the server.")] = 2,
    peak: Annotated[float, typer.Option(help="Height of the burst, in exact capacities.")] = 3.5,
    capacity: Annotated[
        float | None, typer.Option(help="Exact pictures a second it carries; else measured.")
    ] = None,
    slo: Annotated[
        float, typer.Option(help="Deadline, times an exact picture alone by the profile.")
    ] = 5.0,
    seconds: Annotated[float, typer.Option(help="Seconds for the trace.")] = 120.0,
    window: Annotated[float, typer.Option(help="Seconds between plans.")] = 2.0,
    warm: Annotated[int, typer.Option(help="Prompts in the cache at the beginning.")] = 400,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and pictures.")] = 0,
    pairs: Annotated[int, typer.Option(help="Bursts for price and its blind twin in turn.")] = 0,
    cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of a server and its client; else all.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw what happened.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    slots = [] if cores is None else slots_of(cores)
    if slots:
        os.sched_setaffinity(0, slots[0])
    family = default_family()
    profile = measured_profile(family, profile_in(out, workers), workers)
    table = variant_table(family, [DeviceType.of(profile)])
    bench = Bench(family, table, out, workers, slo, window)
    names = [name for name in policies.split(",") if name]
    ideal = workers / float(table.cost_s(slo * table.slo_s)[EXACT].min())
    if capacity is None:
        warmed = warmed_cache(family, out, earlier_of(family, seed, warm))
        capacity = carried(bench.settings("clipper-ha"), warmed, ideal, family)
    print(
        f"Exact pictures are carried at {capacity:.1f} a second, by profile at {ideal:.1f}; at the "
        f"height come {peak * capacity:.1f}"
    )
    result: dict[str, Any] = {}
    if names:
        load = load_of(family, seed, warm, peak * capacity, seconds)
        runs = bench.compared(names, load, seconds, result)
        if figure is not None:
            draw(runs, table, load.rates, load.second, figure)
            print(f"wrote {figure}")
    if pairs and slots:
        same = {"workers": workers, "peak": peak, "capacity": capacity, "slo": slo}
        same |= {"seconds": seconds, "window": window, "warm": warm}
        found = side_by_side(slots, range(seed, seed + pairs), out, workers, same)
    else:
        found = [
            bench.pair(load_of(family, one + 1, warm, peak * capacity, seconds), one % 2 == 0)
            for one in range(seed, seed + pairs)
        ]
    if pairs:
        result["pairs"] = found
    if pairs > 1:
        result["paired"] = {" - ".join(TWINS): differences(found)}
        print(result["paired"])
    if as_json:
        print(json.dumps(result))


@dataclass(frozen=True)
class Bench:
    """Servers of one kind, under bursts: so many `workers`, a deadline of `slo` times an exact
    picture alone by the table, a plan every `window` seconds."""

    family: Family
    table: VariantTable
    out: Path
    workers: int
    slo: float
    window: float

    def settings(self, policy: str) -> Path:
        file = self.out / f"{policy}.yaml"
        latency_s = self.slo * self.table.slo_s
        file.write_text(
            json.dumps(configured(self.out, policy, self.workers, latency_s, self.window))
        )
        return file

    def served(self, policy: str, load: Load) -> Replayed:
        warmed = warmed_cache(self.family, self.out, load.earlier)
        done = asyncio.run(replay(self.settings(policy), warmed, load.arrived_s, load.asked))
        print(f"{policy:12}", done.summary, flush=True)
        return done

    def compared(
        self, names: list[str], load: Load, seconds: float, result: dict[str, Any]
    ) -> dict[str, Requests]:
        """Have each policy serve the load, and put its figures into `result`; its requests."""
        print(f"{len(load.asked):,} requests in {seconds:g} s")
        served = {name: self.served(name, load) for name in names}
        scores = Scores(self.family, load.asked)
        runs = {name: one.requests(self.table, scores) for name, one in served.items()}
        world = world_of(self.family, self.table, load.earlier, load.asked, self.slo)
        parts = {
            "": (np.ones(len(load.asked), dtype=bool), seconds),
            "high_load": (load.high, load.high_s),
        }
        for name, requests in runs.items():
            simulated = simulation_of(world, name, self.workers, served[name], self.window)
            mine: dict[str, Any] = {"simulated": {}}
            for part, (chosen, spent_s) in parts.items():
                live = shown(figures(requests, chosen, spent_s / 60))
                predicted = shown(figures(simulated, chosen, spent_s / 60))
                if part:
                    mine[part], mine["simulated"][part] = live, predicted
                else:
                    mine |= live
                    mine["simulated"] |= predicted
            served[name].table(requests, simulated).to_parquet(
                self.out / f"requests-{name}.parquet"
            )
            mine["lost"] = int(served[name].lost)
            mine["loads"] = served[name].loads
            result[name] = mine
        print_table(result)
        return runs

    def pair(self, load: Load, informed_first: bool) -> dict[str, dict[str, float]]:
        """What both twins did in the burst, by name."""
        scores = Scores(self.family, load.asked)
        both = {name: self.served(name, load) for name in TWINS[:: 1 if informed_first else -1]}
        found = {name: in_burst(both[name], self.table, scores, load) for name in TWINS}
        print("in the burst:", json.dumps(found), flush=True)
        return found


def slots_of(cores: int) -> list[list[int]]:
    """The cores that this process may use, so many to a slot."""
    every = sorted(os.sched_getaffinity(0))
    slots = [every[i : i + cores] for i in range(0, len(every) - cores + 1, cores)]
    if not slots:
        raise typer.BadParameter(f"This machine has {len(every)} cores.")
    return slots


def side_by_side(
    slots: list[list[int]], seeds: range, out: Path, workers: int, same: dict[str, Any]
) -> list[dict[str, dict[str, float]]]:
    """A pair for every seed, each in a process of its own on the cores of a slot."""
    free: SimpleQueue[list[int]] = SimpleQueue()
    for slot in slots:
        free.put(slot)

    def one(seed: int) -> dict[str, dict[str, float]]:
        slot = free.get()
        own = out / f"pair-{seed}"
        own.mkdir(exist_ok=True)
        shutil.copy(profile_in(out, workers), profile_in(own, workers))
        mine = same | {"policies": "", "pairs": 1, "seed": seed, "out": own}
        options = [word for name, value in mine.items() for word in (f"--{name}", str(value))]
        on_slot = ["taskset", "--cpu-list", ",".join(map(str, slot))]
        done = subprocess.run(
            [*on_slot, sys.executable, __file__, *options, "--json"],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        free.put(slot)
        print(done.stdout, flush=True)
        done.check_returncode()
        found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])["pairs"][0]
        return found

    with ThreadPoolExecutor(len(slots)) as pool:
        return list(pool.map(one, seeds))


@dataclass(frozen=True)
class Load:
    """Requests for a server: the `earlier` prompts that its cache holds, the prompts that are
    `asked` at `arrived_s`, and which of them come in the burst (`high`), which lasts `high_s`.
    `rates` are those meant, a second, for every minute of the trace, which becomes `second`
    seconds."""

    earlier: list[str]
    asked: list[str]
    arrived_s: Numbers
    rates: Numbers
    second: float
    high: NDArray[np.bool_]
    high_s: float


def load_of(family: Family, seed: int, warm: int, peak_rate: float, seconds: float) -> Load:
    """The bursty trace in so many seconds, `peak_rate` a second high."""
    shape = rates_of("bursty")[EXCERPT]
    rates = peak_rate * shape / shape.max()
    second = seconds / len(shape)
    a_minute = arrivals(rates * second, np.random.default_rng(seed))
    arrived_s = a_minute * second / 60
    made = islice(workload(ideas_of(family), seed), warm + len(arrived_s))
    prompts = [one.prompt for one in made]
    high = shape >= HIGH * shape.max()
    at = np.minimum(len(shape) - 1, (arrived_s // second).astype(int))
    return Load(
        prompts[:warm], prompts[warm:], arrived_s, rates, second, high[at], high.sum() * second
    )


def earlier_of(family: Family, seed: int, warm: int) -> list[str]:
    """The prompts that the caches of `load_of` hold."""
    return [one.prompt for one in islice(workload(ideas_of(family), seed), warm)]


def in_burst(done: Replayed, table: VariantTable, scores: Scores, load: Load) -> dict[str, float]:
    """What a server did in the burst, and how many requests it lost in all."""
    told = shown(figures(done.requests(table, scores), load.high, load.high_s / 60))
    return {name: told[name] for name in PAIRED} | {"lost": float(done.lost)}


def differences(pairs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of every figure the mean difference of the twins over pairs, with its 95 % interval, and the
    twins' own means."""
    result = {}
    for name in (*PAIRED, "lost"):
        each = np.array([[one[twin][name] for twin in TWINS] for one in pairs])
        apart = each[:, 0] - each[:, 1]
        reach = float(t.ppf(0.975, len(pairs) - 1)) * float(apart.std(ddof=1)) / len(pairs) ** 0.5
        mean = float(apart.mean())
        own = dict(zip(TWINS, each.mean(axis=0).tolist(), strict=True))
        result[name] = {"mean": mean, "low": mean - reach, "high": mean + reach, **own}
    return result


def profile_in(out: Path, workers: int) -> Path:
    """Where the profile of so many workers is kept, on the cores that this process may use."""
    return out / f"profile-{workers}-on-{machine.cores()}.json"


def measured_profile(family: Family, file: Path, workers: int) -> Profile:
    """What `argus profile` measures with so many workers side by side, unless it did before."""
    if not file.exists():
        subprocess.run(
            [*COMMAND, "profile", family.name, "--workers", str(workers), "--out", str(file)],
            check=True,
        )
    return Profile.read(file)


def configured(
    out: Path, policy: str, workers: int, latency_s: float, window: float
) -> dict[str, Any]:
    """A server's settings. The deadline is in seconds, the same for all: a server that starts
    measures its own exact picture, and finds another one each time."""
    return {
        "policy": policy,
        "workers": workers,
        "port": 0,
        "data": str((out / f"data-{policy}").absolute()),
        "profile": str(profile_in(out, workers).absolute()),
        "slo": {"default": {"latency": f"{latency_s:.3f}s"}},
        "window_s": window,
        "queue_limit": 1000,
        "truth_share": 0,
    }


def warmed_cache(family: Family, out: Path, prompts: list[str]) -> Path:
    """A data folder whose cache holds the latents of earlier prompts."""
    name = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]
    folder = out / f"warm-{name}"
    if not folder.exists():
        written = out / "earlier.txt"
        written.write_text("\n".join(dict.fromkeys(prompts)) + "\n")
        data = ["--data", str(folder)]
        subprocess.run([*COMMAND, "cache", "warm", str(written), *data], check=True)
    return folder


def carried(settings: Path, warmed: Path, ideal: float, family: Family) -> float:
    """The most exact pictures a second that the server answers in time, at a few constant loads."""
    best = 0.0
    for share in LOADS:
        count = int(share * ideal * LOAD_S)
        prompts = [one.prompt for one in islice(workload(ideas_of(family), 99), count)]
        arrived_s = np.sort(np.random.default_rng(99).random(count) * LOAD_S)
        done = asyncio.run(replay(settings, warmed, arrived_s, prompts))
        best = max(best, done.outcome.count(ON_TIME) / LOAD_S)
    return best


class Replayed:
    """What a server did with the requests: by request when it ended, how, and its picture."""

    def __init__(self, count: int, arrived_s: Numbers) -> None:
        self.arrived_s = arrived_s
        self.outcome = [FAILED] * count
        self.ended_s = np.full(count, np.nan)
        self.variant = [""] * count
        self.told: list[dict[str, Any]] = [{} for _ in range(count)]
        self.pictures: list[bytes | None] = [None] * count
        self.lost = count
        self.loads = 0
        self.slowness: list[tuple[float, float]] = []  # from which second on, how slow
        self.deadline_s = float("nan")
        self.summary = self.metrics = ""

    def requests(self, table: VariantTable, scores: Scores) -> Requests:
        count = len(self.outcome)
        requests = Requests.new(self.arrived_s, np.arange(count), np.zeros(count, dtype=np.int64))
        requests.outcome[:] = self.outcome
        requests.ended_s[:] = self.ended_s
        for i, variant in enumerate(self.variant):
            requests.variant[i] = table.variants.index(variant) if variant else -1
        requests.quality[:] = scores.quality(self.pictures)
        return requests

    def table(self, requests: Requests, simulated: Requests) -> pd.DataFrame:
        """What became of every request, here and in the simulation."""
        return pd.DataFrame(
            {
                "arrived_s": self.arrived_s,
                "ended_s": self.ended_s,
                "outcome": [OUTCOME_NAMES[code] for code in self.outcome],
                "variant": self.variant,
                "quality": requests.quality,
                "predicted": [told.get("predicted_quality") for told in self.told],
                "similarity": [told.get("similarity") for told in self.told],
                "slowness": np.interp(self.arrived_s, *np.transpose(self.slowness)),
                "worker": [told.get("worker") for told in self.told],
                **{
                    f"{stage}_ms": [told.get("timings_ms", {}).get(stage) for told in self.told]
                    for stage in ("queue", "encode", "retrieve", "denoise", "decode")
                },
                "simulated": [OUTCOME_NAMES[code] for code in simulated.outcome],
            }
        )


async def replay(settings: Path, warmed: Path, arrived_s: Numbers, prompts: list[str]) -> Replayed:
    """Send every request at its moment to a server with these settings, whose data folder begins as
    a copy of `warmed`."""
    data = Path(json.loads(settings.read_text())["data"])
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(warmed, data)
    done = Replayed(len(prompts), arrived_s)
    with running(settings) as (url, process):
        await asyncio.to_thread(until_ready, url)
        client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=GIVE_UP_S
        )
        await client.images.generate(prompt="a first one, to warm up", extra_body=OPTED_OUT)
        done.slowness.append((0.0, metric(url, "argus_slowness")))
        begun = time.perf_counter()

        async def watch() -> None:
            while True:
                with suppress(httpx.HTTPError):  # a busy server may not answer
                    seen = await asyncio.to_thread(metric, url, "argus_slowness")
                    done.slowness.append((time.perf_counter() - begun, seen))
                await asyncio.sleep(WATCH_S)

        async def one(number: int) -> None:
            await asyncio.sleep(max(0.0, begun + arrived_s[number] - time.perf_counter()))
            sent = time.perf_counter()
            try:
                answer = await client.images.generate(
                    prompt=prompts[number], extra_body={"seed": number}
                )
            except openai.APIStatusError as error:
                done.outcome[number] = OUTCOMES.get(error.status_code, FAILED)
                done.lost -= 1
            except openai.APIError:
                done.outcome[number] = FAILED
            else:
                told = (answer.model_extra or {})["argus"][0]
                done.deadline_s = told["deadline_ms"] / 1000
                took_s = time.perf_counter() - sent
                done.outcome[number] = ON_TIME if took_s <= done.deadline_s else LATE
                done.variant[number] = told["variant"]
                done.told[number] = told
                done.pictures[number] = base64.b64decode((answer.data or [])[0].b64_json or "")
                done.lost -= 1
            done.ended_s[number] = arrived_s[number] + time.perf_counter() - sent

        cpu = cpu_s(process.pid), time.process_time()
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one(number) for number in range(len(prompts))))
        watching.cancel()
        await client.close()
        server_s, client_s = cpu_s(process.pid) - cpu[0], time.process_time() - cpu[1]
        done.loads = int(metric(url, "argus_model_loads_total"))
        done.metrics = httpx.get(f"{url}/metrics").text
        counts = {name: done.outcome.count(code) for code, name in enumerate(OUTCOME_NAMES)}
        done.summary = (
            f"{counts}, {done.loads} loads, deadline {done.deadline_s:.2f} s, slowness up to "
            f"{max(seen for _, seen in done.slowness):.2f}; CPU a request: server "
            f"{1000 * server_s / len(prompts):.1f} ms, client "
            f"{1000 * client_s / len(prompts):.1f} ms"
        )
    return done


OPTED_OUT = {"argus": {"cache": False}}


@contextmanager
def running(settings: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    log = settings.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--config", str(settings)], stderr=file, text=True
        )
    try:
        while "Serving on" not in log.read_text():
            if process.poll() is not None:
                raise SystemExit(f"The server ended: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        line = next(line for line in log.read_text().splitlines() if "Serving on" in line)
        yield line.split()[-1], process
    finally:
        process.terminate()
        process.wait()


def until_ready(url: str) -> None:
    while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.2)


def metric(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.split(" ")[0] == name:
            return float(line.split(" ")[1])
    return float("nan")


def cpu_s(pid: int) -> float:
    """CPU seconds of the server's own process, without its workers'."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


class Scores:
    """Judges pictures beside the exact ones of the same prompts and seeds, made on demand."""

    def __init__(self, family: Family, prompts: list[str]) -> None:
        self._family, self._prompts = family, prompts
        assert family.scorer is not None and family.scorer.unrelated is not None
        self._scorer, self._unrelated = load_scorer(family.scorer), family.scorer.unrelated
        self._exact: Numbers | None = None

    def quality(self, pictures: list[bytes | None]) -> Numbers:
        """Quality (n,) of the pictures, 0 where there is none."""
        exact = self._exact_scores()
        result = np.zeros(len(pictures))
        chosen = [i for i, one in enumerate(pictures) if one is not None]
        images = [Image.open(io.BytesIO(pictures[i] or b"")).convert("RGB") for i in chosen]
        scores = self._scorer.score([self._prompts[i] for i in chosen], images)
        gained = float((exact - self._unrelated).mean())
        result[chosen] = 1 + (scores - exact[chosen]) / gained
        return result

    def _exact_scores(self) -> Numbers:
        if self._exact is None:
            exact = self._family.exact
            engine = Engine.load(
                str(model_folder(self._family.models[exact.model])), sampler=exact.sampler
            )
            jobs = (Commission(i, exact.job(p, i)) for i, p in enumerate(self._prompts))
            images: dict[int, Image.Image] = {}
            for one, made in track(
                paint(engine, jobs), "Exact pictures", len(self._prompts), transient=True
            ):
                images[one.of] = made.image
            ordered = [images[i] for i in range(len(self._prompts))]
            self._exact = np.asarray(self._scorer.score(self._prompts, ordered), float)
        return self._exact


def world_of(
    family: Family, table: VariantTable, earlier: list[str], asked: list[str], slo: float
) -> World:
    """The requests as a world: what the predictor says of each, beside the nearest of what is then
    cached, is the truth."""
    predictor = Predictor.load(Path(family.folder) / "predictor", family_fingerprint(family))
    encoder = PromptEncoder.load(model_folder(family.models[family.exact.model]))
    vectors = np.stack([encoder.embed(text).vector for text in [*earlier, *asked]]).astype(float)
    order = [predictor.variants.index(name) for name in table.variants]

    def worth(vector: Numbers, near: Numbers) -> Numbers:
        others = near if len(near) else np.full((1, len(vector)), np.nan)
        own = np.broadcast_to(vector, others.shape).astype(np.float32)
        mean, _ = predictor.predict_all(own, others.astype(np.float32))
        return np.nan_to_num(mean[:, order]).astype(float)

    unknown = np.zeros((len(asked), len(order)))
    return World(
        name="live",
        table=replace(table, mean_quality=predictor.usual[order].astype(float)),
        truth=unknown,
        predicted=unknown,
        similarity=np.full(len(asked), np.nan),
        drawing=Drawing(0.0, 1, 1),
        store=Store(0.004, 3.0),
        judging_error=0.1,
        slo=slo,
        sources={},
        neighbourhood=Neighbourhood(
            vectors[len(earlier) :], vectors[: len(earlier)], worth, 1 + OTHERS
        ),
    )


def simulation_of(
    world: World, policy: str, workers: int, live: Replayed, window: float
) -> Requests:
    """The same requests on the virtual cluster, whose workers are as slow as the real ones were."""
    count = len(live.arrived_s)
    requests = Requests.new(live.arrived_s, np.arange(count), np.full(count, -1))

    def slow(factor: float) -> Callable[[Simulation], None]:
        def happen(simulation: Simulation) -> None:
            for number in range(workers):
                simulation.slow(number, factor)

        return happen

    setup = Setup(
        Slo(live.deadline_s),
        (0,) * workers,
        events=[(at, slow(factor)) for at, factor in live.slowness],
        window_s=window,
        margin=MARGIN,
        at_hand=True,
    )
    chosen = new_policy(policy, world.table, setup.slos(1.0))
    return Simulation(world, chosen, requests, setup).run()


def shown(one: Figures) -> dict[str, Any]:
    return {
        "throughput_qpm": one.throughput_qpm,
        "violation_ratio": one.violation_ratio,
        "quality": one.quality,
        "effective_quality": one.effective_quality,
        "p50_s": one.p50_s,
        "p99_s": one.p99_s,
        "requests": sum(one.outcomes.values()),
        "outcomes": one.outcomes,
    }


def print_table(result: dict[str, dict[str, Any]]) -> None:
    titles = ("on time /min", "violations", "quality", "effective", "p50", "p99")
    table = Table("policy, in the burst", *titles, "lost", "loads")
    for name, whole in result.items():
        for label, one in (
            (name, whole["high_load"]),
            ("  simulated", whole["simulated"]["high_load"]),
        ):
            live = label == name
            table.add_row(
                label,
                f"{one['throughput_qpm']:.0f}",
                f"{100 * one['violation_ratio']:.1f} %",
                f"{one['quality']:.3f}",
                f"{one['effective_quality']:.3f}",
                f"{one['p50_s']:.2f} s",
                f"{one['p99_s']:.2f} s",
                str(whole["lost"]) if live else "",
                str(whole["loads"]) if live else "",
            )
    Console(width=120).print(table)


def draw(
    runs: dict[str, Requests], table: VariantTable, rates: Numbers, second: float, file: Path
) -> None:
    """By policy: who was served by which variant, second by second, and who was not in time."""
    drawn = Figure(figsize=(9, 1.9 * len(runs)))
    panels = np.atleast_1d(drawn.subplots(len(runs), 1, sharex=True))
    colours = _colours(table)
    width = 2.0
    for panel, (name, requests) in zip(panels, runs.items(), strict=True):
        bins = np.arange(0, len(rates) * second + width, width)
        bottom = np.zeros(len(bins) - 1)
        on_time = requests.outcome == ON_TIME
        for v, variant in enumerate(table.variants):
            of = on_time & (requests.variant == v)
            count = np.histogram(requests.arrived_s[of], bins)[0] / width
            if count.any():
                panel.bar(
                    bins[:-1], count, width, bottom, align="edge", color=colours[v], label=variant
                )
                bottom += count
        late = np.histogram(requests.arrived_s[~on_time], bins)[0] / width
        panel.bar(
            bins[:-1],
            late,
            width,
            bottom,
            align="edge",
            color="black",
            label="late, shed or dropped",
        )
        panel.plot(np.arange(len(rates)) * second, rates, color="0.3", lw=0.8, ls="--")
        quality = float(requests.quality[on_time].mean()) if on_time.any() else 0.0
        share = 1 - on_time.mean()
        panel.set_title(
            f"{name}: quality {quality:.2f}, {100 * share:.1f} % not in time",
            fontsize=9,
            loc="left",
        )
        panel.set_ylabel("pictures /s", fontsize=8)
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [*[v for v in table.variants if v in handles], "late, shed or dropped"]
    drawn.legend(
        [handles[label] for label in order if label in handles],
        [label for label in order if label in handles],
        loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=7,
    )  # fmt: skip
    panels[-1].set_xlabel("seconds")
    drawn.savefig(file, dpi=110, bbox_inches="tight")


def _colours(table: VariantTable) -> list[Any]:
    """One hue a strategy, lighter as it gets cheaper."""
    from matplotlib import colormaps

    maps = {"exact": "Greys", "cache": "Blues", "steps": "Greens", "model": "Oranges"}
    result: list[Any] = []
    for v, strategy in enumerate(table.strategies):
        same = [u for u, s in enumerate(table.strategies) if s == strategy]
        at = 0.85 - 0.55 * same.index(v) / max(1, len(same) - 1)
        result.append(colormaps[maps.get(strategy, "Purples")](0.55 if strategy == "exact" else at))
    return result


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    typer.run(main)
