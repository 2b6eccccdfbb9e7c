"""Texts of the command line: read as they are meant, or refused with one sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.cli.options import read_recipe, read_size
from dit_accel.recipe import AXES
from tests.properties.drawn_recipes import assert_sentence

sides = st.integers(1, 4096)


@given(sides, sides, st.sampled_from("xX"))
def test_a_size(width: int, height: int, cross: str):
    assert read_size(f"{width}{cross}{height}") == (width, height)


@given(
    st.one_of(
        st.text(max_size=12), st.from_regex(r"-?(0|[1-9][0-9]{0,2})?[x*]-?(0|[1-9][0-9]{0,2})?\n?", fullmatch=True)
    )
)
def test_any_text_is_a_size_or_refused(text: str):
    try:
        size = read_size(text)
    except ValueError as error:
        # The text itself may end a line.
        assert_sentence(ValueError(str(error).replace(repr(text), "this")))
    else:
        assert min(size) >= 1
        assert text.lower().partition("x")[0].isdigit()


names = st.one_of(
    st.sampled_from([f"{axis}.{field}" for axis in AXES for field in ("density", "block", "shape", "refresh_every")]),
    st.sampled_from(list(AXES)),
    st.text(max_size=8),
)
values = st.one_of(
    st.sampled_from(
        ("0.5", "(32, 32)", "None", "pooled", "1e400", "-1", "(1,", "__import__('os')", "[1, 2]", "9" * 400)
    ),
    st.text(max_size=8),
)


@given(names, values)
def test_any_field_and_value_is_set_or_refused(name: str, value: str):
    try:
        read_recipe("pooled", [f"{name}={value}"])
    except ValueError as error:
        assert_sentence(error)


@pytest.mark.parametrize("change", ["", "=", "select.density", "select.density=", "=0.5"])
def test_a_change_without_a_field_or_a_value_is_named(change: str):
    with pytest.raises(ValueError, match=r"--set must be AXIS.FIELD=VALUE"):
        read_recipe("pooled", [change])
