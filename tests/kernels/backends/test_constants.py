"""Constants of the kernels: what Triton's check at each launch and its cache see of them."""

from __future__ import annotations

import copy
import operator

import pytest

tl = pytest.importorskip("triton.language")

from flowgrpo_kernels.backends.constants import constant  # noqa: E402
from flowgrpo_kernels.sde_step import sde_step_kernel  # noqa: E402


def test_unchanged_is_the_same_object():
    """Triton keeps a deep copy, and asks for `!=`: nothing is made for the answer."""
    four = constant(4)
    kept = copy.deepcopy(four)
    assert kept is four and (four != kept) is False


@pytest.mark.parametrize("other", [constant(5), tl.constexpr(5), 5, None], ids=repr)
def test_another_value_is_seen(other):
    assert constant(4) != other and tl.constexpr(4) != constant(5)


@pytest.mark.parametrize("other", [constant(4), tl.constexpr(4), 4], ids=repr)
def test_another_object_of_the_same_value_is_no_change(other):
    changed = operator.ne(constant(4), other)
    assert not changed
    assert constant(4) == other and other == constant(4)


def test_is_a_constexpr_to_the_compiler():
    """With the text that goes into the key of Triton's cache, and what expressions give."""
    four, plain = constant(4), tl.constexpr(4)
    assert isinstance(four, tl.constexpr) and repr(four) == repr(plain)
    assert hash(four) == hash(plain) and four.type == plain.type
    assert (four + 1).value == 5 and (four == 4).value is True
    assert list(range(10))[four] == 4 and constant(four).value == 4


@pytest.mark.parametrize("name", ["value", "type"])
def test_cannot_change_in_place(name):
    """Or the check, which looks at the object, would miss it."""
    four = constant(4)
    with pytest.raises(AttributeError, match=f"its {name} cannot change"):
        setattr(four, name, 5)
    assert four.value == 4


def test_every_global_of_a_kernel_is_one():
    """Of the longest list of them."""
    function = sde_step_kernel.fn
    read = {n: function.__globals__[n] for n in function.__code__.co_names if n.isupper()}
    assert len(read) > 8
    assert all(copy.deepcopy(value) is value for value in read.values())
