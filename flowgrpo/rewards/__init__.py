"""Rewards: images, prompts, metadata -> one score an image. One file a reward."""

from flowgrpo.rewards.interface import Reward as Reward
from flowgrpo.rewards.interface import RewardError as RewardError
from flowgrpo.rewards.scorer import Scorer as Scorer
from flowgrpo.rewards.table import REWARDS as REWARDS
from flowgrpo.rewards.table import load as load
