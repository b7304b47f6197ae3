"""Objectives: what an update learns from, and what it minimises. One row of `OBJECTIVES` each.

`optim.objective` names the row. The loop (train.py, update.py) reads from it, in the order of an
iteration:

    weigh        rewards -> advantages and weights of the rows
    micro_steps  which rows share a forward, and how often each is looked at
    prepare      what all micro-steps share: conditioning, noise levels, old values
    gather       a micro-step -> its samples: trained steps of the trajectory, or re-noised results
    loss         samples -> the loss

table.py       the objectives by name; a new one is a line there
interface.py   what an objective is, and what its loss returns
advantages.py  rewards -> advantages
grpo.py        Flow-GRPO: steps of the sampler
matching.py    re-noised results, for objectives of the forward process
awm.py         advantage weighted matching
nft.py         DiffusionNFT
dpo.py         Flow-DPO
refl.py        the reward's own gradient, through the decoder and a late step
opd.py         on-policy distillation from a teacher's adapter
sft.py  orw.py supervised: the best of a group; each image by the exponential of its reward
curated.py     images and pairs of a curated set, in place of a rollout's results or beside them
"""

from flowgrpo.objectives.advantages import advantages as advantages
from flowgrpo.objectives.grpo import gather_trained_steps as gather_trained_steps
from flowgrpo.objectives.grpo import with_prepared_conditioning as with_prepared_conditioning
from flowgrpo.objectives.interface import Loss as Loss
from flowgrpo.objectives.interface import Objective as Objective
from flowgrpo.objectives.table import OBJECTIVES as OBJECTIVES
from flowgrpo.objectives.table import objective_of as objective_of
