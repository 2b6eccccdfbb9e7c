"""Fixtures of this folder."""

from tests.patches.graph_stand_in import graphs  # noqa: F401
