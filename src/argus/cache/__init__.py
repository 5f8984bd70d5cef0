"""The approximate cache: half-finished pictures of earlier prompts, found by similarity."""
