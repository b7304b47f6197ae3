"""Rewards: images, prompts, metadata -> one score per image. One file per reward, and:

table.py       the rewards by name; a new one is a line there
interface.py   what a reward is, and its error
options.py     options of a reward: arguments, environment, defaults
scorer.py      the weighted sum of several, and what happens when one fails
background.py  rewards beside the rollout
models.py      weights of reward models
images.py      images as tensors, Pillow images, files, PNG
clip.py        CLIP embeddings, which several rewards share
remote/        rewards behind HTTP: clients, judges, the server
"""

from flowgrpo.rewards.interface import Reward as Reward
from flowgrpo.rewards.interface import RewardError as RewardError
from flowgrpo.rewards.scorer import Scorer as Scorer
from flowgrpo.rewards.table import REWARDS as REWARDS
from flowgrpo.rewards.table import load as load
