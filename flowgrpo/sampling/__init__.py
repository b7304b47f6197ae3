"""Noise -> T steps of the transition -> latents: the sampler and its schedules.

rollout.py        all rows of an iteration, chunk by chunk, and its captured form
shared_prefix.py  another rollout: the rows of a group share the steps before their window
scouts.py         previews of candidates, of which the best and the worst are sampled in full
schedule.py       sigmas, the transition table, the windows
"""
