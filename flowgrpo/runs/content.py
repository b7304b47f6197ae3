"""Fingerprints of the content that a run's numbers depend on: prompts, model, rewards.

A run names its files by places, which may change: a model is moved, a prompt file copied to another
machine. What lies there may not. content.json of the run directory holds

    prompts   of training and of evaluation: their number, SHA-256 of texts and metadata
    model     a digest of samples of each component's weights, what packs them, with its version,
              and the sampler's sigmas
    rewards   of the options that name files of rewards: digests of these, or the name on the Hub
    code      of rewards of the user's own: SHA-256 of their files. Another one is said and
              recorded, not refused, as a run goes on once a reward that failed is mended
    changes   what was accepted by run.accept_changes, with what held before

A model of tens of gigabytes is sampled, as reading all of it would take longer than an iteration:
eight blocks of each large tensor, so a change between them is not seen. Weights count as bfloat16,
so that they are the same in a process that loads them in float32; names of tensors do not count,
because versions of libraries rename them. Those of policy.quantize count as they were before they
were packed; by which quantizer and version of its library that was is an entry of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowgrpo import files
from flowgrpo.config import Config, ConfigError
from flowgrpo.config.user_code import source_of
from flowgrpo.config.validation import path_text
from flowgrpo.curation import dataset
from flowgrpo.distributed import sharding
from flowgrpo.evaluation.evaluation_set import EvaluationSet
from flowgrpo.objectives import curated, objective_of
from flowgrpo.policies import Policy
from flowgrpo.policies.quantized import QuantizedLinear
from flowgrpo.policies.weight_digests import digest_of
from flowgrpo.prompts.load import fingerprint, load_prompts
from flowgrpo.rewards.table import is_address, is_users

log = logging.getLogger("flowgrpo")
FILE = "content.json"
PLACE_OPTIONS = ("model", "clip_model", "tokenizer", "head")
"""Options of rewards that name files: a folder, a file or a Hub id."""
READ = 1 << 20
"""Bytes at both ends of a reward's file that count, with its size."""
SIGMA_TOLERANCE = 1e-5
"""Difference of two sigmas that versions of a scheduler may have."""

Content = Mapping[str, Any]
"""Values of content.json, without its changes."""


