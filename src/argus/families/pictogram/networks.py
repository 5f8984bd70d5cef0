"""The networks of the bundled family: their shapes, and the folder they are saved in.

Everything is an ordinary diffusers or transformers class, so that
`StableDiffusionPipeline.from_pretrained(folder)` loads the result without any code of ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from argus.families.pictogram.world import SIZE

LATENT_CHANNELS = 40
LATENT_SIZE = SIZE // 8
TEXT_WIDTH = 128
MAX_TOKENS = 40
SHIFT = 3.0
# The family's models, and the widths of the two levels of their UNets.
WIDTHS = {"base": (128, 192), "small": (64, 96)}


def new_vae() -> AutoencoderKL:
    """64×64 pixels to 8×8×40 and back."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # nearly no noise in what it encodes
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0.0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    return vae


def new_unet(model: str = "base") -> UNet2DConditionModel:
    """The prompt is read at 8×8 and 4×4: every latent is told what to be part of.

    Read at 4×4 alone, a narrow one learns nothing of where things stand.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=WIDTHS[model],
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        trained_betas=_betas(),
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # of no effect here, but the stock pipeline wants it so
        timestep_spacing="trailing",
    )


def _betas() -> list[float]:
    """Stable Diffusion's schedule, ending in noise (Lin et al. 2023, arXiv 2305.08891) and with
    `SHIFT` times less signal to noise (Hoogeboom et al. 2023, arXiv 2301.11093, section 3.1).

    Latents this small say so much about their thing that it stands out of most noise: with the
    usual schedule everything is decided in the first few steps, or was before them. A thousandth of
    the amplitude stays, because some samplers divide by it.
    """
    usual = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
    alphas = usual.alphas_cumprod.double()
    shifted = (alphas / (alphas + SHIFT**2 * (1 - alphas))).clamp(min=1e-6)
    ratios = shifted / torch.cat([torch.ones(1, dtype=torch.float64), shifted[:-1]])
    betas: list[float] = (1 - ratios).tolist()
    return betas


def assemble(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """The networks as the stock pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    """Save a folder that stock diffusers loads.

    UNet and VAE are stored in float16 (diffusers loads them as float32 all the same), the text
    encoder in float32, because transformers would keep it in half precision.
    """
    for part in (pipeline.text_encoder.config, pipeline.tokenizer):
        part.name_or_path = ""  # where they were loaded from is nobody's business
    pipeline.register_to_config(_name_or_path="")
    pipeline.save_pretrained(folder, safe_serialization=True)
    for part, name in ((pipeline.vae, "vae"), (pipeline.unet, "unet")):
        config = {key: value for key, value in part.config.items() if key != "_name_or_path"}
        half = type(part).from_config(config)  # without the folder it came from
        half.load_state_dict(part.state_dict())
        half.to(torch.float16).save_pretrained(folder / name, safe_serialization=True)
