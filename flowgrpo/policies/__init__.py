"""Models that can be trained: one abstract `Policy`, one file for each family."""

from flowgrpo.policies.base import Conditioning as Conditioning
from flowgrpo.policies.base import Policy as Policy
