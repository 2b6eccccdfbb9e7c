"""The linear branch of sparse-linear attention."""
