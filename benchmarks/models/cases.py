"""Cases of the suites of whole models: model, batch size, steps, guidance, window, KL.

A case is one forward geometry. `batch` rows go through one forward (guidance doubles them),
`chunks` such forwards make an iteration; each group is one chunk, or all rows at batch 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from measuring.timing import Options
from models import configurations
from models.configurations import FLUX_DEV, SD35_MEDIUM, TINY_FLUX, TINY_SD3, Model

GUIDANCE = 4.5
BETA = 0.04


@dataclass(frozen=True)
class Case:
    """One forward geometry, and the steps and chunks of an iteration with it."""

    model: Model
    batch: int
    steps: int
    guidance: float = 1.0
    """1: no guidance, one forward a step."""
    window: int = 0
    """Trained steps of a row; 0: all but the last."""
    beta: float = 0.0
    chunks: int = 1

    @property
    def rows(self) -> int:
        return self.batch * self.chunks

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0

    @property
    def group_size(self) -> int:
        return self.batch if self.batch > 1 else self.rows

    @property
    def groups(self) -> int:
        return self.rows // self.group_size

    @property
    def trained_steps(self) -> int:
        """Steps of a row that an update trains; 0.99 is flow_grpo's timestep_fraction."""
        return self.window or int(self.steps * 0.99)

    @property
    def name(self) -> str:
        """The name in a record: model, steps, batch, guidance."""
        guidance = "cfg" if self.guided else "no-cfg"
        return f"{self.model.name} t{self.steps} b{self.batch} {guidance}"

    @property
    def training_name(self) -> str:
        """The name with what an update adds: its window and KL."""
        window = f"w{self.window}" if self.window else "full"
        return f"{self.name} {window} {'kl' if self.beta else 'no-kl'}"

    @property
    def forwards(self) -> int:
        """Forwards of one sample in one step."""
        return 2 if self.guided else 1

    @property
    def rollout_flops(self) -> int:
        """Operations of the denoising of `rows` images."""
        return self.rows * self.steps * self.forwards * self.model.forward.total

    @property
    def micro_step_flops(self) -> int:
        """Operations of one chunk at one trained step: forward, backward of the conditional half
        (the other is a constant), reference forward."""
        forward = self.model.forward
        passes = self.forwards * forward.total * (2 if self.beta else 1)
        return self.batch * (passes + forward.backward)

    @property
    def iteration_flops(self) -> int:
        """Operations of a rollout and its update, without decoding."""
        return self.rollout_flops + self.chunks * self.trained_steps * self.micro_step_flops


def timed(cases: Callable[[bool], list[Case]], options: Options) -> list[Case]:
    """Cases that are timed with these options: without a GPU those of nano alone, since one call of
    a larger model takes minutes there and tens of gigabytes."""
    chosen = cases(options.smoke)
    if options.smoke or options.device == "cuda":
        return chosen
    return [case for case in chosen if case.model.name == "nano"]


def _chunks(batch: int) -> int:
    """Rewards are compared inside a group, which needs two rows."""
    return 2 if batch == 1 else 1


def rollout(smoke: bool = False) -> list[Case]:
    """Cases of suite `rollout`. The most telling come first: a limit of time cuts off the last."""
    if smoke:
        return [
            Case(TINY_SD3, 2, 3),
            Case(TINY_SD3, 1, 3, GUIDANCE, chunks=2),
            Case(TINY_FLUX, 2, 2),
        ]
    sd3 = [
        Case(SD35_MEDIUM, batch, 10, guidance, chunks=_chunks(batch))
        for guidance in (1.0, GUIDANCE)
        for batch in (16, 1, 32, 9, 4)
    ]
    flux = [
        Case(FLUX_DEV, batch, steps, chunks=_chunks(batch))
        for steps in (6, 10)
        for batch in (4, 8, 1)
    ]
    return [*sd3, *flux, Case(configurations.nano(), 48, 10)]


def update(smoke: bool = False) -> list[Case]:
    """Cases of suite `update`. Two trained steps of each chunk: enough to time a micro-step."""
    if smoke:
        return [
            Case(TINY_SD3, 2, 4, window=2),
            Case(TINY_SD3, 1, 4, GUIDANCE, 2, BETA, 2),
            Case(TINY_FLUX, 2, 4, window=2),
        ]
    sd3 = [
        Case(SD35_MEDIUM, batch, 10, guidance, 2, beta, _chunks(batch))
        for guidance in (1.0, GUIDANCE)
        for beta in (0.0, BETA)
        for batch in (16, 1, 9, 4)
    ]
    flux = [Case(FLUX_DEV, batch, 6, window=2, chunks=_chunks(batch)) for batch in (1, 4)]
    return [*sd3, *flux, Case(configurations.nano(), 48, 10, 1.0, 2, BETA)]


def iteration(smoke: bool = False) -> list[Case]:
    """Cases of suite `iteration`: all steps or a window of three, with and without KL, guidance."""
    if smoke:
        return [
            Case(TINY_SD3, 2, 4, chunks=2),
            Case(TINY_SD3, 2, 4, GUIDANCE, 2, BETA, 2),
        ]
    base = Case(SD35_MEDIUM, 16, 10)
    cases = [replace(base, window=window, beta=beta) for window in (0, 3) for beta in (0.0, BETA)]
    # The paper's: guidance, every step, KL. Nine rows of it are flow_grpo's batch.
    cases.append(replace(base, batch=9, guidance=GUIDANCE, beta=BETA))
    cases.append(Case(FLUX_DEV, 4, 6, window=3))
    return [*cases, Case(configurations.nano(), 48, 10, 1.0, 2, BETA, 2)]
