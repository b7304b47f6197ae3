"""The trained weights and everything that moves with them: optimizer, average, old policy.

`State` bundles them with the counters of a run; it is what a checkpoint holds and the whole of what
the next iteration depends on. Weights are only ever changed in place, so that their addresses stay
those that a captured graph has recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from flowgrpo.config import ConfigError, OptimConfig
from flowgrpo.distributed import sharding
from flowgrpo.distributed.world import ALONE, World
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
                now = sharding.piece(parameter.detach()).float()
                sharding.piece(self.shadow[name]).lerp_(now, 1.0 - decay)

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
        with nullcontext() if self.weights == "live" else swapped(self.parameters, self.shadow):
            yield


@contextmanager
def swapped(
    parameters: dict[str, nn.Parameter], weights: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Put `weights` into `parameters`, by name and in place; the parameters come back with their
    bits."""
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in trained.items():
                parameters[name].copy_(tensor)


class OldPolicy:
    """The policy that samples where it is not the trained one: DiffusionNFT's (arXiv 2509.16117).

    After an iteration, with n optimizer steps so far, it follows the trained parameters:

        old <- eta old + (1 - eta) trained        eta = min(rise n, largest)
    """

    def __init__(self, parameters: dict[str, nn.Parameter], largest: float, rise: float) -> None:
        self.parameters, self.largest, self.rise = parameters, largest, rise
        self.weights = {name: p.detach().float().clone() for name, p in parameters.items()}
        """Its weights by name, float32."""

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """Follow the trained parameters after `updates` optimizer steps."""
        decay = min(self.rise * updates, self.largest)
        for name, parameter in self.parameters.items():
            # eta = 0 gives the parameter's own bits, which lerp at weight 1 does too.
            now = sharding.piece(parameter.detach()).float()
            sharding.piece(self.weights[name]).lerp_(now, 1.0 - decay)


@dataclass
class State:
    """All that the next iteration depends on, beside the configuration."""

    parameters: dict[str, nn.Parameter]
    """Trained parameters by name."""
    optimizer: torch.optim.AdamW
    config: OptimConfig
    ema: EMA
    old: OldPolicy | None = None
    """The policy that samples; None: the trained one."""
    iteration: int = 0
    """Completed iterations."""
    updates: int = 0
    """Completed optimizer steps."""
    totals: dict[str, Any] = field(default_factory=dict)
    """JSON values that a run sums up (seconds, dropped groups, the largest ratio error, ...)."""
    world: World = ALONE
    """The processes of the run."""

    @classmethod
    def create(
        cls,
        transformer: nn.Module,
        config: OptimConfig,
        old_policy: bool = False,
        world: World = ALONE,
    ) -> State:
        """Create the state before the first iteration of a transformer with its adapter in it.

        Args:
            old_policy: rollouts are those of an `OldPolicy`.
            world: the processes, which may have pieces of the parameters.
        """
        parameters = trained_parameters(transformer)
        full = not hasattr(transformer, "peft_config")
        optimizer = make_optimizer(list(parameters.values()), config, full)
        ema = EMA(parameters, config.ema_decay, config.ema_every)
        old = None
        if old_policy:
            old = OldPolicy(parameters, config.old_decay, config.old_decay_rise)
        return cls(parameters, optimizer, config, ema, old, world=world)

    @property
    def sharded(self) -> bool:
        """True: each process has a piece of the trained parameters, and of all that moves with
        them, so that saving and restoring is a matter of all."""
        return any(map(sharding.is_sharded, self.parameters.values()))

    def rollout_weights(self) -> AbstractContextManager[None]:
        """Put the weights of the rollout into the model: those of `old`, if there is one."""
        return nullcontext() if self.old is None else swapped(self.parameters, self.old.weights)

    def follow(self) -> None:
        """Let the old policy, if there is one, follow the trained one: once an iteration."""
        if self.old is not None:
            self.old.follow(self.updates)

    def step(self) -> torch.Tensor:
        """Take one optimizer step with the accumulated gradients, and drop them.

        Returns:
            The gradients' norm before clipping, a 0-dim tensor on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.updates)
        limit = self.config.max_grad_norm or math.inf
        parameters = list(self.parameters.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = sharding.whole(norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
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
        stored = {"weights": weights, "optimizer": moments, "ema": dict(self.ema.shadow)}
        return stored if self.old is None else {**stored, "old": dict(self.old.weights)}

    def counters(self) -> dict[str, Any]:
        """Counters of a checkpoint, as JSON values."""
        return {"updates": self.updates, "ema_updates": self.ema.updates, "totals": self.totals}

    def restore(self, checkpoint: Path) -> None:
        """Go back to `checkpoint`: every tensor in place, every counter; all or nothing."""
        state = checkpoints.read_state(checkpoint)
        files = self._read(checkpoint)
        weights = {name: p.detach() for name, p in self.parameters.items()}
        targets = {"weights": weights, "ema": self.ema.shadow}
        if self.old is not None:
            targets["old"] = self.old.weights
        for stem, into in targets.items():
            checkpoints.check(into, files[stem], checkpoint / f"{stem}.safetensors")
        moments = self._moments(files["optimizer"], checkpoint)
        for stem, into in targets.items():
            checkpoints.restore(into, files[stem])
        optimizer = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**optimizer, "state": moments})
        record = state["record"]
        self.iteration, self.updates = state["iteration"], record["updates"]
        self.ema.updates, self.totals = record["ema_updates"], record["totals"]

    def _read(self, checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
        """Read the tensors of a checkpoint by file stem and name, each cut as its parameter is."""
        if checkpoints.is_sharded(checkpoint):
            world = self.world if self.sharded else ALONE
            files = checkpoints.load_pieces(checkpoint, self._empty, world)
            return {stem: files.get(stem, {}) for stem in self.tensors()}
        files = {stem: checkpoints.load(checkpoint, stem) for stem in self.tensors()}
        if not self.sharded:
            return files
        return {
            stem: {name: self._cut(name, value) for name, value in values.items()}
            for stem, values in files.items()
        }

    def _parameter(self, name: str) -> nn.Parameter | None:
        """Find the parameter that a tensor of a checkpoint belongs to, by its name or its name with
        a slot of the optimizer."""
        return self.parameters.get(name.partition("|")[0])

    def _cut(self, name: str, value: torch.Tensor) -> torch.Tensor:
        parameter = self._parameter(name)
        fits = parameter is not None and value.shape == parameter.shape
        return sharding.like(value, parameter.detach()) if fits else value

    def _empty(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor for one of a checkpoint, cut as its parameter is."""
        parameter = self._parameter(name)
        if parameter is not None and parameter.shape == shape:
            return torch.empty_like(parameter.detach(), dtype=dtype)
        return torch.empty(shape, dtype=dtype)

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
