"""What the engine makes of a GPU: SDXL at 1024×1024, random weights, which time the same.

    python benchmarks/gpu.py [--device cuda] [--dtype bfloat16] [--json]

Measures, in one run of under ten minutes: seconds an image at batch 1 and 8 by diffusers, eager and
compiled, and by Argus's engine, eager and compiled; TFLOP/s of the UNet beside those of a large
matrix product; and the table of benchmarks/engine.py. --tiny tries the script itself on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from engine import measure, workload
from rich.console import Console
from rich.table import Table
from tokenizers import pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from argus.core.job import Job
from argus.engine.engine import Engine
from argus.lab.painting import Commission, paint

GUIDANCE = 7.5
BATCHES = (1, 8)
SDXL: dict[str, Any] = {
    "side": 1024,
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "levels": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "vae": (128, 256, 512, 512),
    "vae_layers": 2,
    "texts": ((768, 3072, 12, 12), (1280, 5120, 32, 20)),
    "matmul": 8192,
}
TINY: dict[str, Any] = {
    "side": 32,
    "unet": {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "levels": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "vae": (32, 32),
    "vae_layers": 1,
    "texts": ((32, 64, 2, 4), (32, 64, 2, 4)),
    "matmul": 256,
}


def main(
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    steps: Annotated[int, typer.Option(help="Steps of a whole picture.")] = 20,
    requests: Annotated[int, typer.Option(help="Requests of the mixed workload.")] = 32,
    latency_s: Annotated[float, typer.Option(help="Seconds of Poisson arrivals.")] = 30.0,
    compiled: Annotated[bool, typer.Option(help="Also compile (a minute a batch size).")] = True,
    tiny: Annotated[bool, typer.Option(help="A tiny model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    console, where = Console(), torch.device(device)
    shape = TINY if tiny else SDXL
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": dtype,
        "side": shape["side"],
        "steps": steps,
    }
    console.print("Making random weights …")
    pipeline = build(shape, where, getattr(torch, dtype))
    engine = Engine(pipeline)
    result["matmul_tflops"] = matmul_tflops(engine, shape["matmul"])
    result["step_tflop"] = step_tflop(engine)
    ways: dict[str, Callable[[int], None]] = {
        "diffusers": lambda n: stock(pipeline, shape["side"], steps, n),
        "argus": lambda n: ours(engine, steps, n),
    }
    if compiled:
        graphs = Engine(pipeline, compiled=True)
        ways["argus_compiled"] = lambda n: ours(graphs, steps, n)
    seconds = {
        name: {n: seconds_an_image(way, n, engine) for n in BATCHES} for name, way in ways.items()
    }
    if compiled:
        plain, pipeline.unet = pipeline.unet, torch.compile(pipeline.unet, dynamic=False)
        seconds["diffusers_compiled"] = {
            n: seconds_an_image(ways["diffusers"], n, engine) for n in BATCHES
        }
        pipeline.unet = plain
    result["seconds_an_image"] = seconds
    for name, by_batch in seconds.items():
        result[f"{name}_tflops"] = {
            n: result["step_tflop"] * steps / one for n, one in by_batch.items()
        }
    show(console, result)
    prompts = [f"prompt {i}" for i in range(requests)]
    asks = workload(prompts, steps, GUIDANCE, shape["side"])
    result |= measure(engine, asks, latency_s, console, batches=(4, 8))
    console.print_json(json.dumps(result))
    if as_json:
        print(json.dumps(result))


def build(
    shape: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> StableDiffusionXLPipeline:
    """An SDXL pipeline with random weights, made on the device."""
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(
                **shape["unet"],
                down_block_types=shape["levels"],
                up_block_types=[name.replace("Down", "Up") for name in reversed(shape["levels"])],
                addition_embed_type="text_time",
                use_linear_projection=True,
            )
            vae = AutoencoderKL(
                block_out_channels=shape["vae"],
                down_block_types=("DownEncoderBlock2D",) * len(shape["vae"]),
                up_block_types=("UpDecoderBlock2D",) * len(shape["vae"]),
                layers_per_block=shape["vae_layers"],
                latent_channels=4,
                sample_size=shape["side"],
                scaling_factor=0.13025,
            )
            texts = [_text_config(*sizes) for sizes in shape["texts"]]
            first, second = CLIPTextModel(texts[0]), CLIPTextModelWithProjection(texts[1])
    finally:
        torch.set_default_dtype(usual)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def _text_config(width: int, inner: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=inner,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.model_max_length = 77
    return tokenizer


def stock(pipeline: StableDiffusionXLPipeline, side: int, steps: int, count: int) -> None:
    pipeline(
        [f"prompt {i}" for i in range(count)],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        width=side,
        height=side,
        generator=[torch.Generator().manual_seed(i) for i in range(count)],
    )


def ours(engine: Engine, steps: int, count: int) -> None:
    jobs = [Job(f"prompt {i}", seed=i, steps=steps, guidance=GUIDANCE) for i in range(count)]
    for _ in paint(engine, [Commission(i, job) for i, job in enumerate(jobs)]):
        pass


def seconds_an_image(way: Callable[[int], None], count: int, engine: Engine) -> float:
    """The better of two runs, after one that warms up, on the engine's clock."""
    spent = []
    for _ in range(3):
        begun = engine.now()
        way(count)
        spent.append((engine.now() - begun) / count)
    return min(spent[1:])


def matmul_tflops(engine: Engine, side: int, repeats: int = 20) -> float:
    """Of a product of two square matrices, where and as precise as the engine's UNet is."""
    unet = engine.pipeline.unet
    left, right = torch.randn(2, side, side, device=unet.device).to(unet.dtype)
    for _ in range(3):
        left @ right
    begun = engine.now()
    for _ in range(repeats):
        left @ right
    return repeats * 2 * side**3 / (engine.now() - begun) / 1e12


def step_tflop(engine: Engine) -> float:
    """The work of one guided step of one picture, in TFLOP."""
    with FlopCounterMode(display=False) as counter:
        engine.run(Job("a prompt", steps=1, guidance=GUIDANCE))
    flop: int = sum(counter.get_flop_counts()["UNet2DConditionModel"].values())
    return flop / 1e12


def show(console: Console, result: dict[str, Any]) -> None:
    table = Table(
        "way", *(f"s/image at {n}" for n in BATCHES), *(f"TFLOP/s at {n}" for n in BATCHES)
    )
    for name, seconds in result["seconds_an_image"].items():
        speeds = result[f"{name}_tflops"]
        table.add_row(
            name,
            *(f"{seconds[n]:.3f}" for n in BATCHES),
            *(f"{speeds[n]:.1f}" for n in BATCHES),
        )
    table.add_row("matrix product", "", "", "", f"{result['matmul_tflops']:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
