"""CLIPScore and PickScore: how well a picture fits a prompt by a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

from argus.core.errors import ModelError
from argus.quality.scorer import Scores


class _ClipModel:
    """A CLIP model from the hub or a folder, safetensors only and without remote code."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model.eval(), processor

    @classmethod
    def load(cls, source: str, device: str = "cpu") -> Any:
        """Raises ModelError if `source` cannot be loaded."""
        try:
            model = AutoModel.from_pretrained(source, use_safetensors=True).to(device)
            return cls(model, AutoProcessor.from_pretrained(source))
        except (OSError, ValueError) as error:
            raise ModelError(f"The scorer {source} cannot be loaded: {error}") from error

    @torch.inference_mode()
    def _cosines(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        text = self._processor(
            text=list(prompts), padding=True, truncation=True, return_tensors="pt"
        ).to(self._model.device)
        pixels = self._processor(
            images=[image.convert("RGB") for image in images], return_tensors="pt"
        ).to(self._model.device)
        texts = self._model.get_text_features(**text).pooler_output
        pictures = self._model.get_image_features(**pixels).pooler_output
        return F.cosine_similarity(texts.float(), pictures.float()).cpu()


class ClipScore(_ClipModel):
    """100 · max(cos, 0), in [0, 100] (Hessel et al. 2021, arXiv 2104.08718; the factor as in
    torchmetrics and in the papers this project compares itself with)."""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Scores:
        return _numbers(100 * self._cosines(prompts, images).clamp(min=0))


class PickScore(_ClipModel):
    """Cosine times the model's own temperature (Kirstain et al. 2023, arXiv 2305.01569)."""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Scores:
        scale = self._model.logit_scale.detach().exp().cpu()
        return _numbers(scale * self._cosines(prompts, images))


def _numbers(values: torch.Tensor) -> Scores:
    return np.asarray(values, dtype=np.float32)
