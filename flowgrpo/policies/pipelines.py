"""Diffusers pipelines from a folder, the Hugging Face Hub or memory, with their family."""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import require
from flowgrpo.nano import MODELS
from flowgrpo.policies import components, families, in_use
from flowgrpo.policies.device import choose_dtype
from flowgrpo.policies.family import Family, import_hook

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
"""Class of diffusers that a pipeline's scheduler is of."""
WEIGHTS = re.compile(
    r"(?P<component>[^/]+)/[^/.]+(\.(?P<variant>(?!index)[^/.]+?))?(-\d+-of-\d+)?\.safetensors"
)
"""Path of a file of weights in a pipeline's folder, whole or one of several shards."""


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline that is loaded, and what is known of it."""

    pipeline: Any
    family: Family
    dtype: torch.dtype
    """Type of its transformer's weights."""
    name: str
    """Folder, Hub id or name by which the user called it."""
    folder: Path | None = None
    """Folder of its files; None: it came without them."""
    variant: str = ""
    """Which of its files were loaded, "fp16" for NAME.fp16.safetensors; empty: those without."""
    on_host: bool = False
    """True: the transformer stays in host memory until it is sharded."""
    quantizer: str = ""
    """Quantizer of the transformer's weights, with its version; empty: none."""
    text_quantizer: str = ""
    """Quantizer of the text encoders' weights."""


def load(
    model: str,
    dtype: str | torch.dtype,
    device: torch.device,
    variant: str = "",
    masters: bool = False,
) -> Pipeline:
    """Load the pipeline in a folder or Hub repository; "nano" and "nano_text" are embedded.

    All of it is in `dtype`, except that the VAE is in float32 where that is float16: its decoder's
    activations leave float16's range. With `masters` the transformer's weights are float32, to be
    computed with in `dtype` (Policy.shard). A Hub repository is downloaded first, so the folder is
    the snapshot that was loaded.

    Raises:
        ConfigError: it is not there, incomplete, of no known family, or its scheduler is refused.
    """
    source, dtype = str(MODELS.get(model, model)), choose_dtype(dtype, device)
    index = _read_index(source, model)
    family = families.family_named(index["_class_name"], model)
    # Before the weights, which may be a download of hours.
    if not family.scheduler:
        _check_scheduler_class(_class_of(index, "scheduler", SCHEDULER), model)
    transformer = _class_of(index, "transformer", family.transformer)
    require(
        transformer == family.transformer,
        f"policy.model {model!r} has a {transformer} as its transformer, but a "
        f"{family.transformer} is expected in a {family.pipeline}; put back the one that the "
        "model was published with.",
    )
    cls = family.load_class(family.pipeline)
    try:
        chosen = {"variant": variant} if variant else {}
        folder = Path(source if os.path.isdir(source) else cls.download(source, **chosen))
        pipeline = _load_files(cls, folder, dtype, chosen, masters)
    # Loading corrupt or foreign files raises whatever the reader of that file raises.
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            # A download that finds no space is no fault of the model's files.
            raise
        check_variant(model, variant, _files_of(source))
        raise ConfigError(
            f"policy.model {model!r} could not be loaded as a {cls.__name__} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            f"{_remedy(error)}."
        ) from error
    _settle_scheduler(pipeline, family, model)
    components.check_weights(pipeline, device)
    return Pipeline(pipeline, family, dtype, model, folder, variant)


def _remedy(error: Exception) -> str:
    """Say what to do about an error of loading."""
    if isinstance(error, ImportError):
        return "install what it needs"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "free memory, or choose another policy.device or policy.dtype"
    return "restore its files"


