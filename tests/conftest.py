"""Tiny models with random weights, built once a run: the real classes, small enough for a CPU."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from argus.core.profile import ModelProfile, Profile
from argus.engine.sources import family_fingerprint
from argus.families.catalog import read_family
from argus.quality.predictor import Predictor
from tests.s3 import ENVIRONMENT, S3Endpoint

if TYPE_CHECKING:
    from tests.postgres import Postgres

WIDTH = 32


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that the tests share; each makes databases of its own."""
    from tests.postgres import postgres_server

    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/catalogue.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(scope="session")
def running_s3() -> Iterator[S3Endpoint]:
    endpoint = S3Endpoint()
    yield endpoint
    endpoint.kill()


@pytest.fixture
def s3(running_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> S3Endpoint:
    """An S3 endpoint, which the environment names."""
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": running_s3.url}).items():
        monkeypatch.setenv(name, value)
    return running_s3


@pytest.fixture
def new_clients() -> Iterator[None]:
    """No client of the endpoint that the environment named before is used again."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(s3: S3Endpoint) -> str:
    """The name of an empty bucket."""
    name = f"latents-{uuid.uuid4().hex[:8]}"
    s3.make_bucket(name)
    return name


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline folder: 32×32 pixels, 16×16 latents."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(),
        unet=_unet(cross_attention_dim=WIDTH),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("tiny-sd")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder with a processor: pictures of 32×32 pixels."""
    torch.manual_seed(0)
    text, vision = _text_config().to_dict(), {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    folder = tmp_path_factory.mktemp("tiny-clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(pixels, _tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_family(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's YAML file: `tiny`, 6 steps, of which 2 or 3 may be skipped; judged by CLIP.

    The thresholds let nothing but the very same prompt match, whatever random weights make of it.
    """
    file = tmp_path_factory.mktemp("families") / "tiny.yaml"
    file.write_text(
        f"""
        name: tiny
        description: Random weights.
        models: {{tiny: {tiny_sd}, other: {tiny_sd}}}
        exact: {{model: tiny, sampler: ddim, width: 32, height: 32, steps: 6, guidance: 3.0}}
        skips: {{2: 0.995, 3: 0.999}}
        variants:
          quick: {{steps: 3}}
          other: {{model: other, guidance: 2.0}}
        scorer: {{kind: clip, source: {tiny_clip}}}
        """
    )
    return file


@pytest.fixture(scope="session")
def measured_family(
    tiny_family: Path, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny` with a profile, and a predictor that knows one thing: what it was told of `other`."""
    file = tmp_path_factory.mktemp("measured") / "tiny.yaml"
    file.write_text(tiny_family.read_text())
    model = ModelProfile(
        step_s={1: 0.01, 2: 0.012, 4: 0.016, 8: 0.026}, decode_s={1: 0.004, 8: 0.02},
        encode_s=0.002, picture_s=0.001, load_s={"disk": 0.2, "page_cache": 0.1}, peak_bytes=1,
    )  # fmt: skip
    faster = replace(model, step_s={b: s / 3 for b, s in model.step_s.items()})
    profile = Profile(
        "tiny", {"device": "cpu"}, 32, 32, {}, {"tiny": model, "other": faster}
    )  # fmt: skip
    (file.parent / "profile.json").write_text(json.dumps(profile.to_json()))
    family = read_family(file)
    constant_predictor(
        family_fingerprint(family), {"exact": 1, "skip-2": 0.97, "skip-3": 0.9, "quick": 0.8,
                                     "other": 0.7},
    ).save(file.parent / "predictor")  # fmt: skip
    return file


@pytest.fixture(scope="session")
def family_with_ideas(measured_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`measured_family` with prompts of its own."""
    folder = tmp_path_factory.mktemp("ideas") / "family"
    shutil.copytree(measured_family.parent, folder)
    file = folder / measured_family.name
    lines = measured_family.read_text().rstrip()
    file.write_text(f"{lines}\n        ideas: 'argus.families.pictogram.ideas:SceneIdeas'\n")
    return file


def constant_predictor(made_for: str, quality: dict[str, float]) -> Predictor:
    """Foretells the same of every prompt, and bounds that are 0.1 lower."""
    count, width, hidden = len(quality), WIDTH, 4
    weights = {
        "w1": np.zeros((1, 2 * width + 1, hidden)), "b1": np.zeros((1, hidden)),
        "w2": np.zeros((1, hidden, hidden)), "b2": np.zeros((1, hidden)),
        "w3": np.zeros((1, hidden, count)), "b3": np.array([list(quality.values())]),
        "knots": np.zeros(1), "usual": np.array(list(quality.values())),
        "trust": np.ones(count), "widening": np.full(count, 0.1),
        "centre": np.zeros(width), "spread": np.eye(width), "scores": np.array([0.1, 0.2]),
    }  # fmt: skip
    skips = [name.startswith("skip") for name in quality]
    return Predictor(list(quality), skips, made_for, weights)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline folder with two text encoders and an Euler sampler."""
    torch.manual_seed(0)
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def _unet(**options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        **options,
    )


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in letters]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *ends]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.model_max_length = 24
    return tokenizer
