"""The compiled backend over a stub of the driver: what serves a device, and what is refused.

The stub takes the place of libcuda.so.1 in this process, so where there is a GPU these tests are
left out; test_gpu.py has the kernels themselves then.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import flowgrpo_kernels
from flowgrpo_kernels import backend_info, flow_sde, initial_noise, log_prob, sde_step
from flowgrpo_kernels.aot import table
from flowgrpo_kernels.backends import (
    compiled,
    cuda_driver,
    dispatch,
    images,
    native_library,
    triton,
)
from measuring import stub_driver
from support import torch_fork
from support.kernels import oracle

pytestmark = [
    pytest.mark.skipif(bool(stub_driver.missing()), reason=stub_driver.missing()),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the driver itself is here"),
]
TESTS = Path(__file__).resolve().parents[2]
TRANSITIONS = flow_sde(oracle.SIGMAS)
B = oracle.batch(2, (16,), torch.bfloat16, torch.float32)


@pytest.fixture
def stub(monkeypatch):
    """An H100's driver, CPU tensors as its own, no Triton, nothing loaded or said before."""
    driver = stub_driver.install()
    driver.reset()
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    dispatch.log_once.cache_clear()
    with driver.tensors_of("cpu"), dispatch.use_backend("auto"):
        yield driver
    driver.reset()


def step(b=B, **given):
    given = given or {"seeds": b.seeds}
    return sde_step(b.velocity, b.sample, TRANSITIONS, 3, **given)


def images_of(stub, target: str, *keys: str) -> list[int]:
    pack = images.Manifest().pack(target)
    return [stub.digest(pack.image(key).binary) for key in keys]


def key_of(call) -> str:
    (key,) = table.recorded([call])
    return key


STEP = key_of(step)


def test_a_step_is_one_launch(stub, caplog):
    with caplog.at_level("INFO", "flowgrpo_kernels"):
        step()
        step()
    one, two = stub.launches()
    assert one.name == "sde_step_kernel" and one.image == images_of(stub, "sm_90a", STEP)[0]
    assert one.grid == (2, 1, 1) and one.block == (128, 1, 1) and stub.modules() == 1
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("INFO", "cpu tensors run on compiled")
    # Outputs are allocated anew; all else is the same.
    assert one._replace(parameters=b"") == two._replace(parameters=b"")


def test_backend_info_names_the_image(stub):
    info = backend_info()
    count = len(images.Manifest().kernels)
    version = images.Manifest().versions["triton"]
    assert info["images"] == [f"{count} kernels sm_90a (Triton {version})"]
    assert info["backends"]["compiled"] == {
        "available": True, "reason": f"cuda:0: {count} kernels sm_90a (Triton {version})"
    }  # fmt: skip
    assert set(info["ops"]["cpu"].values()) == {"compiled"}


def test_without_the_native_library_the_records_are_the_same(stub, monkeypatch):
    out, lp = torch.empty_like(B.sample), torch.empty(2)
    step(B, seeds=B.seeds, out=out, log_prob_out=lp)
    monkeypatch.setattr(native_library, "state", lambda: (None, {}, "none"))
    compiled.forget()
    step(B, seeds=B.seeds, out=out, log_prob_out=lp)
    one, two = stub.launches()
    assert one == two
    driver = cuda_driver.load()
    assert driver.launch == driver.launch_by_ctypes


@pytest.mark.parametrize(
    ("capability", "target"),
    [(80, "sm_80"), (89, "sm_80"), (100, "sm_100a"), (103, "ptx_80"), (121, "ptx_80")],
)
def test_the_image_of_a_device(stub, capability, target):
    stub.reset((capability,))
    stub.set_device(0)
    step()
    (launch,) = stub.launches()
    assert [launch.image] == images_of(stub, target, STEP)