def adopt(
    pipeline: Any, dtype: str | torch.dtype, device: torch.device, masters: bool = False
) -> Pipeline:
    """Take over a pipeline that somebody else has loaded, in the dtypes that `load` gives one;
    "auto" is that of its transformer. What its use has put on it is taken off (in_use.py).

    Raises:
        ConfigError: it is no pipeline of a known family, or its scheduler is refused.
    """
    family = families.family_of_pipeline(pipeline)
    name = str(pipeline.name_or_path or family.pipeline)
    _settle_scheduler(pipeline, family, name)
    in_use.restore(pipeline, family.transformer, device)
    dtype = choose_dtype(pipeline.transformer.dtype if dtype == "auto" else dtype, device)
    for role, component in pipeline.components.items():
        target = torch.float32 if role == "vae" and dtype == torch.float16 else dtype
        if role == "transformer":
            cast(component, torch.float32 if masters else dtype)
        elif isinstance(component, nn.Module) and getattr(component, "dtype", None) != target:
            component.to(target)
    return Pipeline(pipeline, family, dtype, name)


def cast(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights of `transformer` their type: `dtype`, or float32 for those that its class
    keeps so where it is loaded in 16 bits."""
    in_float32 = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    # Each by itself: what a module says of its dtype is that of one weight.
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if tensor.is_floating_point():
            # As from_pretrained matches them.
            stays = bool(in_float32 & set(name.split(".")))
            tensor.data = tensor.data.to(torch.float32 if stays else dtype)


def _settle_scheduler(pipeline: Any, family: Family, model: str) -> None:
    """Put the family's scheduler in place of the pipeline's, where it has one, and check it."""
    if family.scheduler:
        pipeline.scheduler = import_hook(family.scheduler)(pipeline.scheduler, model)
    check_scheduler(pipeline.scheduler, model)


def check_scheduler(scheduler: Any, model: str) -> None:
    """Raise ConfigError unless `scheduler` gives the sigmas of a flow from noise to data.

    Its own flags may be set as they like, such as karras, exponential, beta or dynamic shift: they
    choose other sigmas between 1 and 0. `scheduler_sigmas` looks at the values.

    Args:
        scheduler: of the pipeline.
        model: what the user called the pipeline.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        _check_scheduler_class(type(scheduler).__name__, model)
    if scheduler.config.get("invert_sigmas", False):
        raise ConfigError(
            f"the scheduler of policy.model {model!r} has invert_sigmas true, which counts sigmas "
            "from 0 to 1, but sigmas that fall from 1 to 0 are expected; set it to false in "
            "scheduler/scheduler_config.json."
        )


def _class_of(index: dict[str, Any], role: str, expected: str) -> str:
    """Class of a component that model_index.json names; the expected one if it names none, since
    loading the pipeline decides then."""
    value = index.get(role)
    named = isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    return value[1] if named else expected


def _check_scheduler_class(name: str, model: str) -> None:
    """Raise ConfigError unless `name` is the class of scheduler that sampling steps with."""
    if name != SCHEDULER:
        raise ConfigError(
            f"policy.model {model!r} has a {name} as its scheduler, but a {SCHEDULER} is expected, "
            "whose sigmas and velocities the sampler is defined by; put back the one that the "
            f"model was published with, or pipe.scheduler = {SCHEDULER}(shift=...) with its shift."
        )


def _read_index(source: str, model: str) -> dict[str, Any]:
    """model_index.json of a pipeline folder or Hub repository; `model` is what the user called
    it."""
    # os.path answers False for a name that is too long, which the Hub refuses with a reason.
    is_folder = os.path.isdir(source)
    index = Path(source) / "model_index.json" if is_folder else _from_hub(source, model)
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
        values["_class_name"]
        return values
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"policy.model {model!r} has no readable model_index.json ({error}), but a folder in "
            "diffusers' layout is expected; name one."
        ) from error


