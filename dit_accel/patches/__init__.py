"""Reversible patches of diffusers pipelines: where attention is intercepted, and how it is undone."""
