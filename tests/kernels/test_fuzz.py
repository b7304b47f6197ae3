"""Random calls of every public function: documented exceptions, or what the reference gives.

A few of them, always the same; benchmarks/results/fuzz-kernels-cpu.json records 10,000.
"""

from __future__ import annotations

import pytest

import flowgrpo_kernels
from flowgrpo_kernels import blocks
from support.kernels import fuzz

EXAMPLES = 16
# What takes no tensors, or is a class or a module whose functions are named one by one.
OTHERS = {"GrpoLoss", "NftLoss", "Transitions", "backend_info", "warm_up"}
OTHERS |= {"blocks", "compat", "layers"}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_calls(name):
    fuzz.fuzz(name, EXAMPLES, shrink=False)


def test_every_public_function_is_called():
    public = set(flowgrpo_kernels.__all__) | set(blocks.__all__)
    assert public - OTHERS <= set(fuzz.TARGETS)
    assert {"flux_step", "sde_step_with_logprob"} <= set(fuzz.TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dtype", "value", "exception"])
def test_a_fault_is_found(fault, monkeypatch):
    """What the examples are there to find, put into a function."""
    target = fuzz.TARGETS["log_prob"]

    def faulty(velocity, **call):
        if fault == "exception" and not isinstance(velocity, fuzz.Tensor):
            raise KeyError("velocity")
        result = target.function(velocity=velocity, **call)
        on_reference = fuzz.dispatch.requested() == "reference"
        if fault == "dtype":
            return result.to(fuzz.torch.float16)
        return result + 1 if fault == "value" and not on_reference else result

    changed = fuzz.Target(faulty, target.call, target.check)
    monkeypatch.setitem(fuzz.TARGETS, "log_prob", changed)
    with pytest.raises(AssertionError):
        fuzz.fuzz("log_prob", 3000 if fault == "exception" else EXAMPLES, shrink=False)
