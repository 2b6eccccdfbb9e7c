"""A page in the browser: a prompt, dense beside accelerated, step by step. Needs the extra ``ui``."""
