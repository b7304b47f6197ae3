"""flowgrpo sample: pictures of prompts, by the deterministic sampler."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console

from flowgrpo import files, seeds
from flowgrpo.cli.options import SampleOptions
from flowgrpo.cli.targets import (
    check_numbers,
    check_same_command,
    check_writable,
    config_of_model,
    evaluated_rows,
    image_size,
    load_base,
    resolve_target,
)
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.config.validation import require, shown
from flowgrpo.distributed.world import World, join
from flowgrpo.evaluation import evaluate, pictures
from flowgrpo.policies.adapters import check_adapter, load_adapter
from flowgrpo.policies.tokens import warn_of_cut
from flowgrpo.prompts.load import check_unicode
from flowgrpo.prompts.pictures import check_picture
from flowgrpo.rewards.frames import spread
from flowgrpo.runs import content
from flowgrpo.runs.display import Terminal
from flowgrpo.runs.export import add_initial, load_trained


def sample_pictures(options: SampleOptions, console: Console | None = None) -> Path:
    """Write one picture with `count` images of each prompt; with a run, base above trained, and
    between them the adapter that it started from, if any.

    Several processes sample a share each; the first writes.
    """
    _check_sample(options)
    config, checkpoint = config_of_model(options.model or "nano"), None
    if options.run is not None:
        config, checkpoint = resolve_target(options.run, best=False)
    changes = {
        "policy.model": options.model,
        "policy.device": options.device,
        "policy.variant": options.variant,
        "policy.quantize": options.quantize,
        **image_size(options, config),
        "sample.eval_steps": options.steps,
        "sample.guidance_scale": options.guidance,
    }
    rows = evaluated_rows(options, config) or config.sample.batch_size
    config = replace(config, **{name: v for name, v in changes.items() if v is not None})
    world = join(config.run.rank_timeout)
    console = console or Terminal(highlight=False, quiet=not world.first)
    with world.together():
        check_same_command(world, config, options, checkpoint)
        return _sample(options, config, checkpoint, rows, world, console)


def _sample(
    options: SampleOptions,
    config: Config,
    checkpoint: Path | None,
    rows: int,
    world: World,
    console: Console,
) -> Path:
    """Sample, draw and write; `rows`: of one forward."""
    policy, out = load_base(config), Path(options.out)
    if config.run.resume:
        content.warn_of_another_model(config.out_dir, policy)
    texts = list(options.prompts)
    # Checks come before the base model's images, which may take minutes.
    policy.check_texts(texts)
    edited = None if options.image is None else [options.image] * len(texts)
    policy.check_images(edited)
    warn_of_cut(policy, texts)
    if options.adapter is not None:
        description = check_adapter(policy, options.adapter)
        console.print(f"Adapter {description}.", soft_wrap=True, markup=False)
    if world.first:
        check_writable(out.parent)
    number = torch.arange(len(texts)).repeat_interleave(options.count)
    copy = torch.arange(options.count).repeat(len(texts))
    drawn = seeds.sample_seeds(options.seed, seeds.EVALUATION, number.numpy(), copy.numpy())

    def images() -> torch.Tensor:
        """The images of all processes in the first, nothing in the others."""
        images_here = evaluate.generate_images(
            policy,
            texts,
            torch.from_numpy(drawn),
            options.count,
            steps=config.sample.eval_steps,
            batch_size=rows,
            guidance_scale=config.sample.guidance_scale,
            rows=evaluate.rows_of(len(drawn), rows, world),
            images=edited,
        )
        return torch.cat(world.collect_rows(images_here) or [images_here.cpu()[:0]])

    shown = {"base": images()}
    if checkpoint is not None:
        if add_initial(policy, config):
            shown["start"] = images()
        load_trained(policy.transformer, config.optim, checkpoint)
        shown["trained"] = images()
    if options.adapter is not None:
        load_adapter(policy, options.adapter)
        shown["trained"] = images()
    if not world.first:
        return out
    captions = [text for text in texts for _ in range(options.count)]
    columns = min(max(options.count, 4), 8)
    videos = shown if policy.frames else {}
    if videos:
        shown, columns = {n: spread(row, evaluate.STRIP) for n, row in shown.items()}, 2
    out = pictures.save(pictures.grid(shown, captions, columns=columns), out)
    console.print(f"Written: {out}", soft_wrap=True, markup=False)
    for label, row in videos.items():
        for number, video in enumerate(row):
            file = out.with_name(f"{out.stem}-{label}-{number + 1}.webp")
            pictures.save_video(video, file, policy.family.frame_rate)
            console.print(f"Written: {file}", soft_wrap=True, markup=False)
    return out


def _check_sample(options: SampleOptions) -> None:
    """Raise ConfigError for options that no model is needed to find wrong."""
    require(
        bool(options.prompts),
        "no prompt was given, but at least one in quotation marks is expected; write, for example, "
        'flowgrpo sample "three red circles".',
    )
    check_unicode(options.prompts, "a prompt")
    require(
        options.count > 0,
        f"--count is {options.count}, but at least one image is expected; raise it.",
    )
    check_numbers(options, "steps", "guidance")
    check_numbers(options, "seed", "resolution", "height", "width", "frames", zero=True)
    require(
        options.seed < 2**63,
        f"--seed is {options.seed}, but it must be below 2^63; lower it.",
    )
    require(
        options.run is None or options.adapter is None,
        f"--run {options.run} has a trained model of its own, but --adapter {options.adapter} was "
        "given too; leave one out.",
    )
    if options.image is not None:
        check_picture(options.image, "--image")
    pictures.check_ending(Path(options.out))
    try:
        os.stat(options.out)
    # Not there yet; that its folder is none is said by `check_writable`.
    except (FileNotFoundError, NotADirectoryError):
        require(
            options.out != "", "--out is empty, but the file of a picture is expected; name one."
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--out is {shown(options.out)}, which cannot be written "
            f"({getattr(error, 'strerror', error)}); choose another name."
        ) from error
    require(
        not os.path.isdir(options.out),
        f"--out is {options.out!r}, which is a folder, but the file of a picture is expected; name "
        f"one, for example {Path(options.out) / 'sample.png'}.",
    )
    files.replaceable(Path(options.out))
