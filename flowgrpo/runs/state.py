"""The trained weights and everything that moves with them: LoRA, optimizer, average.

`State` bundles them with the counters of a run; it is what a checkpoint holds and the whole of what
the next iteration depends on. Weights are only ever changed in place, so that their addresses stay
what a captured graph has recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowgrpo.config import ConfigError, OptimConfig, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.policies.base import family_of
from flowgrpo.policies.lora import shorten
from flowgrpo.runs import checkpoints

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"


def add_adapter(transformer: nn.Module, config: PolicyConfig, seed: int = 0) -> list[nn.Parameter]:
    """Make `transformer` trainable and return its trained parameters, float32.

    With `config.adapter` "lora", LoRA matrices go into the linear layers named by
    `config.lora_targets` (by default those of the model's family) through diffusers and PEFT;
    everything else is frozen. A is drawn on the CPU from `seed`, so it is the same on every device;
    B is 0, so the model starts as its base. With "full" the whole transformer is trained.

    Raises:
        ConfigError: an ending of `config.lora_targets` matches no layer of the model, or a model
            to be trained whole is not float32.
    """
    if config.adapter == "full":
        dtypes = {str(p.dtype) for p in transformer.parameters()} - {"torch.float32"}
        require(
            not dtypes,
            f"policy.adapter is full and the model's weights are {', '.join(sorted(dtypes))}, but "
            "weights that are trained must be float32; set policy.dtype to float32.",
        )
        transformer.requires_grad_(True)
        return list(transformer.parameters())
    from peft import LoraConfig

    transformer.requires_grad_(False)
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    targets = config.lora_targets
    if targets is None:
        targets = family_of(transformer)[1].lora_targets
    for target in targets:
        require(
            any(name == target or name.endswith(f".{target}") for name in names),
            f"policy.lora_targets names {target!r}, but endings of the model's linear layers are "
            f"expected, for example {_endings(names)}; correct it.",
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(targets),
    )
    transformer.add_adapter(lora, adapter_name=ADAPTER)
    _draw_lora(transformer, config, seed)
    shorten(transformer)
    return list(named_parameters(transformer).values())


def _endings(names: list[str]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[2:]) or name for name in names})[:6])


def _draw_lora(transformer: nn.Module, config: PolicyConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in named_parameters(transformer).items():
        values = torch.zeros(parameter.shape, dtype=torch.float32)
        if ".lora_A." in name and config.lora_init == "gaussian":
            values.normal_(0.0, 1.0 / config.lora_rank, generator=generator)
        elif ".lora_A." in name:
            # kaiming_uniform_ with a = sqrt(5), PEFT's and nn.Linear's default.
            bound = 1.0 / math.sqrt(parameter.shape[1])
            values.uniform_(-bound, bound, generator=generator)
        # PEFT makes the matrices in the layer's dtype. A 16-bit adapter would lose updates of the
        # size that a learning rate of 1e-4 makes.
        parameter.data = values.to(parameter.device)


def named_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameters` with the learning rate of the first update."""
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate(config, 0),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, update: int) -> float:
    """Learning rate of the update number `update` (from 0): a linear rise over `warmup` updates to
    `lr`; with `decay`, a linear fall to a tenth of it over that many updates."""
    rise = min(1.0, (update + 1) / max(config.warmup, 1))
    fall = max(0.1, 1 - 0.9 * update / config.decay) if config.decay else 1.0
    return config.lr * rise * fall


class EMA:
    """Exponential moving average of the trained parameters, float32.

    As in flow_grpo, the decay rises with the number of updates, min(decay, (1 + n) / (10 + n)), so
    that the average forgets its start. With decay 0 the average is the parameters themselves.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, every: int = 1) -> None:
        self.parameters = parameters
        self.decay, self.every, self.updates = decay, every, 0
        self.shadow: dict[str, torch.Tensor] = {}
        if decay > 0:
            self.shadow = {n: p.detach().float().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count one optimizer step and, every `every` of them, move the average."""
        self.updates += 1
        if self.shadow and self.updates % self.every == 0:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            for name, parameter in self.parameters.items():
                self.shadow[name].lerp_(parameter.detach().float(), 1.0 - decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averaged parameters by name (the parameters themselves with decay 0)."""
        return self.shadow or {name: p.detach() for name, p in self.parameters.items()}

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Put the average into the model, in place; the parameters come back with their bits."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, tensor in self.shadow.items():
            self.parameters[name].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
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
        """The state before the first iteration of a transformer that `add_adapter` prepared."""
        parameters = named_parameters(transformer)
        optimizer = make_optimizer(list(parameters.values()), config)
        ema = EMA(parameters, config.ema_decay, config.ema_every)
        return cls(parameters, optimizer, config, ema)

    def step(self) -> torch.Tensor:
        """One optimizer step from the accumulated gradients, then none are left.

        Returns:
            The gradients' norm before scaling, a 0-dim tensor on the device.
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
        """File stem -> name -> tensor: what a checkpoint stores."""
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
        """The JSON half of what a checkpoint stores."""
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


def export(transformer: nn.Module, ema: EMA, config: PolicyConfig, folder: Path) -> None:
    """Write the averaged weights for diffusers: a file for `pipe.load_lora_weights(folder)`, or for
    full fine-tuning a folder for `from_pretrained(folder)` of the transformer's class."""
    with ema.swapped():
        if config.adapter == "full":
            transformer.save_pretrained(folder)
            return
        import diffusers
        from peft.utils import get_peft_model_state_dict

        getattr(diffusers, family_of(transformer)[0]).save_lora_weights(
            save_directory=folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
            transformer_lora_adapter_metadata=transformer.peft_config[ADAPTER].to_dict(),
        )


def load_trained(transformer: nn.Module, checkpoint: Path) -> None:
    """Put the averaged weights of `checkpoint` into a transformer that `add_adapter` prepared."""
    stem = "ema" if checkpoints.load(checkpoint, "ema") else "weights"
    values = checkpoints.load(checkpoint, stem)
    parameters = {n: p.detach() for n, p in named_parameters(transformer).items()}
    checkpoints.check(parameters, values, checkpoint / f"{stem}.safetensors")
    checkpoints.restore(parameters, values)