def _from_hub(source: str, model: str) -> Path:
    """model_index.json of a Hub repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, "model_index.json"))
    except GatedRepoError as error:
        raise ConfigError(
            f"policy.model {model!r} is gated on the Hugging Face Hub, but a repository that you "
            f"may read is expected; accept its terms at https://huggingface.co/{source} and log in "
            "by `hf auth login`, or name a local folder."
        ) from error
    # LocalEntryNotFoundError, of a Hub that cannot be reached, is an OSError.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"policy.model is {model!r}, which is no folder and could not be got from the "
            f"Hugging Face Hub ({type(error).__name__}); name 'nano', a folder in diffusers' "
            "layout, or a repository that you have access to."
        ) from error


def check_variant(model: str, variant: str, files: Iterable[str]) -> None:
    """Raise ConfigError if `files`, paths in the repository of `model`, has weights of other
    variants than `variant` and none of this one."""
    variants: dict[str, set[str]] = {}
    for file in files:
        if match := WEIGHTS.fullmatch(file):
            variants.setdefault(match["component"], set()).add(match["variant"] or "")
    # A component without files of the variant is loaded from those without one.
    lacking = [c for c, names in variants.items() if not variant and "" not in names]
    others = sorted(set().union(*variants.values()) - {""})
    if lacking:
        raise ConfigError(
            f"policy.model {model!r} has weights of {lacking[0]} in the variant "
            f"{', '.join(sorted(variants[lacking[0]]))} alone, but policy.variant is empty; set "
            "policy.variant (--variant of evaluate and sample) to that name."
        )
    if variant and variant not in others:
        raise ConfigError(
            f"policy.variant is {variant!r}, but policy.model {model!r} has weights in the "
            f"variants {', '.join(others)}; choose one of these."
            if others
            else f"policy.variant is {variant!r}, but policy.model {model!r} has no weights in "
            "variants; leave policy.variant empty."
        )


def _files_of(source: str) -> list[str]:
    """Paths in a folder or Hub repository; none where it cannot be asked."""
    if os.path.isdir(source):
        paths = Path(source).rglob("*.safetensors")
        return [path.relative_to(source).as_posix() for path in paths]
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return list(list_repo_files(source))
    except (HfHubHTTPError, OSError, ValueError):
        return []


def _load_files(
    cls: Any, folder: Path, dtype: torch.dtype, chosen: dict[str, str], masters: bool
) -> Any:
    """The pipeline of class `cls`, with None for the components that model_index.json has as
    null; `chosen`: the variant of its files, if any."""
    index = cls.load_config(folder)
    absent = {
        name: None for name, value in index.items() if isinstance(value, list) and value[0] is None
    }
    apart = dtype == torch.float16 and "vae" in index and "vae" not in absent
    dtypes = {"default": dtype, "vae": torch.float32} if apart else dtype
    if masters:
        dtypes = {"default": dtype, "transformer": torch.float32}
    with warnings.catch_warnings():
        # Its new name, `dtype`, is ignored without a word by older versions of diffusers.
        warnings.simplefilter("ignore", FutureWarning)
        return cls.from_pretrained(folder, torch_dtype=dtypes, **absent, **chosen)


def place(source: Pipeline, device: torch.device, stay: Sequence[nn.Module | None] = ()) -> None:
    """Freeze the pipeline's models and move all to `device` but those in `stay`, and the
    transformer where it stays on the host (`Pipeline.on_host`)."""
    if source.on_host:
        stay = [*stay, source.pipeline.transformer]
    for component in source.pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            if not any(component is other for other in stay):
                component.to(device)


def check_size(
    config: PolicyConfig,
    default: int | Sequence[int],
    multiple: int,
    largest: int | None,
    name: str,
) -> tuple[int, int]:
    """Height and width of an image in pixels: those of `config`, or else its resolution, or else
    `default`, one number or the two.

    Raises:
        ConfigError: one is no multiple of `multiple`, or more than `largest`.
    """
    sides = []
    defaults = (default, default) if isinstance(default, int) else default
    for side, usual in zip(("height", "width"), defaults, strict=True):
        pixels = getattr(config, side)
        field = side if pixels else "resolution"
        pixels = pixels or config.resolution or usual
        if pixels % multiple:
            near = max(round(pixels / multiple), 1) * multiple
            raise ConfigError(
                f"policy.{field} is {pixels}, but {name} makes images whose sides are multiples of "
                f"{multiple}; choose one, for example {near}."
            )
        if largest is not None and pixels > largest:
            raise ConfigError(
                f"policy.{field} is {pixels}, but {name} has positions for at most {largest} "
                "pixels on a side; choose a smaller one."
            )
        sides.append(pixels)
    return sides[0], sides[1]
