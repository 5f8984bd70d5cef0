"""The muscle: loads diffusers models and denoises with them."""
