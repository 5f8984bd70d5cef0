"""The approximate cache: latents of half-finished pictures, found by similarity of prompts."""
