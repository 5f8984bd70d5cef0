"""The API's bodies: the OpenAI Images API, and an `argus` object for Argus's own fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from argus.core.job import MAX_SEED

MAX_PROMPT = 4000
MAX_PICTURES = 10


def _whole(value: Any) -> Any:
    """Convert 30.0, which clients in JavaScript and Lua send for 30."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class ArgusOptions(BaseModel):
    """Options beyond the OpenAI API."""

    model_config = ConfigDict(extra="forbid", strict=True)

    cache: bool = Field(True, description="Whether the cache may serve and keep this prompt.")
    slo: str | None = Field(None, description="The SLO class; the API key's by default.")
    min_quality: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Only variants that are worth so much on average, by their lower bound.",
    )
    variant: str | None = Field(None, description="Pins a variant, as `model` FAMILY/VARIANT does.")
    exact: bool = Field(
        False, description="Pins the exact model; `num_inference_steps` then is exactly so many."
    )
    explain: bool = Field(
        False, description="The answer's account has `candidates`: what was known of every variant."
    )
    score: bool = Field(
        False,
        description="The answer's account has the `score` of the picture by the family's scorer.",
    )
    background: bool = Field(
        False, description="Answer 202 with a job, which is run when workers have time."
    )
    webhook: str | None = Field(
        None, description="With `background`: the URL to call when the job has ended."
    )


class GenerationRequest(BaseModel):
    """`POST /v1/images/generations`. Null is the same as not given. Other fields are ignored and
    named in the answer, or refused (setting `unknown_fields`)."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, examples=["a red house in the snow"])
    model: str | None = Field(
        None, description="A family (Argus chooses the variant) or FAMILY/VARIANT (pinned)."
    )
    n: Whole | None = Field(None, ge=1, le=MAX_PICTURES, description="Pictures; 1 by default.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.")
    quality: str | None = Field(
        None,
        description="What the picture must be worth: auto (the SLO class's own), standard, low, "
        "fast, medium, high, hd, lossless, or one of the setting `quality_levels`.",
    )
    response_format: Literal["b64_json", "url", "file"] | None = Field(
        None, description="`file` answers with the picture itself, or several in a zip file."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = None
    user: str | None = None
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Unfinished pictures that a stream sends."
    )
    seed: Whole | None = Field(
        None,
        ge=-1,
        le=MAX_SEED,
        description="Seed of the first picture; each next one adds 1. -1 takes any.",
    )
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    num_inference_steps: Whole | None = Field(
        None,
        ge=1,
        description="The most denoising steps; Argus decides below it (setting `client_steps`).",
    )
    argus: ArgusOptions | None = None
    # Fields of the OpenAI API without effect here, accepted so that its clients work.
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    style: str | None = None


class PictureData(BaseModel):
    """A picture, inline or by URL.

    While the server cannot store pictures, a picture requested as `url` is in `b64_json`, and
    `inline` in its report is true: no finished picture is lost to a full disk.
    """

    b64_json: str | None = None
    url: str | None = None


class NeighbourReport(BaseModel):
    """The cached prompt that a picture was resumed from; `prompt` only if it is the tenant's."""

    entry: int
    prompt: str | None = None


class Candidate(BaseModel):
    """What was known of a variant at the decision. Quality is relative to the exact picture's, as
    in the account; without a prediction it is not known.

    `cost_ms` are milliseconds of a worker, in its usual batch. `worth` is what the policy `price`
    compared: the quality less the price of the cost (`paid`) and what waiting and the chance of
    being late take (`risk`). `excluded` says why the variant could not serve the request, a pin
    aside.
    """

    variant: str
    predicted_quality: float | None = None
    quality_bound: float | None = None
    cost_ms: float
    paid: float | None = None
    risk: float | None = None
    worth: float | None = None
    excluded: str | None = None


class PictureReport(BaseModel):
    """How a picture was made. `steps_limit` is the most that the request allowed, where that limits
    the exact variant; `painted_at` the size from which the picture was resized. `unknown_words` are
    those of the prompt that mean nothing to the family, so that no variant paints them; absent if
    it cannot tell. `timings_ms` has queue, encode, retrieve, denoise and decode.

    `predicted_quality` is relative to the exact picture's 1, within the limit of steps, and
    `quality_bound` a lower bound of what such prompts get on average: of ten groups of prompts with
    similar predictions, nine are above. `price` is that of a worker-second at the
    decision, in quality; `saved_ms` is the worker time that the variant saved. `decision_ms` has
    the parts of the decision: embed, search, predict, route and fetch.

    `gpu_seconds` is the time of its worker, each second divided among the pictures that shared it;
    `cost`, in `currency`, is what that costs, `saved_cost` what `saved_ms` would have, and
    `energy_joules` the device's energy. When it was decided on, `queued_behind` pictures were
    queued at the worker, and this one was expected to take `expected_ms` more.

    `candidates` are there if `argus.explain` asked for them. If `argus.score` did, `score` is the
    scorer's value of this picture, and `judged_quality` its quality by that alone, where 1 is what
    exact pictures get on average; both are absent if the picture could not be scored in time. The
    quality of a picture beside another one of its prompt differs by as much as `judged_quality`.
    """

    variant: str
    model: str
    reason: str
    steps_run: int
    steps_skipped: int
    steps_limit: int | None = None
    painted_at: str | None = None
    neighbour: NeighbourReport | None = None
    similarity: float | None = None
    seed: int
    unknown_words: list[str] | None = None
    prompt_truncated: bool
    negative_prompt_truncated: bool
    timings_ms: dict[str, float]
    decision_ms: dict[str, float]
    predicted_quality: float | None = None
    quality_bound: float | None = None
    price: float | None = None
    saved_ms: float
    gpu_seconds: float
    cost: float | None = None
    saved_cost: float | None = None
    currency: str | None = None
    energy_joules: float | None = None
    queued_behind: int
    expected_ms: float
    worker: int
    worker_type: str
    slo: str
    deadline_ms: float | None = None
    on_time: bool
    score: float | None = None
    judged_quality: float | None = None
    candidates: list[Candidate] | None = None
    inline: bool | None = Field(
        None,
        description="True if a url was requested and the picture is in b64_json, because it cannot "
        "be stored now.",
    )


