"""Reuse across steps: hooks of a recipe's cache around the blocks of a transformer."""
