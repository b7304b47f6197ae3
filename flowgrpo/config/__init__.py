"""The configuration of a run: `Config`, its five sections, and the error that states a rule."""

from flowgrpo.config.config import Config as Config
from flowgrpo.config.config import from_dict as from_dict
from flowgrpo.config.config import from_json as from_json
from flowgrpo.config.config import to_dict as to_dict
from flowgrpo.config.config import to_json as to_json
from flowgrpo.config.sections import OptimConfig as OptimConfig
from flowgrpo.config.sections import PolicyConfig as PolicyConfig
from flowgrpo.config.sections import RewardConfig as RewardConfig
from flowgrpo.config.sections import RunConfig as RunConfig
from flowgrpo.config.sections import SampleConfig as SampleConfig
from flowgrpo.config.validation import ConfigError as ConfigError
from flowgrpo.config.validation import replace as replace
