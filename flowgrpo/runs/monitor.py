"""The monitor of a run: it logs, evaluates, draws, saves and sums up.

All that is written or shown around the algorithm is here, so that the loop is the algorithm::

    with stoppable() as stop, Monitor.open(config, policy, state, stop) as monitor:
        while monitor.unfinished and not stop.requested:
            ...
            state.iteration += 1
            monitor.iteration(metrics, seconds)
        return monitor.finish(interrupted=stop.requested)
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image

from flowgrpo import rewards
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.distributed.world import ALONE, World
from flowgrpo.evaluation import evaluate, pictures
from flowgrpo.evaluation.evaluate import Evaluation
from flowgrpo.evaluation.evaluation_set import load_evaluation_set
from flowgrpo.evaluation.kl import path_kl
from flowgrpo.evaluation.quality import quality_of, tolerances_of, within_tolerance
from flowgrpo.policies import Policy
from flowgrpo.policies.tokens import warn_of_cut
from flowgrpo.prompts.load import has_splits
from flowgrpo.runs import content
from flowgrpo.runs.advice import Advice
from flowgrpo.runs.banner import banner, slow_start
from flowgrpo.runs.directory import Follower, RunDirectory, is_address, is_file
from flowgrpo.runs.display import Display
from flowgrpo.runs.process import Stop, device_name, kernel_backends, versions
from flowgrpo.runs.state import State, start_share

log = logging.getLogger("flowgrpo")
TRAINING = ("scout", "rollout", "reward", "update")
"""Stages whose seconds are those of training."""
LEFT = "The evaluation is left; it is made when the run goes on."


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


class EvaluationStopped(Exception):
    """An evaluation was left, because the run was asked to stop."""


def check_finite(
    metrics: Mapping[str, Any], iteration: int, dtype: torch.dtype = torch.float32
) -> None:
    """Raise DivergedError if the loss or a gradient's norm is not finite; `dtype`: of the frozen
    weights and of the velocity."""
    for name in ("loss", "grad_norm"):
        values = metrics.get(name, 0.0)
        for number, value in enumerate(values if isinstance(values, list | tuple) else [values]):
            if not math.isfinite(value):
                # The norm is that of the gradients before an update.
                untouched = name == "grad_norm" and iteration == 1 and number == 0
                where = f"at iteration {iteration}"
                advice = "start again with a lower optim.lr or optim.max_grad_norm"
                if untouched:
                    where += ", before any update"
                    advice = "try policy.dtype float32 or another policy.attention"
                if dtype == torch.float16:
                    other = "" if untouched else f", or {advice}"
                    advice = f"set policy.dtype to bfloat16 or float32{other}"
                raise DivergedError(
                    f"{name} is {value} {where}, but a finite number is expected; {advice}."
                )


class Monitor:
    """Logs, evaluates, draws and saves one run. Opened by `Monitor.open`; a context manager."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        state: State,
        stop: Stop | None = None,
        world: World = ALONE,
    ) -> None:
        self.config, self.policy, self.state = config, policy, state
        self.evaluated = policy.evaluated
        """The policy at the size of evaluations."""
        self.stop, self.world = stop or Stop(), world
        self.evaluation_set = load_evaluation_set(config)
        self.scorer = rewards.Scorer.of(config.reward, config.reported, offset=world.rank)
        self.scorer.prepare(self.evaluation_set.prompts)
        self.quality = quality_of(config.sample.prompts)
        self.tolerances = tolerances_of(config.sample.prompts)
        # Unknown words raise here, before the run directory exists.
        policy.check_texts(self.evaluation_set.prompts.texts)
        policy.check_images(self.evaluation_set.prompts.images)
        if has_splits(config.sample.prompts):
            # Of one file they are among those of training, which were counted.
            warn_of_cut(policy, self.evaluation_set.prompts.texts, "held-out prompts")
        self.scorer.try_out(self.evaluation_set.prompts, self.evaluated.blank_image())
        self.display = Display(config)
        self.advice = Advice(config, sum(p.numel() for p in state.parameters.values()))
        self.untrained: dict[str, Evaluation] = {}
        """Evaluations before training: "base", and "guided" if `run.eval_guidance` asks for it."""
        self.latest: tuple[int, Evaluation]
        """Iteration of the newest evaluation, and the evaluation."""
        self.directory: RunDirectory
        self._saved: int | None = None
        self._since = time.perf_counter()

    @classmethod
    def open(
        cls,
        config: Config,
        policy: Policy,
        state: State,
        stop: Stop | None = None,
        world: World = ALONE,
    ) -> Monitor:
        """Open or create the run directory, restore `state`, show the banner, and evaluate the
        untrained model (or read its evaluation).

        Args:
            config: of the run.
            policy: the model, with `state.parameters` in its transformer.
            state: restored in place when the run is resumed; `state.totals` is updated here.
            stop: once it is requested, evaluations of trained weights are left for the next start.
            world: the processes of the run. Only the first writes; all call the same methods.

        Raises:
            ConfigError: as `RunDirectory.open`, `RunDirectory.restore` and `Loggers.open`, or the
                processes differ in what they are to do; nothing is left behind then.
        """
        with world.together(lockstep=policy.sharded):
            if not world.first:
                config = replace(config, **{"run.progress": "none"})
            monitor = cls(config, policy, state, stop, world)
            # The weights are still those that were loaded; `restore` may replace them.
            now = content.content_of(config, policy, monitor.evaluation_set, monitor.scorer.rewards)
        world.check_same(
            "what the run is computed from",
            {
                **now["prompts"],
                **now["model"],
                **now["rewards"],
                **now["code"],
                # What "auto" has become may depend on the machine.
                "the dtype": str(policy.dtype),
                "the kind of device": policy.device.type,
            },
            "give all processes the same files",
        )
        with world.together():
            if world.first:
                monitor.directory = RunDirectory.open(config, now)
        checkpoint = world.from_first(lambda: monitor.directory.checkpoint)
        try:
            with world.together():
                if not world.first:
                    monitor.directory = Follower(config, checkpoint)
            with world.together():
                restored = monitor.directory.restore(state)
                monitor._open_loggers(restored)
            servers = monitor.scorer.servers()
            monitor.display.banner(banner(config, policy, state, monitor.evaluation_set, servers))
            if reason := slow_start(policy):
                monitor.display.note(reason)
            monitor._begin(restored)
            monitor._agree({})
        except BaseException:
            monitor.close()
            raise
        return monitor

    def _agree(self, seconds: Mapping[str, float]) -> Mapping[str, float]:
        """Take the first process's seconds, and a request to stop from any, so that all processes
        decide alike."""
        if self.stop.alone:
            return seconds
        everywhere = self.world.gather((self.stop.asked, dict(seconds)))
        self.stop.requested = any(asked for asked, _ in everywhere)
        return everywhere[0][1]

    def close(self) -> None:
        """Take the progress bar down and release the directory."""
        self.display.pause()
        if hasattr(self, "directory"):
            self.directory.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            # A reward fails before the state changes, so the iterations before it are saved, and
            # the run goes on from there once the reward is mended.
            # Pieces are saved by all processes, which must know of the error.
            shared = not self.state.sharded or hasattr(error, "told_by")
            if isinstance(error, rewards.RewardError) and shared:
                iteration = self.state.iteration
                with self.world.together():
                    if not (self.directory.checkpoints / _step(iteration)).exists():
                        self._save(None)
                self.display.note(
                    f"Saved after {iteration} iterations; go on with --run.resume "
                    f"{self.config.out_dir}."
                )
        finally:
            self.close()

    def _open_loggers(self, restored: bool) -> None:
        """Open the loggers, before an evaluation of hours that one that fails would be lost to."""
        try:
            self.directory.loggers.open(self.state.iteration + 1 if restored else 0)
        except ConfigError:
            if not self.config.run.resume:
                # Written by this process alone; the same command works once that is mended.
                shutil.rmtree(self.directory.path, ignore_errors=True)
            raise

    def _begin(self, restored: bool) -> None:
        if self.config.policy.init_adapter and not restored:
            self.directory.save_initial(self.state, self.policy.transformer)
        scales = {"base": self.config.sample.guidance_scale}
        if self.config.run.eval_guidance != 1:
            scales["guided"] = self.config.run.eval_guidance
        for name, guidance_scale in scales.items():
            self.untrained[name] = self._evaluate_untrained(name, guidance_scale, restored)
        self.latest = self.world.from_first(self._newest)
        before = self.world.from_first(self._last_seconds)
        if not restored:
            self._save(self.untrained["base"].accuracy)
        elif self.world.from_first(lambda: self._was_left(self._training() - before)):
            self._evaluate_and_save(self._training() - before)
        self._draw()

    def _newest(self) -> tuple[int, Evaluation]:
        """Find the newest evaluation of the run so far, and its iteration."""
        newest = (0, self.untrained["base"])
        for line in self.directory.metrics("eval"):
            evaluation = self._load(_step(line["iteration"]))
            if evaluation is not None and 0 < line["iteration"] <= self.state.iteration:
                newest = (line["iteration"], evaluation)
        return newest

    def _was_left(self, before: float) -> bool:
        """Tell if the evaluation of the present iteration is due and was not made: the process that
        wrote the checkpoint was asked to stop meanwhile. `before`: see `_evaluate_and_save`."""
        iteration = self.state.iteration
        if not iteration or not (self._is_regular() or self._is_due(before)):
            return False
        return all(line["iteration"] != iteration for line in self.directory.metrics("eval"))

    def _last_seconds(self) -> float:
        """Sum the seconds of the last iteration that is logged."""
        lines = self.directory.metrics("train")
        return sum(lines[-1].get("seconds", {}).values()) if lines else 0.0

    def iteration(self, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """Log and show a finished iteration; evaluate and save where it is due.

        Args:
            metrics: its figures; "max_ratio_error" and "dropped_groups" are also added to totals.
                Logged beside them is "lr", the learning rate of the last update.
            seconds: its phases, some of `TRAINING`; of several processes the first's count.
        """
        seconds = self._agree(seconds)
        totals, iteration = self.state.totals, self.state.iteration
        before = self._training()
        self._add(seconds)
        error = max(totals.get("max_ratio_error", 0.0), float(metrics.get("max_ratio_error", 0.0)))
        totals["max_ratio_error"] = error
        dropped = totals.get("dropped_groups", 0) + int(metrics.get("dropped_groups", 0))
        totals["dropped_groups"] = dropped
        lr = self.state.optimizer.param_groups[0]["lr"]
        self.directory.log(iteration, {**metrics, "lr": lr}, seconds)
        check_finite(metrics, iteration, self.policy.dtype)
        # A score that is no accuracy is the reward, which is shown already.
        accuracy = None
        if self.untrained["base"].label == "accuracy":
            accuracy = metrics.get("rewards", {}).get(self.config.reported[0])
        shown = {**metrics, "accuracy": accuracy}
        self.display.iteration(iteration, shown, sum(seconds.values()), self._expected())
        # Nothing was decoded since the rollout.
        noise = self.advice.noise(self.policy.decoded.read().std) if iteration == 1 else ""
        for sentence in filter(None, (noise, self.advice.gradients(metrics))):
            self.display.note(sentence)
        self._evaluate_and_save(before)

    def _evaluate_and_save(self, before: float) -> None:
        """Evaluate and save where it is due after the present iteration, before which training had
        taken `before` seconds. A stop that is requested meanwhile ends the evaluation, and the
        checkpoint is written at once."""
        iteration, run, score = self.state.iteration, self.config.run, None
        timed = self._is_due(before)
        due = timed or (bool(run.checkpoint_every) and iteration % run.checkpoint_every == 0)
        if timed or self._is_regular():
            try:
                score = self._evaluate(final=False).accuracy
            except EvaluationStopped:
                self.display.note(LEFT)
                self._agree({})
                due = True
        if due:
            self._save(score)

    @property
    def unfinished(self) -> bool:
        """Tell if an iteration is left of `run.steps`, or a second of `run.min_seconds`."""
        run = self.config.run
        return self.state.iteration < run.steps or self._training() < run.min_seconds

    def _is_regular(self) -> bool:
        """Tell if the present iteration is one of `run.eval_every`."""
        iteration, run = self.state.iteration, self.config.run
        return bool(run.eval_every) and iteration <= run.steps and iteration % run.eval_every == 0

    def _is_due(self, before: float) -> bool:
        """Tell if the training seconds since `before` ask for an evaluation: at each multiple of
        `run.eval_seconds` up to `run.min_seconds`, and after `run.steps` where the run goes on."""
        run, seconds = self.config.run, self._training()
        if self.state.iteration == run.steps and self.unfinished:
            return True
        if not run.eval_seconds or before >= run.min_seconds:
            return False
        return seconds // run.eval_seconds > before // run.eval_seconds

    def _expected(self) -> int:
        """Expect the number of iterations of the whole run, by the mean of those so far."""
        run, iteration = self.config.run, self.state.iteration
        left = max(run.min_seconds - self._training(), 0.0)
        mean = self._training() / max(iteration, 1)
        return max(run.steps, iteration + math.ceil(left / mean) if mean else 0)

    def finish(self, interrupted: bool = False) -> dict[str, Any]:
        """Evaluate once more unless interrupted, save, and return what summary.json holds."""
        iteration = self.state.iteration
        if not interrupted and self.latest[0] != iteration:
            try:
                self._evaluate(final=True)
            except EvaluationStopped:
                self.display.note(LEFT)
                interrupted = True
        evaluated, evaluation = self.latest
        if evaluated != iteration:
            with self.state.ema.swapped():
                self._check_weights()
        if self._saved != iteration:
            self._save(evaluation.accuracy if evaluated == iteration else None)
        summary = self.summary(interrupted)
        self.directory.finish(summary, self.state, self.policy.transformer)
        if self.world.first:
            rows = {"before": self.untrained["base"], "after": evaluation}
            with _drawing("before-after.png"):
                picture = pictures.evaluation_grid(rows, self.evaluation_set)
                pictures.save(picture, self.directory.samples / "before-after.png")
        columns = {_label(name, e.guidance_scale): e for name, e in self.untrained.items()}
        self.display.table({**columns, f"iteration {evaluated}": evaluation}, self.tolerances)
        self.display.note(
            f"Written to {self.config.out_dir}: summary.json, curve.png, samples, "
            f"{_described(self.state)}."
        )
        return summary

    def _check_weights(self) -> None:
        """Raise NotFiniteError unless the present weights give an image of finite numbers, which an
        evaluation would have shown."""
        evaluate.generate_images(
            self.evaluated,
            self.evaluation_set.prompts.texts[:1],
            self.evaluation_set.seeds[:1],
            1,
            # Some schedulers have no schedule of one step.
            steps=min(2, self.config.sample.eval_steps),
            batch_size=1,
            guidance_scale=self.config.sample.guidance_scale,
            images=self.evaluation_set.prompts.images,
        )

    def summary(self, interrupted: bool) -> dict[str, Any]:
        """Sum up the run: what summary.json holds."""
        base, guided = self.untrained["base"], self.untrained.get("guided")
        iteration, after = self.latest
        seconds = {**self.state.totals.get("seconds", {}), "total": self._total()}
        return {
            "recipe": self.config.recipe,
            "iterations": self.state.iteration,
            "images": self.state.iteration * self.config.sample.rows,
            **self._scouted(),
            "interrupted": interrupted,
            "weights": self.state.ema.weights,
            "before": base.to_dict(),
            "before_guided": guided.to_dict() if guided else None,
            "after": {"iteration": iteration, **after.to_dict()},
            "quality_tolerances": {**self.tolerances},
            "quality_held": all(
                within_tolerance(name, base.quality, after.quality, self.tolerances)
                for name in self.tolerances
            ),
            "seconds": seconds,
            "max_ratio_error": self.state.totals.get("max_ratio_error"),
            "dropped_groups": self.state.totals.get("dropped_groups", 0),
            "backend": kernel_backends(self.policy.device),
            "device": device_name(self.policy.device),
            "versions": versions(),
        }

    def _scouted(self) -> dict[str, int]:
        """Count the candidates of the run that were previewed, if it has scouts."""
        candidates = self.config.sample.candidates
        return {"scouts": self.state.iteration * candidates} if candidates else {}

    def _evaluate_untrained(self, name: str, guidance_scale: float, restored: bool) -> Evaluation:
        """Read the untrained model's evaluation if the run is resumed, or make and log it."""
        folder, label = _step(0) if name == "base" else name, _label(name, guidance_scale)
        evaluation = self.world.from_first(lambda: self._load(folder) if restored else None)
        if evaluation is not None:
            return evaluation
        count = len(self.evaluation_set.seeds)
        self.display.note(f"Evaluating the model before training: {count} images.")
        # LoRA is turned off, not merely zero: a product with zeros in it may round differently.
        # A whole transformer is its own reference before the first iteration.
        is_reference = self.config.policy.adapter == "full" and self.state.iteration == 0
        with contextlib.nullcontext() if is_reference else self.evaluated.reference():
            evaluation = self._measure(label, guidance_scale)
        if name == "base" and self.evaluated is self.policy:
            self.advice.std = self.policy.decoded.read().std
        self.directory.save_evaluation(evaluation, folder)
        self._save_videos(evaluation, folder)
        if not restored:
            seconds = {"evaluate": evaluation.seconds, "training": 0.0}
            kind = "eval" if name == "base" else "guided"
            shown = {}
            if self.world.first:
                shown["samples"] = pictures.evaluation_grid(
                    {label: evaluation}, self.evaluation_set
                )
            self.directory.log(0, evaluation.to_dict(), seconds, kind, shown)
            self._add({"evaluate": evaluation.seconds})
        self.display.evaluation(0, label, evaluation)
        return evaluation

    def _load(self, folder: str) -> Evaluation | None:
        """Read an evaluation of this run; None if it is not there or damaged."""
        with contextlib.suppress(ConfigError, OSError, ValueError, KeyError, TypeError):
            evaluation = Evaluation.load(self.directory.path / "evaluations" / folder)
            # Of runs without content.json: another number of prompts is another set.
            if evaluation.images == len(self.evaluation_set.seeds):
                return self._with_present_addresses(evaluation)
        return None

    def _with_present_addresses(self, evaluation: Evaluation) -> Evaluation:
        """Give the rewards of an evaluation that are named by place their names of now."""
        before, now = list(evaluation.scores), list(self.scorer.weights)
        if len(before) != len(now):
            return evaluation
        names = {
            b: n if is_address(b) or is_file(b) else b for b, n in zip(before, now, strict=True)
        }
        return dataclasses.replace(
            evaluation,
            scores={names[name]: score for name, score in evaluation.scores.items()},
            intervals={names.get(n, n): bounds for n, bounds in evaluation.intervals.items()},
        )

    def _measure(self, label: str, guidance_scale: float) -> Evaluation:
        rewards = list(self.scorer.weights)
        count = len(self.evaluation_set.seeds)
        with self.display.evaluating(label, count, rewards) as progress:

            def on_progress(stage: str, images: int) -> None:
                progress(stage, images)
                asked = self.stop.asked
                if self.policy.sharded:
                    # All leave at the same forward, or none.
                    asked = self.world.any(asked)
                # Before the first iteration there is nothing to save.
                if asked and self.state.iteration:
                    raise EvaluationStopped

            return evaluate.evaluate(
                self.evaluated,
                self.evaluation_set,
                self.scorer,
                steps=self.config.sample.eval_steps,
                batch_size=self.config.eval_batch_size,
                guidance_scale=guidance_scale,
                quality=self.quality,
                on_progress=on_progress,
                world=self.world,
            )

    def _measure_kl(self, evaluation: Evaluation) -> Evaluation:
        """Add the KL of the present weights to the untrained model, if `run.eval_kl` asks for it;
        its seconds count as the evaluation's."""
        sample, noise_level = self.config.sample, self.config.run.eval_kl
        if not noise_level:
            return evaluation
        started = time.perf_counter()
        kl = path_kl(
            self.policy, self.evaluation_set, noise_level, sample.batch_size, sample.guidance_scale
        )
        seconds = evaluation.seconds + time.perf_counter() - started
        return dataclasses.replace(evaluation, kl=kl, seconds=seconds)

    def _evaluate(self, final: bool) -> Evaluation:
        """Evaluate the weights that the average shows, log it, and renew the pictures."""
        iteration = self.state.iteration
        with self.state.ema.swapped():
            evaluation = self._measure(f"iteration {iteration}", self.config.sample.guidance_scale)
            evaluation = self._measure_kl(evaluation)
        self.latest = (iteration, evaluation)
        self.directory.save_evaluation(evaluation, _step(iteration))
        self._save_videos(evaluation, _step(iteration))
        self._add({"evaluate": evaluation.seconds})
        values = evaluation.to_dict()
        if final:
            values["final"] = True
        seconds = {"evaluate": evaluation.seconds, "training": self._training()}
        shown = {"samples": self._samples()} if self.world.first else {}
        self.directory.log(iteration, values, seconds, "eval", shown)
        self.display.evaluation(iteration, "trained", evaluation)
        self._draw(shown.get("samples"))
        return evaluation

    def _save_videos(self, evaluation: Evaluation, name: str) -> None:
        """Write the videos of an evaluation that are whole, if any: samples/NAME-1.webp, ..."""
        rate = self.policy.family.frame_rate
        for number, video in enumerate(() if evaluation.videos is None else evaluation.videos):
            file = f"{name}-{number + 1}.webp"
            with _drawing(file):
                pictures.save_video(video, self.directory.samples / file, rate)

    def _samples(self) -> Image.Image:
        """Draw the latest evaluation's images under the base model's."""
        iteration, evaluation = self.latest
        rows = {"base": self.untrained["base"]}
        if iteration:
            rows[f"iteration {iteration}"] = evaluation
        return pictures.evaluation_grid(rows, self.evaluation_set)

    def _draw(self, samples: Image.Image | None = None) -> None:
        """Write curve.png, and `samples` as the latest evaluation's; None: they are drawn."""
        if not self.world.first:
            return
        lines = [
            {**line, "elapsed": line["seconds"]["training"]}
            for line in self.directory.metrics("eval")
        ]
        guided = self.directory.metrics("guided")
        title = f"{self.config.recipe}, seed {self.config.run.seed}"
        if lines:
            level = guided[0] if guided else None
            label = self.untrained["base"].label
            with _drawing("curve.png"):
                pictures.curve(self.directory.path / "curve.png", lines, level, title, label)
        pictures.save(
            samples or self._samples(), self.directory.samples / f"{_step(self.latest[0])}.png"
        )

    def _save(self, score: float | None) -> None:
        """Write a checkpoint; `score` is the accuracy of this iteration's evaluation, if any."""
        self.state.totals.setdefault("seconds", {})["total"] = self._total()
        self._since = time.perf_counter()
        self.directory.save(self.state, self.policy.transformer, score)
        self._saved = self.state.iteration

    def _add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds of some phases to the run's totals."""
        sums = self.state.totals.setdefault("seconds", {})
        for name, value in seconds.items():
            sums[name] = sums.get(name, 0.0) + value

    def _training(self) -> float:
        """Sum the seconds of training, over all processes of the run."""
        sums = self.state.totals.get("seconds", {})
        return sum(sums.get(name, 0.0) for name in TRAINING)

    def _total(self) -> float:
        """Sum the seconds of all processes of the run."""
        before = self.state.totals.get("seconds", {}).get("total", 0.0)
        return before + time.perf_counter() - self._since


def _described(state: State) -> str:
    """Say which weights are exported, for the last line of the screen."""
    ema = state.ema
    if ema.weights == "average":
        return f"weights (the average of decay {ema.decay:g})"
    text = "weights (as the last update left them"
    if ema.decay:
        share = start_share(ema.decay, ema.interval, ema.updates)
        text += (
            f": after {ema.updates} updates the average of decay {ema.decay:g}, which moves every "
            f"{ema.interval}, is still {share:.0%} untrained"
        )
    return text + ")"


@contextlib.contextmanager
def _drawing(name: str) -> Iterator[None]:
    """Let a picture that cannot be drawn be a warning: the run's numbers do not need it.

    A full disk is an error, as it is for all that comes next.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("%s cannot be drawn (%s: %s).", name, type(error).__name__, error)


def _step(iteration: int) -> str:
    return f"step-{iteration:06d}"


def _label(name: str, guidance_scale: float) -> str:
    return name if name == "base" else f"base, CFG {guidance_scale:g}"
