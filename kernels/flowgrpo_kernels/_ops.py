"""Namespace of the ops in torch.ops.

A copy for Hugging Face's Hub has another one, so that it can be in one process with this package:
its build (kernels/hub/build.py, or kernel-builder) writes its own file in place of this one, with
the same three names. Nothing else knows a namespace.
"""

from __future__ import annotations

import torch

_OPS_NAME = "flowgrpo"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Write an op's full name, "namespace::name"."""
    return f"{_OPS_NAME}::{op_name}"
