"""What torch.distributed's default process group needs, to end when it is destroyed."""

from __future__ import annotations

from importlib import import_module


def load_group_defaults() -> None:
    """Import what takes the group of its import as a default argument; call it before the group is made.

    ``torch.distributed.nn.functional`` is imported by others at some time. Once there is a group its functions would
    keep it: threads of gloo would run on when the interpreter ends, and now and then abort the process.
    """
    import_module("torch.distributed.nn.functional")
