"""Providers of whole models as the suites use them: built once, dropped when memory is needed."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from measuring import memory
from models.cases import Case
from providers import flow_grpo, ours
from providers.flow_grpo import FlowGrpoBaseline

# As the trainer sets it, which is too late where matrices are multiplied before it is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CHANGES: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-loop": {"sample.capture": "off"},
    "ours-captured": {"optim.capture": "on"},
    "ours-compiled": {"policy.compile": True},
    "ours-fused": {"policy.fused": True},
}
"""Variants of ours: changes of the trainer's configuration."""
PROVIDERS = (*CHANGES, "eager", "compile")
GPU_ONLY = ("ours-loop", "ours-captured")
"""Without a GPU nothing is captured, and these are `ours`."""
COMPILED = ("ours-compiled", "compile")


class Pool:
    """Builds providers; all cases of a model share a baseline."""

    def __init__(self, device: str, trained: bool, changes: dict[str, Any] | None = None) -> None:
        """trained: the baselines' weights for the update count among the resident ones.
        changes: fields of the trainer's configuration, for every variant of ours."""
        self.device, self.trained, self.changes = device, trained, changes or {}
        self.resident: dict[str, int] = {}
        """Provider -> bytes of its weights."""
        self._baselines: dict[str, FlowGrpoBaseline] = {}

    def build(self, name: str, case: Case, whole: bool = False) -> Any:
        """The provider `name` ready for `case`; whole: with its text encoders."""
        if name in CHANGES:
            before = memory.resident(self.device)
            provider = ours.Ours(case, self.device, whole, **CHANGES[name], **self.changes)
            self.resident[name] = memory.resident(self.device) - before
            return provider
        label = f"{name} {case.model.name}"
        if label not in self._baselines:
            self.forget()
            self._baselines = {
                key: baseline
                for key, baseline in self._baselines.items()
                if key.endswith(f" {case.model.name}")
            }
            before = memory.resident(self.device)
            setting = flow_grpo.setting(name, case.model, self.device)
            baseline = FlowGrpoBaseline(case.model, setting, self.device)
            _ = baseline.serving
            if self.trained:
                # Now, so that the weights count as resident in every case.
                _ = baseline.trained
            self._baselines[label] = baseline
            self.resident[name] = memory.resident(self.device) - before
        self._baselines[label].prepare(case)
        return self._baselines[label]

    def drop(self, name: str) -> None:
        """Build the baseline `name`, or "all", anew next time."""
        self._baselines = {
            key: baseline
            for key, baseline in self._baselines.items()
            if name != "all" and not key.startswith(f"{name} ")
        }

    def forget(self) -> None:
        """Free compiled code and memory that earlier cases have left."""
        # Its import takes as long as a small suite, and without compile it is not needed.
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        memory.release(self.device)
