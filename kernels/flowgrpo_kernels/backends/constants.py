"""Numbers that Triton kernels read as globals of their module.

At each launch Triton compares every global that a kernel reads with what it was when the kernel was
compiled: fifteen of them for sde_step. Two tl.constexpr compare by making a third one, and reading
that. A Constant cannot change, so that the same object has to be the same number.
"""

from __future__ import annotations

try:
    from triton.language import constexpr
except ImportError:
    constexpr = None


def constant(value: float):
    """Makes a number that kernels may read as a global; without Triton the number itself."""
    return value if constexpr is None else Constant(value)


if constexpr is not None:

    class Constant(constexpr):
        """tl.constexpr that is never another number, compared with itself at no cost."""

        def __setattr__(self, name: str, value: object) -> None:
            if name in vars(self):
                raise AttributeError(f"{self!r} is a constant: its {name} cannot change")
            super().__setattr__(name, value)

        def __deepcopy__(self, memo: dict) -> Constant:
            # The copy that Triton keeps, to compare with.
            return self

        def __ne__(self, other: object):
            return other is not self and super().__ne__(other)

        __hash__ = constexpr.__hash__
