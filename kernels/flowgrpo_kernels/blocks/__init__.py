"""Element-wise ops of a diffusion transformer's block, each fused into one pass.

    y = norm_modulate(x, scale, shift)                  # LN(x) (1 + scale) + shift
    x = gated_residual(x, gate, y)                      # x + gate y
    q = joint_heads((image, text), (wi, wt), heads=24)  # RMSNorm of each head, rotary

Rollout and update call the same kernels, and what they give a token depends on that token alone:
not on the batch, the other tokens, the launch, or whether a gradient will be asked for. So speed
costs no bit of the ratio. The numerical contract of all backends is in reference.py.
"""

from .gated_residual import gated_residual
from .joint_heads import joint_heads
from .norm_modulate import norm_modulate

__all__ = ["gated_residual", "joint_heads", "norm_modulate"]
