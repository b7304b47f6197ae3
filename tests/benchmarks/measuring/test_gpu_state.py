"""Clocks and throttling around a case, over nvidia-ml-py with its functions replaced."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from measuring import gpu_state, suites
from reporting import records

pynvml = pytest.importorskip("pynvml")
UUIDS = ("GPU-aaaa", "GPU-bbbb")
CASES = [SimpleNamespace(name="cool"), SimpleNamespace(name="hot")]


class Driver:
    """Two GPUs of which torch sees the second one alone, as its device 0."""

    def __init__(self) -> None:
        self.clocks = [{"SM": 100, "MEM": 200}, {"SM": 1980, "MEM": 2619}]
        self.reasons = [pynvml.nvmlClocksEventReasonGpuIdle] * 2
        self.lost_to_power = [7, 7]
        self.power = [50_000, 642_900]

    def by_uuid(self, uuid):
        if uuid not in UUIDS:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return UUIDS.index(uuid)

    def clock(self, handle, kind):
        return self.clocks[handle]["SM" if kind == pynvml.NVML_CLOCK_SM else "MEM"]

    def temperature(self, handle, sensor):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def violation(self, handle, policy):
        if policy != pynvml.NVML_PERF_POLICY_POWER:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(violationTime=self.lost_to_power[handle])


@pytest.fixture
def driver(monkeypatch):
    nvml = Driver()
    functions = {
        "nvmlInit": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65",
        "nvmlDeviceGetHandleByUUID": nvml.by_uuid,
        "nvmlDeviceGetClockInfo": nvml.clock,
        "nvmlDeviceGetMaxClockInfo": nvml.clock,
        "nvmlDeviceGetPowerUsage": lambda handle: nvml.power[handle],
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTemperature": nvml.temperature,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: nvml.reasons[handle],
        "nvmlDeviceGetViolationStatus": nvml.violation,
    }
    for name, function in functions.items():
        assert callable(getattr(pynvml, name))
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    properties = lambda device: SimpleNamespace(uuid="bbbb")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    gpu_state.current.cache_clear()
    yield nvml
    gpu_state.current.cache_clear()


def row(case):
    return records.row("kernels", case, "ours", "time", 1.0, "us")


def test_the_device_is_looked_up_by_its_uuid(driver):
    look = gpu_state.current().look()
    assert look.figures == {"sm_mhz": 1980, "memory_mhz": 2619, "watts": 642}
    assert look.reasons == frozenset() and look.lost == {"lost to power": 7}
    assert gpu_state.described() == (
        "NVIDIA H200, SM up to 1980 MHz, memory 2619 MHz, 700 W", "580.65"
    )  # fmt: skip


def test_rows_of_a_throttled_case_are_marked_in_the_record(driver, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def rows_of(case):
        if case.name == "hot":
            # Another GPU's reasons do not matter.
            driver.reasons = [
                pynvml.nvmlClocksThrottleReasonHwSlowdown,
                pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle,
            ]
            driver.clocks[1] = {"SM": 1410, "MEM": 2619}
        return [row(case.name)]

    out = tmp_path / "kernels-cuda.json"
    assert records.record_cases(CASES, rows_of, out, "cuda", 60.0) == 0
    cool, hot = json.loads(out.read_text())["rows"]
    assert cool.keys() == hot.keys() == {*row(""), "clocks", "throttled"}
    assert cool["throttled"] == [] and cool["clocks"]["sm_mhz"] == [1980, 1980]
    assert hot["throttled"] == ["software power cap"]
    assert hot["clocks"] == {
        "sm_mhz": [1980, 1410], "memory_mhz": [2619, 2619], "watts": [642, 642]
    }  # fmt: skip
    assert "hot: throttled (software power cap)" in capsys.readouterr().out


def test_what_happened_between_the_looks_is_seen(driver):
    """By the counters: a short case is over, and the GPU idle, when the second look is taken."""
    rows = [row("short"), row("short")]
    with gpu_state.watched("cuda") as watch:
        driver.lost_to_power[1] += 3_000_000
    watch.mark(rows)
    assert [r["throttled"] for r in rows] == [["lost to power"]] * 2


def test_a_case_of_whole_models_that_is_interrupted_is_marked_too(driver, tmp_path):
    command = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "r.json")]
    run = suites.SuiteRun("update", suites.parser("", "ours").parse_args(command))
    run.device, before = "cuda", len(run.rows)

    def interrupted(case):
        run.rows.append(row(case.name))
        driver.reasons[1] = pynvml.nvmlClocksEventReasonSwThermalSlowdown
        raise KeyboardInterrupt

    run.pool.forget, run.write = (lambda: None), (lambda: None)
    with pytest.raises(KeyboardInterrupt):
        run.each(CASES, interrupted, lambda case: case.name)
    assert run.rows[before]["throttled"] == ["software thermal slowdown"]
    assert "throttled" not in run.rows[0]


def test_without_an_answer_rows_have_no_clocks_and_the_record_says_why(driver, monkeypatch):
    properties = lambda device: SimpleNamespace(uuid="cccc")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    rows = [row("case")]
    with gpu_state.watched("cuda") as watch:
        pass
    watch.mark(rows)
    assert rows == [row("case")]
    name, version = gpu_state.described()
    assert name.startswith("NVIDIA H200 (GPU-cccc: ") and version == "unknown"


def test_on_a_cpu_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(gpu_state, "current", None)
    with gpu_state.watched("cpu") as watch:
        pass
    assert watch.facts() == {}
