"""Loads diffusers models and denoises with them, step-batched."""
