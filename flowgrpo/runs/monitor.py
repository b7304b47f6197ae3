"""What a run tells about itself: its figures, its evaluations, its pictures, its summary.

What is written or shown around the algorithm is here, so that the loop is the algorithm::

    with runs.stoppable() as stop, Reports.open(config, policy, state) as reports:
        while state.iteration < config.run.steps and not stop.requested:
            ...
            state.iteration += 1
            reports.iteration(metrics, seconds)
        return reports.finish(interrupted=stop.requested)
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flowgrpo import rewards
from flowgrpo.config import Config, ConfigError
from flowgrpo.evaluation import evaluate, pictures
from flowgrpo.evaluation.evaluate import Evaluation
from flowgrpo.evaluation.table import within
from flowgrpo.policies import Policy
from flowgrpo.prompts.load import has_splits
from flowgrpo.runs import directory
from flowgrpo.runs.display import Display
from flowgrpo.runs.process import versions
from flowgrpo.runs.state import State


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


def check_finite(metrics: Mapping[str, Any], iteration: int) -> None:
    """Raise DivergedError if the loss or a gradient's norm is not finite."""
    for name in ("loss", "grad_norm"):
        values = metrics.get(name, 0.0)
        for value in values if isinstance(values, list | tuple) else [values]:
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at iteration {iteration}, but a finite number is expected; "
                    "start again with a lower optim.lr or optim.max_grad_norm."
                )


def first_time(policy: Policy) -> str:
    """What makes the first evaluation and iteration take longer than the others; "" if nothing."""
    done = ["blocks are compiled, which takes minutes"] * policy.compiled
    done += ["CUDA graphs are recorded"] * (policy.graphs is not None)
    return f"In the first evaluation and iteration {' and '.join(done)}." if done else ""


