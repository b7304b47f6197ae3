"""Choice of a backend: what the variable and the table of backends say, and what is logged."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from flowgrpo_kernels import backend_info, flow_sde, initial_noise, reference, sde_step
from flowgrpo_kernels.backends import compiled, dispatch, native, triton
from support import torch_fork
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)
B = oracle.batch(3, (4, 5))
STEP = {"velocity": B.velocity, "sample": B.sample, "transitions": TRANSITIONS, "step": B.step}


def first_call(choice: str, caplog) -> list[tuple[str, str]]:
    """(level, line) logged by two calls under a fresh choice of backend."""
    caplog.clear()
    with caplog.at_level("INFO", "flowgrpo_kernels"), dispatch.use_backend(choice):
        dispatch.log_once.cache_clear()
        for _ in range(2):
            initial_noise(B.seeds, (3,))
            sde_step(**STEP, seeds=B.seeds)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_backend_choice_is_loud(caplog, monkeypatch):
    """One line says what runs; an explicit choice that cannot be met raises and says why."""
    has_native = bool(dispatch.backends()["native"]["available"])
    ((level, line),) = first_call("auto", caplog)
    assert level == ("INFO" if has_native else "WARNING")
    start = "cpu tensors run on native" if has_native else "cpu tensors fall back to"
    assert line.startswith(start)
    ((level, line),) = first_call("reference", caplog)
    assert (level, line) == ("INFO", "cpu tensors run on reference (FLOWGRPO_KERNELS)")
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    cases = [("triton", "cannot run initial_noise on cpu: "), ("fast", "must be one of")]
    for choice, why in cases if has_native else [*cases, ("native", "cannot run")]:
        with pytest.raises(RuntimeError, match=f"FLOWGRPO_KERNELS.*{why}"):
            first_call(choice, caplog)
        ops = {}
        with dispatch.use_backend(choice):
            ops = backend_info()["ops"]["cpu"]
        assert all(value.startswith("error: FLOWGRPO_KERNELS") for value in ops.values())


def test_backend_choice_is_read_from_the_environment():
    env = {**os.environ, "FLOWGRPO_KERNELS": " Reference "}
    code = "import flowgrpo_kernels as fk; print(fk.backend_info()['requested'])"
    done = torch_fork.run(code, env=env)
    assert done.stdout.strip() == "reference"


def test_every_op_has_what_its_table_says():
    """Each op has its reference's name; the native library has the ops that are meant for it."""
    assert set(native.OPS) == {op.name for op in dispatch.OPS.values() if "native" in op.backends}
    for op in dispatch.OPS.values():
        assert op.reference.__name__ == op.name and op.backends[-1] == "reference"
        assert dispatch.op(op.name).name() == f"{dispatch.NAMESPACE}::{op.name}"
    assert set(triton.launchers) == set(dispatch.OPS)
    for order in (*dispatch.ORDER.values(), dispatch.OTHER_DEVICES):
        assert order[-1] == "reference" and set(order) <= set(dispatch.CHOICES)


def backend(why: str, function=None) -> SimpleNamespace:
    """A backend that has every op (`function`), or none for a reason."""
    return SimpleNamespace(
        find=lambda op, device_type: (function, "" if function else why),
        status=lambda: (function is not None, why),
    )


def test_a_new_backend_takes_its_place_in_the_order(caplog, monkeypatch):
    """Takes the first of the order that runs an op and names those before it; a warning of the
    reference alone."""

    def doubled(seeds, shape, dtype):
        return 2 * reference.initial_noise(seeds, shape, dtype)

    monkeypatch.setitem(dispatch.BACKENDS, "absent", backend("there is no such library"))
    monkeypatch.setitem(dispatch.BACKENDS, "second", backend("", doubled))
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("absent", "second", "reference"))
    op = dispatch.OPS["initial_noise"]
    plain = reference.initial_noise(B.seeds, [5], torch.float32)
    for names, factor, record in (
        (("absent", "second"), 2, ("INFO", "run on second: there is no such library")),
        (("second",), 2, ("INFO", "run on second")),
        (("absent",), 1, ("WARNING", "fall back to the PyTorch reference: there is no")),
        ((), 1, ("INFO", "run on reference")),
    ):
        known = dispatch.Op(op.name, op.schema, op.reference, (*names, "reference"))
        monkeypatch.setitem(dispatch.OPS, op.name, known)
        caplog.clear()
        dispatch.log_once.cache_clear()
        with caplog.at_level("INFO", "flowgrpo_kernels"), dispatch.use_backend("auto"):
            assert torch.equal(initial_noise(B.seeds, (5,)), factor * plain)
        (line,) = caplog.records
        assert line.levelname == record[0] and record[1] in line.getMessage()
    assert backend_info()["backends"]["absent"]["reason"] == "there is no such library"


def test_a_call_without_code_goes_to_the_next_backend(caplog, monkeypatch):
    """A backend that has no code for a call: the next one runs it, unless that one was demanded."""

    def unserved(seeds, shape, dtype):
        raise compiled.Unserved("rows of 5 are odd")

    monkeypatch.setitem(dispatch.BACKENDS, "some", backend("", unserved))
    monkeypatch.setattr(dispatch, "CHOICES", (*dispatch.CHOICES, "some"))
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("some", "reference"))
    op = dispatch.OPS["initial_noise"]
    known = dispatch.Op(op.name, op.schema, op.reference, ("some", "reference"))
    monkeypatch.setitem(dispatch.OPS, op.name, known)
    dispatch.log_once.cache_clear()
    with caplog.at_level("INFO", "flowgrpo_kernels"), dispatch.use_backend("auto"):
        for _ in range(2):
            noise = initial_noise(B.seeds, (5,))
    assert torch.equal(noise, reference.initial_noise(B.seeds, [5], torch.float32))
    first, second = caplog.records
    assert first.getMessage() == "cpu tensors run on some" and second.levelname == "WARNING"
    assert "initial_noise on cpu also runs on reference: rows of 5 are odd" in second.getMessage()
    with dispatch.use_backend("some"), pytest.raises(RuntimeError, match="rows of 5 are odd; use"):
        initial_noise(B.seeds, (5,))
