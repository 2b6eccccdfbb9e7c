"""Block-sparse attention: what it does (``api``), its reference, and its fast paths."""
