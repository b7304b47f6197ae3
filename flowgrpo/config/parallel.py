"""Rules of `run.parallel`: what goes with a sharded transformer, and what does not."""

from __future__ import annotations

from flowgrpo.config.sections import OptimConfig, PolicyConfig, RunConfig, SampleConfig
from flowgrpo.config.validation import require


def check(policy: PolicyConfig, sample: SampleConfig, optim: OptimConfig, run: RunConfig) -> None:
    """Raise ConfigError for settings that do not go with `run.parallel`, or need fsdp."""
    _check_split_forward(policy, optim)
    if run.parallel == "replicate":
        for name, value in (("shard_size", run.shard_size), ("cpu_offload", run.cpu_offload)):
            require(
                not value,
                f"run.{name} is {value} with run.parallel replicate, but it says how fsdp shards; "
                f"set run.parallel to fsdp, or leave run.{name} out.",
            )
        return
    for name, section in (("sample", sample), ("optim", optim)):
        require(
            section.capture != "on",
            f"{name}.capture is on with run.parallel fsdp, but a CUDA graph holds addresses of "
            "weights, and FSDP gathers them into new memory for each block; set "
            f"{name}.capture to off.",
        )
    require(
        policy.quantize == "none",
        f"policy.quantize is {policy.quantize} with run.parallel fsdp, but FSDP shards parameters, "
        "and packed weights are none; set policy.quantize to none, or run.parallel to replicate.",
    )
    require(
        not policy.compile,
        "policy.compile is on with run.parallel fsdp, but nobody has tried both together; set "
        "policy.compile to false.",
    )
    require(
        policy.dtype != "float16" or policy.adapter == "lora",
        "policy.dtype is float16 with run.parallel fsdp and policy.adapter full, but FSDP adds "
        "gradients before their scale could be taken out; set policy.dtype to bfloat16 or auto.",
    )
    require(
        not optim.teacher,
        f"optim.teacher is {optim.teacher!r} with run.parallel fsdp, but a teacher reads the whole "
        "weights of the model; set run.parallel to replicate.",
    )
    require(
        optim.sft_weight == 0,
        f"optim.sft_weight is {optim.sft_weight:g} with run.parallel fsdp, but one process alone "
        "learns from the curated images, and with fsdp all run the same forwards; set it to 0, or "
        "run.parallel to replicate.",
    )
    require(
        not (sample.share_prefix and sample.shared_noise and sample.last_start > 0),
        "sample.share_prefix is on with run.parallel fsdp, but its number of forwards depends on "
        "the windows of a process's groups, and with fsdp all run as many; set sample.share_prefix "
        "to false.",
    )


def _check_split_forward(policy: PolicyConfig, optim: OptimConfig) -> None:
    require(
        not optim.split_forward or optim.steps_per_forward > 1,
        "optim.split_forward is on with optim.steps_per_forward 1, but it splits a forward of "
        "several steps; raise optim.steps_per_forward, or turn it off.",
    )
    require(
        not (optim.split_forward and policy.compile),
        "optim.split_forward and policy.compile are both on, but a compiled block takes its whole "
        "batch at once; choose one.",
    )
