"""Decoding of latents to pictures by the VAE, and encoding of pictures, or without one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def prepare(vae: nn.Module | None, device: torch.device, slicing: bool) -> None:
    """Lay the decoder out for `device`; with `slicing` it takes one image at a time."""
    if vae is None:
        return
    if device.type == "cuda":
        # cuDNN's 16-bit convolutions work on channels-last tensors and would convert each time.
        vae.to(memory_format=torch.channels_last)
    if slicing:
        vae.enable_slicing()


def decode(vae: nn.Module | None, latents: Tensor) -> Tensor:
    """float32 pixels [B, 3, H, W], about [-1, 1], of latents [B, C, h, w], decoded in the VAE's
    dtype. Without a VAE the latents are the pixels."""
    if vae is None:
        return latents
    return run_decoder(vae, latents / vae.config.scaling_factor + vae.config.shift_factor)


def run_decoder(vae: nn.Module, latents: Tensor) -> Tensor:
    """float32 pixels [B, 3, H, W] of latents [B, C, h, w] at the decoder's own scale."""
    latents = latents.to(vae.dtype)
    if latents.device.type == "cuda":
        latents = latents.contiguous(memory_format=torch.channels_last)
    return vae.decode(latents, return_dict=False)[0].float()


def encode(vae: nn.Module | None, pixels: Tensor) -> Tensor:
    """float32 latents [B, C, h, w] of float32 pixels [B, 3, H, W] in [-1, 1], as `decode` takes
    them: the mean of the VAE's distribution. Without a VAE the pixels are the latents."""
    if vae is None:
        return pixels
    latents = run_encoder(vae, pixels)
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).contiguous()


def run_encoder(vae: nn.Module, pixels: Tensor) -> Tensor:
    """float32 latents [B, C, h, w], at the encoder's own scale, of pixels [B, 3, H, W]: the mean of
    its distribution."""
    pixels = pixels.to(vae.dtype)
    if pixels.device.type == "cuda":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return vae.encode(pixels, return_dict=False)[0].mode().float()


def to_images(pixels: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W] of pixels in [-1, 1]."""
    # A rollout's images go to the rewards and into files as ordinary [B, 3, H, W] tensors.
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def to_pixels(images: Tensor) -> Tensor:
    """float32 pixels [B, 3, H, W] in [-1, 1] of uint8 images."""
    return images.float() / 127.5 - 1
