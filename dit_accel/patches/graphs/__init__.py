"""Blocks whose launches are captured as CUDA graphs once a plan stays, and replayed: the host then launches a block in
the time of one kernel."""