def content_of(
    config: Config,
    policy: Policy,
    evaluation_set: EvaluationSet,
    rewards: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compute the fingerprints of a run's prompts, of its model as it is loaded, untrained, and of
    its rewards, by name."""
    prompts = {
        "training": load_prompts(config.sample.prompts, "train"),
        "evaluation": evaluation_set.prompts,
    }
    counts = {
        name: {"count": len(entries), "sha256": fingerprint(entries)}
        for name, entries in prompts.items()
    }
    if config.sample.curated:
        records = curated.load(config, objective_of(config).pairs)
        counts["the curated set"] = dataset.content_of(records)
    quantizers = {"transformer": policy.quantizer, "text encoders": policy.text_quantizer}
    quantizers = {name: quantizer for name, quantizer in quantizers.items() if quantizer}
    return {
        "prompts": counts,
        "model": {
            "weights": weights_of(policy),
            **({"quantizers": quantizers} if quantizers else {}),
            "sigmas": policy.sigmas(config.sample.steps).tolist(),
        },
        "rewards": files_of_rewards(rewards or {}),
        "code": code_of_rewards(rewards or {}),
    }


def files_of_rewards(rewards: Mapping[str, Any]) -> dict[str, str]:
    """Digest what the `PLACE_OPTIONS` of rewards name: "files:..." of a folder or file that is
    here, "name:..." of others."""
    digests = {}
    for name, reward in rewards.items():
        options = getattr(reward, "options", {})
        for option in PLACE_OPTIONS:
            if isinstance(place := options.get(option), str) and place:
                path = path_text(place)
                here = os.path.exists(path)
                digest = f"files:{_digest_of_files(Path(path))}" if here else f"name:{place}"
                digests[f"{_alias(name)}.{option}"] = digest
    return digests


def code_of_rewards(rewards: Mapping[str, Any]) -> dict[str, str]:
    """Digest the files of the user's own rewards, by name without their folders."""
    digests = {}
    for name in filter(is_users, rewards):
        if (path := source_of(name)) is not None:
            digests[_alias(name)] = f"files:{_digest_of_files(path)}"
    return digests


def _alias(name: str) -> str:
    """Name a reward without its place: a file by its name, an address by its kind."""
    return "http" if is_address(name) else os.path.basename(name)


def _digest_of_files(path: Path) -> str:
    """Digest a file, or the files of a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path).as_posix()} {size} ".encode())
            with open(file, "rb") as content:
                digest.update(content.read(READ))
                if size > READ:
                    content.seek(max(READ, size - READ))
                    digest.update(content.read(READ))
    return digest.hexdigest()


def weights_of(policy: Policy) -> dict[str, str]:
    """Digest the components of the policy's pipeline, by name, without adapters."""
    return {
        name: weights_digest(component)
        for name, component in policy.pipeline.components.items()
        if isinstance(component, nn.Module)
    }


def weights_digest(module: nn.Module) -> str:
    """Digest the values of the module's weights, without adapters: "bfloat16:..." or, where they
    are float16 and cannot be compared with those, "float16:..."."""
    weights = [p.detach() for name, p in module.named_parameters() if ".lora_" not in name]
    packed = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    dtypes = {*(weight.dtype for weight in weights), *(layer.compute_dtype for layer in packed)}
    # A sharded one is put together, which all processes do.
    digests = [digest_of(sharding.whole(weight)) for weight in weights]
    digests = sorted([*digests, *(layer.digest for layer in packed)])
    total = hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"{'float16' if torch.float16 in dtypes else 'bfloat16'}:{total}"


def read(folder: Path) -> dict[str, Any] | None:
    """Read content.json of a run directory; None for a run of before there was one.

    Raises:
        ConfigError: it is there, and no JSON object.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {"prompts": values["prompts"], "model": values["model"], **values}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), but the fingerprints of the run are expected; "
            "restore it, or remove it to go on without."
        ) from error


def differences(before: Content, now: Content) -> dict[str, str]:
    """Compare two contents: "training", "evaluation", "model" -> what differs, in words."""
    changes: dict[str, str] = {}
    for name, entry in now["prompts"].items():
        old = before["prompts"].get(name)
        if old is not None and old != entry:
            changes[name] = f"the prompts of {name} ({old['count']} then, {entry['count']} now)"
    if components := model_differences(before["model"], now["model"]):
        changes["model"] = f"the model's {' and '.join(components)}"
    if options := _differing(before, now, "rewards"):
        changes["rewards"] = f"what the options of rewards name, {' and '.join(options)}"
    return changes


def code_differences(before: Content, now: Content) -> dict[str, str]:
    """Compare the code of the user's own rewards: "code" -> which differ, in words."""
    names = _differing(before, now, "code")
    return {"code": f"The code of {' and '.join(names)}"} if names else {}


def _differing(before: Content, now: Content, kind: str) -> list[str]:
    """List the names under `kind` whose digests differ, of those that compare."""
    old = before.get(kind, {})
    return [
        name
        for name, digest in now.get(kind, {}).items()
        if _kind(old.get(name, "")) == _kind(digest) and old[name] != digest
    ]


def model_differences(before: Content, now: Content) -> list[str]:
    """List the components of two models that differ, and "sigmas" if these do.

    What only one of them has, or has in a dtype that the other cannot be compared with, is left
    out.
    """
    names = [
        name
        for name, digest in now["weights"].items()
        if _kind(before["weights"].get(name, "")) == _kind(digest)
        and before["weights"][name] != digest
    ]
    old, new = before.get("quantizers", {}), now.get("quantizers", {})
    names += [
        f"quantizer of the {name} ({old[name]} then, {new[name]} now)"
        for name in old.keys() & new.keys()
        if old[name] != new[name]
    ]
    sigmas = [torch.tensor(model["sigmas"], dtype=torch.float64) for model in (before, now)]
    if len(sigmas[0]) == len(sigmas[1]) and not torch.allclose(
        *sigmas, rtol=0, atol=SIGMA_TOLERANCE
    ):
        names.append("sigmas")
    return names


def _kind(digest: str) -> str:
    return digest.partition(":")[0]


def check(folder: Path, config: Config, now: Content) -> dict[str, str]:
    """Compare the content of the run in `folder` with what a continuation finds, and return the
    differences, which run.accept_changes accepts.

    Raises:
        ConfigError: there are some, and they are not accepted, or cannot be.
    """
    before = read(folder)
    if before is None:
        return {}
    changes, code = differences(before, now), code_differences(before, now)
    if not changes:
        return code
    words = "; ".join(changes.values())
    if not config.run.accept_changes:
        raise ConfigError(
            f"the run in {folder} goes on with policy.model {config.policy.model!r} and "
            f"sample.prompts {config.sample.prompts!r}, but their content is not what it was: "
            f"{words}; restore it, start a new run, or accept the change by --run.accept-changes, "
            f"which {FILE} records."
        )
    unmeasured = config.policy.adapter == "full" and config.optim.beta == 0
    if unmeasured and changes.keys() & {"evaluation", "model", "rewards"}:
        raise ConfigError(
            f"run.accept_changes is on, and {words} changed, but the model before training, which "
            "would be evaluated again, is gone with policy.adapter full and optim.beta 0; start a "
            "new run."
        )
    return {**changes, **code}


def write(folder: Path, now: Content, iteration: int, changes: Mapping[str, str]) -> None:
    """Write content.json; `changes` were accepted after `iteration` iterations."""
    before = read(folder) or {}
    record = list(before.get("changes", []))
    if changes:
        names = ("prompts", "model", "rewards", "code")
        replaced = {name: before[name] for name in names if name in before}
        record.append({"iteration": iteration, "changed": dict(changes), "before": replaced})
    files.write_json(folder / FILE, {**now, "changes": record})


def warn_of_another_model(folder: Path, policy: Policy) -> None:
    """Warn if the policy's weights are not those that the run in `folder` was trained on."""
    before = read(folder)
    if before is None:
        return
    # Sigmas may depend on the resolution, which an evaluation may choose.
    if names := model_differences(
        before["model"], {**before["model"], "weights": weights_of(policy)}
    ):
        log.warning(
            "%s is not the model that the run in %s was trained on: its %s differ, so the trained "
            "weights may not fit.",
            policy.name,
            folder,
            " and ".join(names),
        )
