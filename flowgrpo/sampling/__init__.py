"""Noise -> T steps of the transition -> latents: the sampler and its schedules."""