def test_several_devices(stub):
    """Each has its own image, loaded once; a device without one falls back."""
    stub.reset((90, 80, 75))
    for device in (0, 1, 0, 1):
        # Given back with the stub.
        compiled.device_of = lambda x, device=device: device
        stub.set_device(device)
        step()
    launches = stub.launches()
    assert [launch.device for launch in launches] == [0, 1, 0, 1] and stub.modules() == 2
    for launch, target in zip(launches, ("sm_90a", "sm_80"), strict=False):
        assert [launch.image] == images_of(stub, target, STEP)
    compiled.device_of = lambda x: 2
    with dispatch.use_backend("reference"):
        expected, _ = step()
    assert torch.equal(step()[0], expected) and len(stub.launches()) == 4
    assert "sm_75" in backend_info()["images"][2]


def test_warm_up_loads_everything_before_a_capture(stub):
    with stub.capturing():
        with pytest.raises(RuntimeError, match="not loaded on cuda:0, and a CUDA graph") as caught:
            step()
        assert "call flowgrpo_kernels.warm_up(device)" in str(caught.value)
        assert "\n" not in str(caught.value) and stub.launches() == []
    count = flowgrpo_kernels.warm_up("cuda:0")
    assert count == len(images.Manifest().kernels) == stub.modules()
    with stub.capturing():
        step()
        initial_noise(B.seeds, (16,))
    assert len(stub.launches()) == 2 and stub.modules() == count
    with pytest.raises(ValueError, match="device must be one of 1 CUDA devices, got cuda:1"):
        flowgrpo_kernels.warm_up("cuda:1")


def test_warm_up_without_a_device(stub):
    stub.reset((75,))
    assert flowgrpo_kernels.warm_up("cuda:0") == 0 and stub.modules() == 0


def fallback(stub, caplog, call=step) -> tuple[str, str]:
    """(what auto says when it falls back to the reference, what the demand of compiled raises)."""
    # Given back with the stub.
    dispatch.ORDER["cpu"] = ("compiled", "reference")
    dispatch.log_once.cache_clear()
    stub.set_device(0)
    with dispatch.use_backend("reference"):
        expected = call()
    caplog.clear()
    with caplog.at_level("INFO", "flowgrpo_kernels"), dispatch.use_backend("auto"):
        got = call()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    (said,) = warnings
    with dispatch.use_backend("compiled"), pytest.raises(RuntimeError) as caught:
        call()
    assert stub.launches() == []
    for sentence in (said, str(caught.value)):
        assert "\n" not in sentence
    return said, str(caught.value)


def test_a_device_without_image(stub, caplog):
    stub.reset((75,))
    said, raised = fallback(stub, caplog)
    assert said.startswith("cpu tensors fall back to the PyTorch reference: no compiled kernels")
    assert "sm_75" in said and raised.startswith("FLOWGRPO_KERNELS=compiled cannot run sde_step")


def test_a_driver_that_is_too_old(stub, caplog):
    stub.reset((90,), version=11080)
    said, _ = fallback(stub, caplog)
    assert "the driver is too old for the compiled kernels of sm_90: it supports CUDA 11.8" in said


def test_a_driver_without_devices(stub):
    stub.reset(())
    assert "the NVIDIA driver sees no device" in compiled.why_not()


def test_odd_rows_are_not_shipped(stub, caplog):
    """Rows of 20 elements; a single one of 20; velocity in a dtype that nobody mixes so."""
    odd, one = oracle.batch(2, (20,), torch.float32), oracle.batch(1, (20,), torch.float32)
    mixed = oracle.batch(2, (16,), torch.bfloat16, torch.float16)
    for batch, why in (
        (odd, "rows are not of a multiple of 16 elements"),
        (one, "rows are not of a multiple of 16 elements"),
        (mixed, "sde_step_kernel is not shipped for these dtypes and options"),
    ):
        said, raised = fallback(stub, caplog, lambda batch=batch: step(batch))
        assert why in said and why in raised and "FLOWGRPO_KERNELS=auto" in raised


