"""The configuration: defaults, a YAML file, the environment, flags, in rising precedence."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from argus.core.errors import BadRequest

log = logging.getLogger(__name__)

PREFIX = "ARGUS_"
FILE_VARIABLE = PREFIX + "CONFIG"
ALIKE = 0.85  # similarity from which an unknown name is taken for a misspelt setting


UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)(x|s)")


def _share(value: Any) -> Any:
    """Convert a percentage such as "10%" to 0.1; return anything else as it is."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Signal = Literal["running", "waiting", "queue_seconds", "backlog_seconds", "saturation"]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)]


def without_passwords(value: str) -> str:
    """A value with the password of a URL removed."""
    value = re.sub(r"(:/+[^:/@]*):.*@", r"\1:***@", value)  # one slash is misspelt, and a password
    value = re.sub(r"(https?://)[^:/@]+@", r"\1***@", value)  # a token
    return re.sub(r"([?&;][^=&;]*(?:pass|secret|token|key)[^=&;]*=)[^&;]*", r"\1***", value)


class SloClass(BaseModel):
    """An SLO class. `latency` is a multiple of the exact variant's latency on an idle worker, or
    seconds; `quality` is the least lower bound of a picture's predicted quality; `keys` are the
    names of API keys whose requests have this class by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency: str = "3x"
    quality: float = Field(0.0, ge=0, le=1)
    keys: tuple[str, ...] = ()

    @field_validator("latency")
    @classmethod
    def _known(cls, value: str) -> str:
        match = _LATENCY.fullmatch(value)
        if not match or float(match[1]) <= 0:
            raise ValueError("latency must be a multiple such as 3x, or seconds such as 12s")
        return value

    def latency_s(self, exact_s: float) -> float:
        """The latency in seconds, where an exact picture takes `exact_s` seconds."""
        match = _LATENCY.fullmatch(self.latency)
        assert match is not None  # checked above
        return float(match[1]) * (exact_s if match[2] == "x" else 1.0)


class WorkerType(BaseModel):
    """A type of worker on a Ray cluster: what one takes of a node. `accelerator` is Ray's name of
    its GPU, which then is one unless `gpus` says otherwise; without `cpus` a worker without a GPU
    takes a whole node. `resources` are further ones of the cluster's own, `threads` the CPU threads
    of its engine, `profile` what `argus profile --worker-type` wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accelerator: str | None = None
    gpus: float = Field(0, ge=0)
    cpus: float | None = Field(None, gt=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    threads: int | None = Field(None, ge=1)
    profile: UserPath | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_gpu(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("accelerator") and "gpus" not in given:
            return {**given, "gpus": 1}
        return given


class QualityLevel(BaseModel):
    """What a request's `quality` of a name means: `least` is the least lower bound of a picture's
    predicted quality, 1 the exact variant; `cheapest` says that quality beyond it is worth
    nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    least: float = Field(0.0, ge=0, le=1)
    cheapest: bool = False


QUALITY_LEVELS = {
    "auto": QualityLevel(),
    "standard": QualityLevel(),
    "low": QualityLevel(least=0.75, cheapest=True),
    "fast": QualityLevel(least=0.75, cheapest=True),
    "medium": QualityLevel(least=0.9),
    "high": QualityLevel(least=0.98),
    "hd": QualityLevel(least=0.98),
    "lossless": QualityLevel(least=1.0),
}


UrlPath = Annotated[str, Field(pattern=r"^/[^?#\s]*$")]


class Upstream(BaseModel):
    """An image server that holds one of the family's models: vLLM-Omni, SGLang, another Argus, or a
    hosted API that speaks the OpenAI Images API.

    `model` is the family's name of the model, by default its exact variant's; `served_model` the
    name to ask the server for, by default none. `key_env` names the environment variable with its
    API key. No more than `concurrency` requests are in flight at once. `extra` are fields of every
    request to it. `fields` renames the fields that Argus sends, or leaves out those without a name.
    `health` is the path that answers 200 while the server works, by default /health or, where there
    is none, /v1/models. `ca_file` has the certificates to trust instead of the system's. `profile`
    is a file that `argus profile` wrote of it, by default the one of the other upstreams.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    model: str | None = None
    served_model: str | None = None
    key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    concurrency: int = Field(1, ge=1, le=256)
    cost_per_hour: Price | None = None
    extra: dict[str, Any] = {}
    fields: dict[str, str | None] = {}
    health: UrlPath | None = None
    ca_file: UserPath | None = None
    profile: UserPath | None = None

    @field_validator("url")
    @classmethod
    def _plain(cls, value: str) -> str:
        """The URL without a slash or /v1 at its end."""
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must be such as http://host:8000")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url must have no password: give the key in a variable, as key_env")
        if parts.query or parts.fragment:
            raise ValueError("url must have no query")
        return value.rstrip("/").removesuffix("/v1").rstrip("/")

    @field_validator("fields")
    @classmethod
    def _renamed(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for name in value:
            if name not in UPSTREAM_FIELDS:
                known = ", ".join(UPSTREAM_FIELDS)
                raise ValueError(f"{name} is not a field that Argus sends; those are {known}")
        return value

    @field_validator("key_env")
    @classmethod
    def _set(cls, value: str | None) -> str | None:
        if value is not None and not os.environ.get(value):
            raise ValueError(f"the environment variable {value} is not set")
        return value

    @field_validator("ca_file")
    @classmethod
    def _there(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError("there is no such file")
        return value

    @property
    def key(self) -> str | None:
        """The API key."""
        return None if self.key_env is None else os.environ[self.key_env]


# What a request to an upstream says, beside `prompt` and `model`.
UPSTREAM_FIELDS = (
    "n", "size", "response_format", "output_format", "num_inference_steps", "guidance_scale",
    "seed", "negative_prompt",
)  # fmt: skip


class Settings(BaseSettings):
    """A server's settings. `argus config show` prints the fields' descriptions."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    public_url: str | None = Field(
        None, description="URL at which clients reach the server, for the URLs in answers."
    )
    data: UserPath = Field(
        Path("argus-data"), description="Folder for everything the server keeps."
    )
    family: str | None = Field(
        None, description="Name or YAML file of the family to serve. Default: the bundled one."
    )
    policy: str | None = Field(
        None,
        description="Routing policy, one of `argus simulate`'s. Default: price, or nirvana for a "
        "family that was not measured.",
    )
    slo: dict[str, SloClass] = Field(
        {},
        description="SLO classes by name: latency (3x the exact variant's, or 12s), "
        "quality (the least), keys (API keys of this class). `default` is 3x unless it is given.",
        examples=['{"default": {"latency": "3x", "quality": 0.9}}'],
    )
    quality_levels: dict[str, QualityLevel] = Field(
        {},
        description="What a request's `quality` means, by name: least (the lower bound of the "
        "predicted quality; 1 is exact), cheapest (quality beyond it is worth nothing). They come "
        "before the built-in auto, standard, low, fast, medium, high, hd and lossless.",
        examples=['{"high": {"least": 0.95}}'],
    )
    client_steps: Literal["ceiling", "pin", "ignore"] = Field(
        "ceiling",
        description="What a request's num_inference_steps means: the most steps, below which Argus "
        "decides; exactly so many by the exact model; or nothing.",
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="What happens to fields of a request that Argus does not know: ignored ones "
        "are named in the answer.",
    )
    served_model_names: list[str] = Field(
        ["default"],
        description="More names for the family, for clients that ask for a model such as dall-e-3. "
        "Benchmarks of other servers ask for `default`.",
        examples=['["dall-e-3"]'],
    )
    router_metrics: dict[Signal, str] = Field(
        {},
        description="Names under which /metrics has what routers in front of servers read: "
        "running, waiting, queue_seconds, backlog_seconds, saturation. Default: vLLM's.",
        examples=['{"waiting": "sglang:num_queue_reqs"}'],
    )
    shadow: bool = Field(
        False, description="Make every picture exactly, and record what Argus would have decided."
    )
    rollout: Share | None = Field(
        None, description="Share of requests that Argus decides, e.g. 10%; the rest is exact."
    )
    truth_share: Share = Field(
        0.02,
        description="Share of approximate pictures that are made again exactly while workers are "
        "idle, to measure their quality.",
    )
    retrain: bool = Field(True, description="Train a new predictor when its errors drift.")
    window_s: float = Field(30.0, gt=0, description="Seconds between plans.")
    workers: Annotated[int, Field(ge=1)] | Literal["ray"] | None = Field(
        None,
        description="Number of workers on this machine, or ray for workers on a Ray cluster. "
        "Default: one per GPU; on a CPU two, or one for a family of one model.",
    )
    ray_address: str = Field(
        "auto",
        description="Address of the Ray cluster: auto (the one that this machine is in), "
        "HOST:PORT, or local for a new one on this machine.",
    )
    ray_auth: Literal["token", "disabled"] = Field(
        "token",
        description="How the Ray cluster knows its members: by a token (RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH), or not at all.",
    )
    worker_types: dict[str, WorkerType] = Field(
        {},
        description="Types of worker on the Ray cluster, by name: accelerator or gpus, cpus, "
        "resources, threads, profile. Default: one for every kind of GPU.",
        examples=['{"A100": {"accelerator": "A100", "profile": "a100.json"}}'],
    )
    upstreams: list[Upstream] = Field(
        [],
        description="Image servers that hold models of the family: url, model, served_model, "
        "key_env, concurrency, cost_per_hour, extra, fields, health, ca_file, profile (see "
        "docs/upstreams.md).",
        examples=['[{"url": "http://gpu-1:8000", "concurrency": 4}]'],
    )
    device: str | None = Field(None, description="cpu, cuda or cuda:N. Default: CUDA if any.")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16.")
    compile: bool = Field(
        False, description="Have torch compile the model: faster, after minutes at every start."
    )
    profile: UserPath | None = Field(
        None, description="File that `argus profile` wrote. Default: what the family ships, if any."
    )
    predictor: UserPath | None = Field(
        None, description="Folder that `argus train` wrote. Default: what the family ships, if any."
    )
    max_batch: int | None = Field(
        None, ge=1, description="Most pictures in a batch. Default: the profile's best, or 32."
    )
    cost_per_hour: dict[str, Price] | Price | None = Field(
        None,
        description="What an hour of a worker costs: a number, or numbers by type of device, "
        "of which `default` is for all others. Answers then say what a picture cost.",
        examples=['{"default": 2.5}'],
    )
    currency: str = Field("USD", description="The currency of `cost_per_hour`, for answers.")
    admin_keys: list[str] = Field(
        [],
        description="Names of API keys that may see the usage of all keys, watch the live view, "
        "switch the policy and start bursts.",
        examples=['["operator"]'],
    )
    metrics_by_key: bool = Field(
        False, description="Whether /metrics, which asks for no key, has the names of API keys."
    )
    api_key_file: UserPath | None = Field(
        None, description="Hashed API keys, written by `argus key`. Without it no key is needed."
    )
    cache_limit: ByteSize = Field(
        ByteSize(1_000_000_000), description="Bytes of latents the cache may hold, e.g. 20GB."
    )
    cache_scope: Literal["key", "shared"] = Field(
        "key", description="Whether each API key has a cache of its own, or all share one."
    )
    cache_latents: str | None = Field(
        None,
        description="Folder or fsspec URL of the latents, such as s3://bucket/prefix; endpoint and "
        "keys come from the environment (AWS_ENDPOINT_URL, …). Default: in the data folder.",
    )
    cache_disk: ByteSize = Field(
        ByteSize(2_000_000_000),
        ge=0,
        description="Bytes of the data folder for latents that were written or read lately, where "
        "cache_latents is the URL of another machine; 0 for none.",
    )
    cache_catalogue: str | None = Field(
        None, description="SQLAlchemy URL of the catalogue. Default: SQLite in the data folder."
    )
    queue_limit: int = Field(
        64, ge=1, description="Pictures that may be queued or run; more are answered with 429."
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="Seconds after which a queued request is dropped. Default: its deadline, or "
        "300 for requests that Argus does not decide.",
    )
    body_limit: ByteSize = Field(ByteSize(1_000_000), description="Bytes of a request's body.")
    url_ttl_s: float = Field(3600.0, gt=0, description="Seconds for which an answer's URL works.")
    jobs_limit: int = Field(
        1000, ge=0, description="Background jobs of an API key that may be unfinished; 0: none."
    )
    jobs_bytes: ByteSize = Field(
        ByteSize(1_000_000_000),
        description="Bytes that background jobs and their results may take in the catalogue's "
        "database, e.g. 5GB; those of one API key may take half of it.",
    )
    jobs_ttl_s: float = Field(
        86400.0, gt=0, description="Seconds for which a background job is kept after its end."
    )
    jobs_lease_s: float = Field(
        30.0,
        ge=1,
        description="Seconds after which the background jobs of a server that died are run by "
        "another. The servers' clocks must differ by less than two thirds of it.",
    )
    webhook_hosts: list[str] = Field(
        [],
        description="Hosts to which background jobs may send webhooks over https, with the port "
        "unless it is 443; http://HOST allows a host without TLS. Default: none.",
        examples=['["hooks.example.com"]'],
    )
    webhook_secret_file: UserPath | None = Field(
        None, description="File of the secrets (whsec_...) that sign webhooks, one a line."
    )
    log_level: Literal["debug", "info", "warning"] = Field(
        "info", description="Log level; a line for each answer of the server is at debug."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Log as text, or as one JSON object a line."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+[^\s?#]*$",
        description="URL of an OpenTelemetry collector (OTLP over HTTP) that gets a trace of each "
        "request, such as http://collector:4318. Default: what OTEL_EXPORTER_OTLP_ENDPOINT names; "
        "else none.",
    )
    drain_s: float = Field(
        5.0,
        ge=0,
        description="Seconds after SIGTERM in which requests are still accepted while /ready "
        "answers 503, so that load balancers notice.",
    )
    grace_s: float = Field(
        30.0, gt=0, description="Seconds after `drain_s` in which accepted requests may finish."
    )

    @property
    def only_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in ("127.0.0.1", "::1", "localhost")


class _Environment(EnvSettingsSource):
    """Settings from environment variables; lists and mappings are JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError as error:
            example = next(iter(field.examples or ["{}"]))
            raise BadRequest(
                f"{PREFIX}{field_name.upper()} is {value!r} (from the environment), not JSON "
                f"({error}): write it as JSON, such as {example!r}."
            ) from error

    def __call__(self) -> dict[str, Any]:
        try:
            return super().__call__()
        except SettingsError as error:  # it wraps the BadRequest above
            if isinstance(error.__cause__, BadRequest):
                raise error.__cause__ from None
            raise


def read_settings(
    flags: Mapping[str, Any], file: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """The settings in force, and the origin of each that is not a default.

    `flags` that are None were not given. Without `file`, ARGUS_CONFIG may name one.
    Raises BadRequest naming the setting, where it was set, and what would be right.
    """
    if file is None and os.environ.get(FILE_VARIABLE):
        file = Path(os.environ[FILE_VARIABLE])
    layers = [
        ({} if file is None else _read_file(file), f"{file}"),
        (_Environment(Settings)(), "the environment"),
        ({name: value for name, value in flags.items() if value is not None}, "a flag"),
    ]
    _warn_of_slips()
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, origin in layers:
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    try:
        return Settings(**values), origins
    except ValidationError as error:
        raise BadRequest(_sentence(error, origins)) from None


def _warn_of_slips() -> None:
    """Warn of variables that look like misspelt settings; other programs may own the rest."""
    names = [FILE_VARIABLE, *(PREFIX + name.upper() for name in Settings.model_fields)]
    for given in sorted(os.environ):
        if given.upper() not in names and given.upper().startswith(PREFIX):
            for meant in get_close_matches(given.upper(), names, 1, ALIKE):
                log.warning("%s is not a setting and has no effect; is %s meant?", given, meant)


def _read_file(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise BadRequest(f"There is no configuration file {file}.")
    try:
        return YamlConfigSettingsSource(Settings, yaml_file=file)()
    except (yaml.YAMLError, ValueError) as error:
        raise BadRequest(f"{file} is not a YAML mapping of settings: {error}") from None


def _sentence(error: ValidationError, origins: Mapping[str, str]) -> str:
    parts = []
    for one in error.errors():
        name, *inner = map(str, one["loc"])
        if one["type"] == "extra_forbidden" and not inner:
            known = ", ".join(Settings.model_fields)
            parts.append(
                f"There is no setting {name} (in {origins[name]}); the settings are {known}."
            )
        else:
            where, value = f"from {origins[name]}", without_passwords(repr(one["input"]))
            said = one["msg"].removeprefix("Value error, ")
            path = ".".join((name, *inner))
            parts.append(f"{path} is {value} ({where}): {said[0].lower()}{said[1:]}.")
    return " ".join(parts)