class Usage(BaseModel):
    """Tokens, which clients of the OpenAI API read: a diffusion model has none."""

    input_tokens: int = 0
    input_tokens_details: dict[str, int] = {"image_tokens": 0, "text_tokens": 0}
    output_tokens: int = 0
    total_tokens: int = 0


class GenerationResponse(BaseModel):
    """`data` and `argus` have one item per picture, in the same order. `ignored_fields` are those
    of the request that Argus does not know."""

    id: str
    created: int
    data: list[PictureData]
    output_format: str
    size: str
    quality: str
    usage: Usage = Usage()
    ignored_fields: list[str] | None = None
    argus: list[PictureReport]


class WebhookReport(BaseModel):
    """A job's webhook: `pending` until it is called with success (`delivered`), or too often
    without (`given_up`)."""

    url: str
    status: Literal["pending", "delivered", "given_up"]
    calls: int


class JobReport(BaseModel):
    """A background job. Times are seconds since the epoch; it is gone at `expires_at`. `error` is
    why it failed, in the format of an error answer; `result` is the answer to the request."""

    id: str
    object: Literal["argus.job"] = "argus.job"
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    expires_at: int | None = None
    webhook: WebhookReport | None = None
    error: dict[str, Any] | None = None
    result: GenerationResponse | None = None


class JobList(BaseModel):
    """Jobs without their results, newest first. With `has_more`, go on `after` the last id."""

    object: Literal["list"] = "list"
    data: list[JobReport]
    has_more: bool


class Amounts(BaseModel):
    """What pictures took; costs are 0 while `cost_per_hour` was not set, and energy where it is not
    measured."""

    pictures: int = 0
    gpu_seconds: float = 0.0
    saved_gpu_seconds: float = 0.0
    cost: float = 0.0
    saved_cost: float = 0.0
    energy_joules: float = 0.0


class UsageRow(Amounts):
    """What the pictures of one key, SLO class and variant took."""

    key: str
    slo: str
    family: str
    variant: str


class UsageReport(BaseModel):
    """Usage in whole hours: those that begin in [`from`, `to`), in seconds since the epoch."""

    model_config = ConfigDict(populate_by_name=True)

    object: Literal["list"] = "list"
    begin: int = Field(alias="from")
    end: int = Field(alias="to")
    currency: str
    total: Amounts
    data: list[UsageRow]


class ModelData(BaseModel):
    """A family, or one of its variants."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "argus"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelData]


class VariantData(BaseModel):
    """A variant of the family. `steps` is of the whole run, of which the first `skip` are not
    run."""

    name: str
    model: str
    strategy: Literal["exact", "cache", "model", "steps"]
    steps: int
    skip: int


class SloData(BaseModel):
    """An SLO class: its deadline, once that is known and if there is one, and its least
    quality."""

    name: str
    deadline_ms: float | None = None
    quality: float


class ServedData(BaseModel):
    """What a server serves, for clients that let a person choose. `sizes` are those that pictures
    are made at; other sizes up to `size_limit` pixels a side are resized. `scores` says whether
    `argus.score` can be asked for, `prompts` are examples. `key` is the name of the client's API
    key, and `admin` says whether it is one of the `admin_keys`; without keys, everyone is one."""

    version: str
    family: str
    description: str
    policy: str
    ready: bool
    problem: str | None = None
    degraded: list[str]
    key: str | None = None
    admin: bool
    variants: list[VariantData]
    slo: list[SloData]
    quality_levels: list[str]
    sizes: list[str]
    size_limit: int | None = None
    most_pictures: int
    scores: bool
    prompts: list[str]


class Health(BaseModel):
    """`keys` says whether the API asks for keys."""

    status: Literal["ok"] = "ok"
    version: str
    keys: bool


class Readiness(BaseModel):
    """`degraded` lists what cannot be stored or read now; pictures are made all the same."""

    status: str
    degraded: list[str] | None = None


class ErrorBody(BaseModel):
    """An error in OpenAI's format."""

    error: dict[str, Any]