def test_views_that_begin_anywhere_are_not_shipped(stub, caplog):
    wide = torch.zeros(2 * 16 + 1, dtype=torch.bfloat16)
    b = oracle.batch(2, (16,), torch.bfloat16, torch.float32)
    b.velocity = wide[1:].view(2, 16)
    said, _ = fallback(stub, caplog, lambda: step(b))
    assert "a tensor does not begin at a multiple of 16 bytes" in said


def test_a_binary_that_the_driver_refuses(stub, caplog):
    """Said with the driver's own words; the next backend runs."""
    stub.fail("cuModuleLoadData", 209)
    with dispatch.use_backend("compiled"), pytest.raises(RuntimeError) as caught:
        step()
    assert "no kernel image is available for execution on the device (error 209)" in str(
        caught.value
    )
    stub.fail("cuModuleLoadData", 200)
    with caplog.at_level("INFO", "flowgrpo_kernels"), dispatch.use_backend("auto"):
        step()
    assert "device kernel image is invalid" in caplog.text and stub.launches() == []


def test_a_launch_that_the_driver_refuses(stub):
    stub.fail("cuLaunchKernel", 1)
    with pytest.raises(RuntimeError, match="could not be launched on cuda:0: invalid argument"):
        step()
    step()
    assert len(stub.launches()) == 1


def test_no_driver(stub, monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libnone.so.1")
    compiled.forget()
    assert compiled.why_not().startswith("the NVIDIA driver cannot be loaded: libnone.so.1")


def test_packs_that_are_broken(stub, caplog, monkeypatch, tmp_path):
    shutil.copytree(images.FOLDER, tmp_path / "images")
    path = tmp_path / "images" / "sm_90a.pack"
    path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setattr(compiled, "Manifest", lambda: images.Manifest(tmp_path / "images"))
    compiled.forget()
    said, raised = fallback(stub, caplog)
    assert "sm_90a.pack are truncated: 1000 bytes of" in said and "truncated" in raised
    (tmp_path / "images" / "manifest.json").write_text("{}")
    compiled.forget()
    said, _ = fallback(stub, caplog)
    assert "is of another version of flowgrpo: format None, expected 1" in said


def test_threads(stub):
    """Eight at once, none of which has a context: each kernel is loaded once, all launches come."""
    errors, start = [], threading.Barrier(8)

    def work():
        try:
            start.wait()
            for _ in range(5):
                step()
                initial_noise(B.seeds, (16,))
                log_prob(B.velocity, B.sample, B.sample, TRANSITIONS, 3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and stub.modules() == 3
    names = [launch.name for launch in stub.launches()]
    assert len(names) == 8 * 5 * 3 and names.count("sde_step_kernel") == 40


WITHOUT = """
import os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
from pathlib import Path
from flowgrpo_kernels.aot import table
from flowgrpo_kernels.backends import compiled, dispatch
from flowgrpo_kernels.backends.images import Manifest
from measuring.stub_driver import Stub

assert "triton" not in sys.modules and os.environ["PATH"] == ""
stub = Stub(Path(sys.argv[1]))
with stub.tensors_of("cpu"), dispatch.use_backend("compiled"):
    for call in table.grid():
        call()
manifest = Manifest()
pack = manifest.pack("sm_90a")
shipped = {stub.digest(pack.image(key).binary) for key in manifest.kernels}
images = {launch.image for launch in stub.launches()}
print(images == shipped, len(stub.launches()), stub.modules() == len(manifest.kernels))
"""


@pytest.mark.slow
def test_every_shipped_kernel_without_triton_and_without_a_compiler():
    """Every op over its options, PATH empty: all that is shipped is launched, and nothing fails."""
    path = os.pathsep.join([str(TESTS.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PATH": "", "PYTHONPATH": path}
    done = torch_fork.run(WITHOUT, str(stub_driver.build()), env=env, cwd=TESTS)
    assert done.returncode == 0, done.stderr[-2000:]
    same, launches, modules = done.stdout.split()
    assert (same, modules) == ("True", "True") and 1000 < int(launches) < 4096