class Monitor:
    """Logs, evaluates, draws and saves one run. Made by `Reports.open`; a context manager."""

    def __init__(self, config: Config, policy: Policy, state: State) -> None:
        self.config, self.policy, self.state = config, policy, state
        self.held = evaluate.evaluation_set(config)
        self.scorer = rewards.Scorer.of(config.reward, config.reported)
        self.scorer.prepare(self.held.prompts)
        self.quality = evaluate.quality_of(config.sample.prompts)
        self.tolerances = evaluate.tolerances_of(config.sample.prompts)
        # Unknown words raise here, before the run directory exists.
        policy.check_texts(self.held.prompts.texts)
        self.display = Display(config)
        self.before: dict[str, Evaluation] = {}
        self._saved: int | None = None
        self._since = time.perf_counter()
        self.run: directory.RunDirectory

    @classmethod
    def open(cls, config: Config, policy: Policy, state: State) -> Monitor:
        """Check what is evaluated, make or take up the run directory, restore `state`, show the
        banner, and evaluate the untrained model (or read what was found then).

        Args:
            config: of the run.
            policy: the model, with `state.parameters` in its transformer.
            state: restored in place when the run is resumed; `state.totals` is kept here.

        Raises:
            ConfigError: as `runs.Run.open`, `runs.Run.restore` and `boards.Boards.open`; nothing
                is left behind then.
        """
        reports = cls(config, policy, state)
        reports.run = directory.RunDirectory.open(config)
        try:
            restored = reports.run.restore(state)
            reports._connect(restored)
            lines = banner(config, policy, state, reports.run.dir)
            reports.display.banner({**lines, "evaluation": _evaluated(config, reports.held)})
            if once := first_time(policy):
                reports.display.note(once)
            reports._begin(restored)
        except BaseException:
            reports.close()
            raise
        return reports

    def close(self) -> None:
        """Take the progress bar down and release the directory."""
        self.display.pause()
        self.run.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            # A reward fails before the state changes, so the iterations before it are kept, and
            # the run goes on from there once the reward is mended.
            if isinstance(error, rewards.RewardError):
                done = self.state.iteration
                if not (self.run.checkpoints / _step(done)).exists():
                    self._save(None)
                self.display.note(
                    f"Saved after {done} iterations; go on with --run.resume {self.run.dir}."
                )
        finally:
            self.close()

    def _connect(self, restored: bool) -> None:
        """Open the boards, before an evaluation of hours that one that fails would be lost to."""
        try:
            self.run.boards.open(self.state.iteration + 1 if restored else 0)
        except ConfigError:
            if not self.config.run.resume:
                # Only what this process made; the same command works once that is mended.
                shutil.rmtree(self.run.dir, ignore_errors=True)
            raise

    def _begin(self, restored: bool) -> None:
        scales = {"base": self.config.sample.guidance_scale}
        if self.config.run.eval_guidance != 1:
            scales["guided"] = self.config.run.eval_guidance
        for name, guidance in scales.items():
            self.before[name] = self._before(name, guidance, restored)
        done = self.state.iteration
        self.latest = (0, self.before["base"])
        for line in self.run.metrics("eval"):
            report = self._load(_step(line["iteration"]))
            if report is not None and 0 < line["iteration"] <= done:
                self.latest = (line["iteration"], report)
        if not restored:
            self._save(self.before["base"].accuracy)
        self._draw(self._samples())

    def iteration(self, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """After an iteration: log and show it, evaluate and save where it is due.

        Args:
            metrics: its figures; "max_ratio_error" and "dropped_groups" are also kept in totals.
                Logged beside them is "lr", the learning rate of the last update.
            seconds: its phases, as {"rollout", "reward", "update"}.
        """
        totals, done, run = self.state.totals, self.state.iteration, self.config.run
        self._add(seconds)
        error = max(totals.get("max_ratio_error", 0.0), float(metrics.get("max_ratio_error", 0.0)))
        totals["max_ratio_error"] = error
        dropped = totals.get("dropped_groups", 0) + int(metrics.get("dropped_groups", 0))
        totals["dropped_groups"] = dropped
        lr = self.state.optimizer.param_groups[0]["lr"]
        self.run.log(done, {**metrics, "lr": lr}, seconds)
        check_finite(metrics, done)
        accuracy = metrics.get("rewards", {}).get(self.config.reported[0])
        # As the evaluations call it: what is not right or wrong is the reward, shown already.
        named = self.before["base"].label == "accuracy"
        shown = {**metrics, "accuracy": accuracy if named else None}
        self.display.iteration(done, shown, sum(seconds.values()))
        score = None
        if run.eval_every and done % run.eval_every == 0:
            score = self._evaluate(final=False).accuracy
        if run.checkpoint_every and done % run.checkpoint_every == 0:
            self._save(score)

    def finish(self, interrupted: bool = False) -> dict[str, Any]:
        """Evaluate once more unless interrupted, save, and return what summary.json holds."""
        done = self.state.iteration
        if not interrupted and self.latest[0] != done:
            self._evaluate(final=True)
        at, report = self.latest
        if self._saved != done:
            self._save(report.accuracy if at == done else None)
        summary = self.summary(interrupted)
        self.run.finish(summary, self.state, self.policy.transformer)
        rows = {"before": self.before["base"], "after": report}
        evaluate.picture(rows, self.held, self.run.samples / "before-after.png")
        columns = {_label(name, found.guidance_scale): found for name, found in self.before.items()}
        self.display.table({**columns, f"iteration {at}": report}, self.tolerances)
        self.display.note(f"Written to {self.run.dir}: summary.json, curve.png, samples, weights.")
        return summary

    def summary(self, interrupted: bool) -> dict[str, Any]:
        """What summary.json holds."""
        base = self.before["base"]
        at, after = self.latest
        guided = self.before.get("guided")
        held = {
            name: within(name, base.quality, after.quality, self.tolerances)
            for name in self.tolerances
        }
        seconds = {**self.state.totals.get("seconds", {}), "total": self._total()}
        return {
            "recipe": self.config.recipe,
            "iterations": self.state.iteration,
            "images": self.state.iteration * self.config.sample.rows,
            "interrupted": interrupted,
            "before": base.to_dict(),
            "before_guided": guided.to_dict() if guided else None,
            "after": {"iteration": at, **after.to_dict()},
            "quality_tolerances": {**self.tolerances},
            "quality_held": all(held.values()),
            "seconds": seconds,
            "max_ratio_error": self.state.totals.get("max_ratio_error"),
            "dropped_groups": self.state.totals.get("dropped_groups", 0),
            "backend": backend(self.policy.device),
            "device": device_name(self.policy.device),
            "versions": versions(),
        }

    def _before(self, name: str, guidance: float, restored: bool) -> Evaluation:
        """The untrained model's report: read if the run is taken up again, else made."""
        folder, label = _step(0) if name == "base" else name, _label(name, guidance)
        report = self._load(folder) if restored else None
        if report is not None:
            return report
        # Adapters off, not merely zero: a product with zeros in it may round in another order.
        self.display.note(f"Evaluating the model before training: {len(self.held.seeds)} images.")
        whole = self.config.policy.adapter == "full" and self.state.iteration == 0
        with contextlib.nullcontext() if whole else self.policy.reference():
            report = self._measure(label, guidance)
        report.save(self.run.dir / "evaluations" / folder)
        if not restored:
            times = {"evaluate": report.seconds, "training": 0.0}
            kind = "eval" if name == "base" else "guided"
            samples = evaluate.grid({label: report}, self.held)
            self.run.log(0, report.to_dict(), times, kind, {"samples": samples})
            self._add({"evaluate": report.seconds})
        self.display.evaluation(0, label, report)
        return report

    def _load(self, folder: str) -> Evaluation | None:
        with contextlib.suppress(ConfigError, OSError, ValueError, KeyError, TypeError):
            return Evaluation.load(self.run.dir / "evaluations" / folder)
        return None

    def _measure(self, label: str, guidance: float) -> Evaluation:
        rewards = list(self.scorer.weights)
        with self.display.evaluating(label, len(self.held.seeds), rewards) as progress:
            return evaluate.evaluate(
                self.policy,
                self.held,
                self.scorer,
                steps=self.config.sample.eval_steps,
                batch_size=self.config.sample.batch_size,
                guidance_scale=guidance,
                quality=self.quality,
                on_progress=progress,
            )

    def _evaluate(self, final: bool) -> Evaluation:
        """Evaluate the averaged weights, log it, and renew the pictures."""
        done = self.state.iteration
        with self.state.ema.swapped():
            report = self._measure(f"iteration {done}", self.config.sample.guidance_scale)
        self.latest = (done, report)
        report.save(self.run.dir / "evaluations" / _step(done))
        self._add({"evaluate": report.seconds})
        values = {**report.to_dict(), **({"final": True} if final else {})}
        times = {"evaluate": report.seconds, "training": self._training()}
        samples = self._samples()
        self.run.log(done, values, times, "eval", {"samples": samples})
        self.display.evaluation(done, "trained", report)
        self._draw(samples)
        return report

    def _samples(self) -> Image.Image:
        """The latest evaluation's images under the base model's."""
        done, report = self.latest
        rows = {"base": self.before["base"]}
        if done:
            rows[f"iteration {done}"] = report
        return evaluate.grid(rows, self.held)

    def _draw(self, samples: Image.Image) -> None:
        """Write curve.png, and `samples` as the latest evaluation's."""
        lines = [
            {**line, "elapsed": line["seconds"]["training"]} for line in self.run.metrics("eval")
        ]
        guided = self.run.metrics("guided")
        title = f"{self.config.recipe}, seed {self.config.run.seed}"
        if lines:
            level = guided[0] if guided else None
            label = self.before["base"].label
            pictures.curve(self.run.dir / "curve.png", lines, level, title, label)
        pictures.save(samples, self.run.samples / f"{_step(self.latest[0])}.png")

    def _save(self, score: float | None) -> None:
        self.state.totals.setdefault("seconds", {})["total"] = self._total()
        self._since = time.perf_counter()
        self.run.save(self.state, self.policy.transformer, score)
        self._saved = self.state.iteration

    def _add(self, seconds: Mapping[str, float]) -> None:
        sums = self.state.totals.setdefault("seconds", {})
        for name, value in seconds.items():
            sums[name] = sums.get(name, 0.0) + value

    def _training(self) -> float:
        sums = self.state.totals.get("seconds", {})
        return sum(sums.get(name, 0.0) for name in ("rollout", "reward", "update"))

    def _total(self) -> float:
        before = self.state.totals.get("seconds", {}).get("total", 0.0)
        return before + time.perf_counter() - self._since


def banner(config: Config, policy: Policy, state: State, folder: Path) -> dict[str, str]:
    """Model, backend, group arithmetic and length of a run, one line each."""
    sample, optim, run = config.sample, config.optim, config.run
    trained = sum(p.numel() for p in state.parameters.values())
    every = sum(p.numel() for p in policy.transformer.parameters())
    every -= trained if config.policy.adapter == "lora" else 0
    low, high = sample.window_bounds
    window = f"{sample.trained_steps} of the steps {low} to {high - 1}"
    dtype = str(policy.dtype).removeprefix("torch.")
    lora = f"LoRA of rank {config.policy.lora_rank}, " if config.policy.adapter == "lora" else ""
    return {
        "model": f"{policy.name}, {type(policy.transformer).__name__}, {_count(every)} parameters, "
        f"{dtype} on {device_name(policy.device)}, {policy.resolution} pixels a side",
        "trained": f"{lora}{_count(trained)} parameters",
        "kernels": backend(policy.device),
        "forward": policy.describe(),
        "rollout": f"{sample.prompts_per_iteration} prompts x {sample.group_size} images = "
        f"{sample.rows} rows in {sample.chunks} chunks of {sample.batch_size}; {sample.steps} "
        f"steps of {sample.transition}, trained: {window}",
        "update": f"{optim.updates_per_iteration} updates, each on "
        f"{config.chunks_per_update * sample.batch_size} rows x {sample.trained_steps} steps",
        "length": f"{run.steps} iterations = {config.updates} updates"
        + (f", resumed at {state.iteration}" if state.iteration else "")
        + ("; nothing is left to train, see --run.steps" * (state.iteration >= run.steps)),
        "directory": str(folder),
    }


def _evaluated(config: Config, held: evaluate.EvaluationSet) -> str:
    """What is evaluated, and whether training sees it."""
    text = (
        f"{len(held.prompts)} prompts x {held.samples} images in {config.sample.eval_steps} steps"
    )
    if has_splits(config.sample.prompts):
        return f"{text}, prompts held out"
    return f"{text}, of the prompts of training: {config.sample.prompts} is one file, not a folder"


def backend(device: torch.device) -> str:
    """The kernel backends that run on `device`, for example "native"."""
    from flowgrpo_kernels import backend_info

    return ", ".join(sorted(set(backend_info()["ops"][device.type].values())))


def _step(iteration: int) -> str:
    return f"step-{iteration:06d}"


def _label(name: str, guidance: float) -> str:
    return name if name == "base" else f"base, CFG {guidance:g}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def device_name(device: torch.device) -> str:
    """cpu with its thread count, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
