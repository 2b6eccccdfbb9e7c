"""Changes of one module, undone in any order: what is left is what the others alone would have made."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
from torch import nn

from dit_accel.acceleration.stacked import StackedChange


class Written:
    """A change that writes a letter behind a module's word."""

    def __init__(self, module: nn.Module, letter: str) -> None:
        self.module = module
        self.letter = letter

    def __call__(self):
        before = self.module.word
        self.module.word = before + self.letter
        return lambda: setattr(self.module, "word", before)


def module_with_word() -> nn.Module:
    module = nn.Module()
    module.word = ""
    return module


@pytest.mark.parametrize("order", itertools.permutations("abcd"), ids="".join)
def test_any_order(order):
    module = module_with_word()
    changes = {letter: StackedChange(module, Written(module, letter)) for letter in "abcd"}
    left = "abcd"
    for letter in order:
        changes[letter].undo()
        left = left.replace(letter, "")
        assert module.word == left
        changes[letter].undo()
        assert module.word == left


def test_a_change_made_between_two_undos():
    module = module_with_word()
    first, second = (StackedChange(module, Written(module, letter)) for letter in "ab")
    first.undo()
    third = StackedChange(module, Written(module, "c"))
    assert module.word == "bc"
    second.undo()
    assert module.word == "c"
    third.undo()
    assert module.word == ""


def test_modules_are_apart():
    one, other = module_with_word(), module_with_word()
    change = StackedChange(one, Written(one, "a"))
    StackedChange(other, Written(other, "b"))
    change.undo()
    assert (one.word, other.word) == ("", "b")


def test_nothing_keeps_a_module_alive():
    module = module_with_word()
    change = StackedChange(module, Written(module, "a"))
    alive = weakref.ref(module)
    del module, change
    gc.collect()
    assert alive() is None


def test_a_change_that_nobody_can_undo_stays():
    module = module_with_word()
    StackedChange(module, Written(module, "a"))
    second = StackedChange(module, Written(module, "b"))
    second.undo()
    assert module.word == "a"


def test_a_change_that_fails_is_not_one_of_them():
    module = module_with_word()
    first = StackedChange(module, Written(module, "a"))

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        StackedChange(module, fails)
    first.undo()
    assert module.word == ""
