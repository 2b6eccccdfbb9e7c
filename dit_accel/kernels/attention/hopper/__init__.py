"""Block-sparse attention for compute capability 9.0, in Gluon; ``forward`` launches it."""
