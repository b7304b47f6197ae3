"""The trained weights and everything that moves with them: optimizer and average.

`State` bundles them with the counters of a run; it is what a checkpoint holds and the whole of what
the next iteration depends on. Weights are only ever changed in place, so that their addresses stay
those that a captured graph has recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from flowgrpo.config import ConfigError, OptimConfig
from flowgrpo.policies.adapters import trained_parameters
from flowgrpo.runs import checkpoints


def adam_eps(config: OptimConfig, full: bool) -> float:
    """Choose AdamW's epsilon: `optim.eps` or, where that is 0, by what is trained.

    The embedded model's gradients in full fine-tuning have an RMS of 1e-5, with a fifth of them
    below 1e-8 and 2 % below 1e-10. A larger model's are smaller in proportion to the root of the
    number of its weights: 30 times for SD3.5-medium.
    """
    return config.eps or (1e-12 if full else 1e-8)


def make_optimizer(
    parameters: list[nn.Parameter], config: OptimConfig, full: bool = False
) -> torch.optim.AdamW:
    """Create AdamW over `parameters` with the learning rate of the first update; `full`: they are
    all of a transformer's."""
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate(config, 0),
        betas=config.betas,
        eps=adam_eps(config, full),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, update: int) -> float:
    """Compute the learning rate of the update number `update` (from 0): a linear rise over `warmup`
    updates to `lr`; with `decay`, a linear fall to a tenth of it over that many updates."""
    rise = min(1.0, (update + 1) / max(config.warmup, 1))
    fall = max(0.1, 1 - 0.9 * update / config.decay) if config.decay else 1.0
    return config.lr * rise * fall


Weights = Literal["average", "live"]
"""Weights that are evaluated and exported: the average, or the parameters as the last update left
them."""


def start_share(decay: float, interval: int, updates: int) -> float:
    """Compute the weight of the untrained parameters in the average after `updates` updates.

    It is the product of the decays so far. 1: the average has not moved; 0: there is none.
    """
    if not decay:
        return 0.0
    return math.prod(_decay(decay, n) for n in range(interval, updates + 1, interval))


def shown_weights(decay: float, interval: int, updates: int) -> Weights:
    """Choose what is evaluated and exported after `updates` optimizer steps: the average, once the
    untrained parameters are no more than half of it; until then, and with decay 0, the live ones.
    """
    return "average" if decay and start_share(decay, interval, updates) <= 0.5 else "live"


def _decay(decay: float, update: int) -> float:
    return min(decay, (1 + update) / (10 + update))


class EMA:
    """Exponential moving average of the trained parameters, float32.

    As in flow_grpo, the decay rises with the number of updates, min(decay, (1 + n) / (10 + n)), so
    that the average forgets its start. With decay 0 the average is the parameters themselves. Until
    it has forgotten half of its start, the parameters stand in for it (`weights`).
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], decay: float, interval: int = 1
    ) -> None:
        self.parameters = parameters
        self.decay, self.interval, self.updates = decay, interval, 0
        self.shadow: dict[str, torch.Tensor] = {}
        if decay > 0:
            self.shadow = {n: p.detach().float().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count one optimizer step and, every `interval` of them, move the average."""
        self.updates += 1
        if self.shadow and self.updates % self.interval == 0:
            decay = _decay(self.decay, self.updates)
            for name, parameter in self.parameters.items():
                self.shadow[name].lerp_(parameter.detach().float(), 1.0 - decay)

    @property
    def weights(self) -> Weights:
        """The weights that are evaluated and exported now, see `shown_weights`."""
        return shown_weights(self.decay, self.interval, self.updates)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters by name that are evaluated and exported."""
        if self.weights == "average":
            return self.shadow
        return {name: p.detach() for name, p in self.parameters.items()}

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Put what is evaluated and exported (`tensors`) into the model, in place.

        The parameters come back with their bits.
        """
        if self.weights == "live":
            yield
            return
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, tensor in self.shadow.items():
            self.parameters[name].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in trained.items():
                    self.parameters[name].copy_(tensor)


@dataclass
class State:
    """All that the next iteration depends on, beside the configuration."""

    parameters: dict[str, nn.Parameter]
    """Trained parameters by name."""
    optimizer: torch.optim.AdamW
    config: OptimConfig
    ema: EMA
    iteration: int = 0
    """Completed iterations."""
    updates: int = 0
    """Completed optimizer steps."""
    totals: dict[str, Any] = field(default_factory=dict)
    """JSON values that a run sums up (seconds, dropped groups, the largest ratio error, ...)."""

    @classmethod
    def create(cls, transformer: nn.Module, config: OptimConfig) -> State:
        """Create the state before the first iteration of a transformer with its adapter in it."""
        parameters = trained_parameters(transformer)
        full = not hasattr(transformer, "peft_config")
        optimizer = make_optimizer(list(parameters.values()), config, full)
        ema = EMA(parameters, config.ema_decay, config.ema_every)
        return cls(parameters, optimizer, config, ema)

    def step(self) -> torch.Tensor:
        """Take one optimizer step with the accumulated gradients, and drop them.

        Returns:
            The gradients' norm before clipping, a 0-dim tensor on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.updates)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.ema.update()
        return norm

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors of a checkpoint: file stem -> name -> tensor."""
        names = list(self.parameters)
        stored = self.optimizer.state_dict()["state"]
        moments = {
            f"{names[index]}|{key}": value
            for index, values in stored.items()
            for key, value in values.items()
        }
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {"weights": weights, "optimizer": moments, "ema": dict(self.ema.shadow)}

    def counters(self) -> dict[str, Any]:
        """Counters of a checkpoint, as JSON values."""
        return {"updates": self.updates, "ema_updates": self.ema.updates, "totals": self.totals}

    def restore(self, checkpoint: Path) -> None:
        """Go back to `checkpoint`: every tensor in place, every counter; all or nothing."""
        state = checkpoints.read_state(checkpoint)
        files = {stem: checkpoints.load(checkpoint, stem) for stem in self.tensors()}
        weights = {name: p.detach() for name, p in self.parameters.items()}
        for into, stem in ((weights, "weights"), (self.ema.shadow, "ema")):
            checkpoints.check(into, files[stem], checkpoint / f"{stem}.safetensors")
        moments = self._moments(files["optimizer"], checkpoint)
        for into, stem in ((weights, "weights"), (self.ema.shadow, "ema")):
            checkpoints.restore(into, files[stem])
        optimizer = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**optimizer, "state": moments})
        record = state["record"]
        self.iteration, self.updates = state["iteration"], record["updates"]
        self.ema.updates, self.totals = record["ema_updates"], record["totals"]

    def _moments(self, stored: dict[str, torch.Tensor], checkpoint: Path) -> dict[int, dict]:
        """Sort the optimizer's tensors of a file by the number of their parameter."""
        index = {name: number for number, name in enumerate(self.parameters)}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in stored.items():
            name, _, slot = key.rpartition("|")
            fits = name in index and value.shape in ((), self.parameters[name].shape)
            if not fits:
                raise ConfigError(
                    f"{checkpoint / 'optimizer.safetensors'} holds {key} {list(value.shape)}, but "
                    "the moments of this model's parameters are expected; use the configuration "
                    "that wrote it."
                )
            moments.setdefault(index[name], {})[slot] = value
        return moments
