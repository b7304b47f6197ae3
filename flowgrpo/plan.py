"""The plan of a run, before it starts: its group arithmetic and the GPU memory that it needs.

The memory is an estimate for one GPU with 16-bit frozen weights and LoRA: what is always there, and
the largest of what comes and goes.

    always     weights      2 bytes (4 in float32) for each parameter of transformer, VAE and text
                            encoders and for tables of positions, less for what policy.quantize and
                            policy.quantize_text pack; the encoders not if they are offloaded
               adapters     20 bytes a parameter: itself, its gradient, AdamW's two moments and the
                            average; 4 more where it starts from policy.init_adapter
               sums         4 bytes a parameter of the adapters for each partial sum of gradients
                            (distributed/gradients.py), and as much for what processes exchange
               trajectory   T + 1 latents of each row of the process in float32; with Guard the
                            velocities too
               rewards      float32 weights of the reward models that run in this process
               overhead     CUDA context and workspaces of the libraries, 1.5 GiB
    update     activations  what autograd keeps: c_d width + c_r rank bytes a token and block, as
                            counted on blocks of diffusers' classes in bfloat16, plain and with
                            policy.fused (policies/*/sizes.py); twice as many rows under guidance
               passing      what one block has alive beside that
               copies       [W, s B] and A of the adapted layers in 16 bits, see policies/lora.py;
                            with recomputed activations too, since they are held for an update;
                            with captured rollouts they are one piece that stays; with
                            policy.quantize the largest layer alone, made whole
    rollout    copies and what one block has alive, or the VAE's feature maps
    evaluation the same, of images of run.eval_resolution, if that is set
    encode     text encoders that are offloaded

With run.parallel fsdp a process has its piece of the transformer's weights (none with
run.cpu_offload) and, in forward and backward, three blocks whole: the one that runs, the next,
whose weights come meanwhile, and the buffer that these come in. Merged copies are then those of one
block.

Not in it: the pools of captured and compiled graphs, and what fragmentation costs; so at most 80 %
of the memory is planned with. Of the peaks of iterations of the real SD3.5-medium, FLUX.1-dev,
FLUX.2-klein and Qwen-Image, counted tensor by tensor on torch's meta device, the estimate is 0.97
to 1.07 (tests/flowgrpo/test_on_device_memory.py holds it, of most with fewer blocks); what fsdp
gathers is reckoned, not counted. No figure has been compared with a GPU yet.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from flowgrpo.config import Config, PolicyConfig, replace
from flowgrpo.config.config import parts_of
from flowgrpo.policies.families import FAMILIES
from flowgrpo.policies.family import Architecture

GIB = 2**30
FILL = 0.8
"""Share of the memory that is planned with."""
MOST_ROWS = 12
"""Rows of a forward, at most: 12 images of 512 pixels are about 15,000 tokens, enough for a GPU."""
OVERHEAD = 1.5 * GIB
BYTES_A_TRAINED = 20
BYTES_PACKED = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}
"""Bytes of a weight by quantizer, see policies/quantized.py; scales of whole rows are few."""
BYTES_WHOLE = 12
"""Bytes, for each weight of the largest packed layer, of what makes it whole and merges it."""
GATHERED_BLOCKS = 3
"""Blocks whose weights are whole at a time with run.parallel fsdp."""

REWARD_MODELS = {
    "pickscore": {"CLIP-H": 986e6},
    "hpsv2": {"HPSv2": 986e6},
    "imagereward": {"ImageReward": 446e6},
    "clipscore": {"CLIP-L": 428e6},
    "aesthetic": {"CLIP-L": 428e6},
    "geneval": {"CLIP-L": 428e6, "Mask2Former": 69e6},
    "geneval_strict": {"CLIP-L": 428e6, "Mask2Former": 69e6},
}
"""Reward -> its models -> roughly their parameters; equal models are loaded once."""


def sizes_of(model: str, variant: str = "") -> Architecture | None:
    """Find the sizes of a pipeline by its Hub id or in its folder; None: its family has none, or
    its files are not complete. `variant`: policy.variant."""
    families = [family for family in FAMILIES.values() if family.sizes is not None]
    for family in families:
        if model in family.sizes.known:
            return family.sizes.known[model]
    folder = Path(model)
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        vae = folder / "vae" / "config.json"
        vae_config = json.loads(vae.read_text(encoding="utf-8")) if vae.is_file() else {}
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        for family in families:
            # Families may share a class of transformers.
            classes = index["_class_name"], config["_class_name"]
            if classes == (family.pipeline, family.transformer):
                encoders = [*folder.glob("text_encoder*")]
                sizes = family.sizes.read(
                    config,
                    vae_config,
                    _parameters(folder / "transformer", variant),
                    sum(_parameters(path, variant) for path in encoders),
                    _parameters(folder / "vae", variant),
                )
                packed = sum(_parameters(path, variant, _of_a_linear_layer) for path in encoders)
                return sizes and dataclasses.replace(sizes, encoders_packed=packed)
    except (OSError, ValueError, KeyError, TypeError):
        # A folder that cannot be read has no plan; loading it says why.
        return None
    return None


def _of_a_linear_layer(name: str, shape: list[int]) -> bool:
    """Tell a text encoder's linear layers from its tables of embeddings, by its file's header."""
    tables = ("embed", "shared", "relative_attention_bias")
    return len(shape) == 2 and not any(table in name for table in tables)


def _parameters(
    folder: Path, variant: str, counts: Callable[[str, list[int]], bool] = lambda *_: True
) -> int:
    """Numbers in the .safetensors files of a component, from their headers; 0 without files.

    A folder may hold the same weights several times, in variants such as fp16: those of `variant`
    count, or those without one.

    counts: (name, shape) -> whether a tensor counts.
    """
    from safetensors import safe_open

    files: dict[str, list[Path]] = {}
    for path in folder.glob("*.safetensors"):
        # NAME.fp16.safetensors, or NAME.fp16-00001-of-00002.safetensors of several.
        stem = re.sub(r"-\d+-of-\d+$", "", path.name.removesuffix(".safetensors"))
        files.setdefault(stem.partition(".")[2], []).append(path)
    count = 0
    for file in files.get(variant) or files.get("", ()):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                shape = tensors.get_slice(name).get_shape()
                count += math.prod(shape) if counts(name, shape) else 0
    return count


def expected_memory(config: Config, arch: Architecture, gpus: int = 1) -> dict[str, float]:
    """GiB of each component at its largest on one of `gpus` GPUs, and under "total" the expected
    peak."""
    policy, sample, optim = config.policy, config.sample, config.optim
    size = 4 if policy.dtype == "float32" else 2
    height, width, frames = _size(policy, arch)
    # One frame of an image; of a video the first frame of latents stands for one.
    latent_frames = 1 if frames == 0 else (frames - 1) // arch.frame_step + 1
    image = latent_frames * (height // arch.pixels) * (width // arch.pixels)
    # With those of the image that is edited, which has the sample's size.
    image *= 1 + arch.references
    text = arch.fixed_tokens + (policy.max_sequence_length or arch.text_tokens)
    latent = arch.channels * (height // arch.latent_pixels) * (width // arch.latent_pixels)
    latent *= latent_frames
    rank = policy.lora_rank
    rows = sample.batch_size * (2 if sample.guidance_scale != 1 else 1)
    # See policies/quantized.py.
    by_time = "int8" if policy.quantize == "nf4" else policy.quantize
    encoders = _weights(arch.encoders, arch.encoders_packed, size, policy.quantize_text)
    trained = sum(rank * (i + o) for i, o in arch.adapted)
    # The largest share of an optimizer step's leaves, and of the rows.
    leaves = parts_of(config.chunks_per_update, config.run.leaves)
    leaves_here = -(-leaves // gpus)
    rows_here = min(-(-leaves_here * sample.rows // leaves), sample.rows)
    blocks = sum(
        number for kind, number in arch.blocks if not (kind.image_attention or kind.text_attention)
    )
    transformer, gathered = _weights(arch.parameters, arch.packed, size, policy.quantize), 0.0
    transformer += _weights(0, arch.modulating, size, by_time)
    copies = size * sum((i + rank) * o + rank * i for i, o in arch.adapted)
    if policy.quantize != "none":
        copies = BYTES_WHOLE * arch.packed_largest
    if config.run.parallel == "fsdp":
        gathered = transformer / blocks * GATHERED_BLOCKS
        transformer /= config.run.shard_size or gpus
        if config.run.cpu_offload:
            transformer = 0
        copies /= blocks
    always = {
        "weights": transformer
        + size * (arch.vae + arch.tables)
        + (0 if policy.offload_text_encoders else encoders),
        "adapters": (BYTES_A_TRAINED + 4 * bool(policy.init_adapter)) * trained,
        "sums": 4 * trained * partial_sums(config.reduction, leaves_here, gpus),
        "trajectory": rows_here * latent * 4 * (sample.steps + 1),
        "rewards": 4 * sum(_reward_models(config).values()),
        "overhead": OVERHEAD,
    }
    if optim.keeps_velocities:
        always["trajectory"] += rows_here * latent * size * sample.steps
    # The text's tokens go through the blocks too, unless these only attend to them.
    through = image if any(kind.text_attention for kind, _ in arch.blocks) else image + text
    stored = 0.0
    for kind, number in arch.blocks:
        a, b = kind.stored_fused if policy.fused else kind.stored
        of = "image" if kind.image_attention else "text" if kind.text_attention else kind.only
        tokens = {"": image + text, "image": image, "text": text}[of]
        stored += number * tokens * (a * arch.width + b * rank)
    if policy.gradient_checkpointing:
        # The inputs of the blocks, and one block whole.
        stored = stored / blocks + 2 * arch.width * through * blocks
    passing = arch.passing * arch.width * through
    decoding = decoder_maps(config, arch, height * width, frames, sample.batch_size)
    moving = {
        "update": gathered
        + copies
        + (stored + passing) * rows * optim.steps_per_forward * (size / 2),
        "rollout": max(gathered + copies + passing * rows * (size / 2), decoding),
        "encode": encoders if policy.offload_text_encoders else 0,
    }
    if config.run.eval_resolution:
        side, eval_rows = config.run.eval_resolution, config.eval_batch_size
        tokens = latent_frames * (side // arch.pixels) ** 2 * (1 + arch.references)
        tokens += through - image
        taken = eval_rows * rows / sample.batch_size * tokens * arch.passing * arch.width
        decoded = decoder_maps(config, arch, side * side, frames, eval_rows)
        moving["evaluation"] = max(gathered + copies + taken * (size / 2), decoded)
    memory = {name: value / GIB for name, value in {**always, **moving}.items()}
    return {**memory, "total": (sum(always.values()) + max(moving.values())) / GIB}


def _size(policy: PolicyConfig, arch: Architecture) -> tuple[int, int, int]:
    """Height, width and frames of a sample; 0 frames for an image."""
    sides = (policy.resolution,) * 2 if policy.resolution else arch.size or (arch.resolution,) * 2
    height, width = policy.height or sides[0], policy.width or sides[1]
    return height, width, (policy.frames or arch.frames) if arch.frames else 0


def _weights(count: int, packed: int, size: int, quantizer: str) -> float:
    """Bytes of `count` weights of `size` bytes, of which `packed` are if `quantizer` is one."""
    return size * count + packed * (BYTES_PACKED.get(quantizer, size) - size)


def decoder_maps(config: Config, arch: Architecture, pixels: int, frames: int, rows: int) -> float:
    """Bytes of the VAE's feature maps while `rows` images, or videos of `frames` frames, of so many
    pixels are decoded."""
    if not arch.vae:
        return 0.0
    size = 4 if config.policy.dtype == "float32" else 2
    images = 1 if config.policy.vae_slicing else rows
    maps = arch.decoder_maps * arch.decoder_width * pixels * size * images
    # Frames come one after the other, and are put together.
    return maps + 3 * frames * pixels * size * rows


def trained_weights(config: Config, arch: Architecture, gpus: int = 1) -> float:
    """GiB that a GPU holds for a transformer that is trained as a whole, in float32: itself, its
    gradient, AdamW's two moments, the average, and the reference of a KL."""
    fsdp = config.run.parallel == "fsdp"
    if fsdp and config.run.cpu_offload:
        return 0.0
    # A sharded reference is of the type that forwards are computed in.
    size = 2 if fsdp and config.policy.dtype == "bfloat16" else 4
    reference = size * (config.optim.beta > 0 or config.run.eval_kl > 0)
    pieces = (config.run.shard_size or gpus) if fsdp else 1
    return (BYTES_A_TRAINED + reference) * arch.parameters / pieces / GIB


def partial_sums(reduction: str, leaves: int, gpus: int = 1) -> int:
    """Count the sums of gradients that a process holds at most, beside the parameters' own.

    Args:
        reduction: "tree" or "all_reduce".
        leaves: chunks of an optimizer step that it has.
    """
    # What is sent, what is received, and the sum of all.
    exchanged = 3 if gpus > 1 else 0
    if reduction != "tree":
        return min(exchanged, 1)
    return exchanged + math.ceil(math.log2(leaves)) if leaves > 1 else exchanged


def traffic(config: Config, trained: int, gpus: int) -> dict[str, float]:
    """Count the bytes that each of `gpus` processes sends in an iteration, by what they are.

    Args:
        trained: trained parameters, whose gradients are float32.
    """
    others = (gpus - 1) / gpus
    # One slice of its sums to each other process, then its slice of the total.
    gradients = config.optim.updates_per_iteration * 2 * 4 * trained * others
    scores = 8 * config.sample.rows / gpus * len(config.reward.weights) * (gpus - 1)
    return {"gradients": gradients, "scores": scores}


def gathered(config: Config, parameters: int, gpus: int, micro_steps: int) -> tuple[float, float]:
    """Count how often a process gathers the weights of a sharded transformer in an iteration, and
    the bytes that it receives by that, without evaluations.

    Args:
        parameters: of the transformer.
        micro_steps: of an iteration, of all processes.
    """
    sample = config.sample
    full, size = config.policy.adapter == "full", 4 if config.policy.dtype == "float32" else 2
    if full and config.policy.dtype == "auto":
        size = 4
    # Forward and backward; the reference of LoRA is the same weights without the matrices.
    passes = 2 + (config.optim.beta > 0)
    gathers = (sample.chunks * sample.steps + micro_steps * passes) / gpus
    pieces = config.run.shard_size or gpus
    return gathers, gathers * parameters * size * (1 - 1 / pieces)


def process_lines(config: Config, gpus: int) -> dict[str, str]:
    """Describe how an iteration is dealt to `gpus` processes, a line each.

    Raises:
        ConfigError: they cannot share it.
    """
    from flowgrpo.distributed.dealing import deal
    from flowgrpo.distributed.sharding import check_even
    from flowgrpo.distributed.world import World
    from flowgrpo.objectives import objective_of

    sample, objective = config.sample, objective_of(config)
    micro_steps = objective.micro_steps(config, sample.rows)
    dealing = deal(
        micro_steps,
        config.optim.updates_per_iteration,
        sample.rows,
        sample.batch_size,
        gpus,
        by_rows=objective.by_rows,
        most_leaves=config.run.leaves,
    )
    if config.run.parallel == "fsdp":
        updates = config.optim.updates_per_iteration
        world = World(0, gpus, joined=True)
        check_even(world, dealing, sample.rows, updates, sample.batch_size)
    leaves, rows = _counts(map(len, dealing.runs)), _counts(map(len, dealing.rows))
    lines = {
        "processes": f"{gpus}, each with {leaves} of the {dealing.leaves} parts of an update and "
        f"{rows} of {sample.rows} images",
        "idle": f"{dealing.idle:.1%} of their time"
        + (
            f", as {gpus} do not divide {dealing.leaves}{_advice(config, gpus)}"
            if dealing.idle
            else ""
        ),
    }
    arch = sizes_of(config.policy.model, config.policy.variant)
    if arch is not None and config.policy.adapter == "lora":
        trained = sum(config.policy.lora_rank * (i + o) for i, o in arch.adapted)
        sent = traffic(config, trained, gpus)
        words = ", ".join(f"{name} {_bytes(count)}" for name, count in sent.items())
        lines["traffic"] = f"each sends {words} an iteration"
    if arch is not None and config.run.parallel == "fsdp":
        gathers, received = gathered(config, arch.parameters, gpus, len(micro_steps))
        lines["weights"] = (
            f"in {config.run.shard_size or gpus} pieces; each process gathers all of them "
            f"{gathers:g} times an iteration and receives {_bytes(received)}"
        )
    same = "the same to the bit as on one"
    if config.reduction != "tree":
        same = "that of one up to the order in which gradients are added (run.reduction)"
    lines["run"] = same
    return lines


def _advice(config: Config, gpus: int) -> str:
    """Name the numbers of rows a forward, nearest to the present one, that so many processes
    share without waiting; "" if there are none."""
    share = config.sample.rows // config.optim.updates_per_iteration
    fitting = [
        size
        for size in range(1, share + 1)
        if share % size == 0 and parts_of(share // size, config.run.leaves) % gpus == 0
    ]
    nearest = sorted(fitting, key=lambda size: abs(size - config.sample.batch_size))[:2]
    return f"; sample.batch_size {' or '.join(map(str, sorted(nearest)))} would" if nearest else ""


def _counts(counts: Iterable[int]) -> str:
    """Write the smallest and the largest of some counts, or the one that all are."""
    counts = sorted(set(counts))
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _reward_models(config: Config) -> dict[str, float]:
    names = (*config.reward.weights, *config.reward.report)
    here = [name for name in names if not _elsewhere(config, name)]
    return {model: n for name in here for model, n in REWARD_MODELS.get(name, {}).items()}


def _elsewhere(config: Config, name: str) -> bool:
    """Tell if a reward's model is put on another device than the policy."""
    reward, first = config.reward, {"auto": "cuda:0", "cuda": "cuda:0"}
    device = reward.options.get(
        f"{name}.device", reward.devices.get(name, reward.devices.get("all", "auto"))
    )
    on = config.policy.device
    return device != "auto" and first.get(device, device) != first.get(on, on)


def reward_servers(config: Config) -> dict[str, list[str]]:
    """List the addresses of the remote rewards, by name; if they answer is seen in the run."""
    from flowgrpo.rewards.remote.servers import addresses
    from flowgrpo.rewards.table import is_remote, is_users, load, options_of

    names = dict.fromkeys((*config.reward.weights, *config.reward.report))
    options = options_of(config.reward.options, names)
    # The user's own are not imported for a plan.
    rewards = {name: load(name, options[name]) for name in names if not is_users(name)}
    return {
        name: addresses(reward.options["url"])
        for name, reward in rewards.items()
        if is_remote(name, reward)
    }


def fit_batch_size(config: Config, available: float | None = None) -> Config:
    """Give `config` as many rows a forward as `available` GiB allow (default: this machine's GPU,
    or else 80): a divisor of the rows of one update, at most MOST_ROWS; 1 where none fits."""
    available = available or gpu_memory() or 80.0
    arch, sample = sizes_of(config.policy.model, config.policy.variant), config.sample
    share = sample.rows // config.optim.updates_per_iteration
    for rows in range(MOST_ROWS, 1, -1):
        if share % rows == 0:
            trial = replace(config, **{"sample.batch_size": rows})
            if arch is None or expected_memory(trial, arch)["total"] <= FILL * available:
                return trial
    return replace(config, **{"sample.batch_size": 1})


def gpu_memory() -> float | None:
    """Memory of the first GPU in GiB, or None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIB


def plan_lines(config: Config, available: float | None = None, gpus: int = 1) -> dict[str, str]:
    """Describe the group arithmetic and the expected memory of a run on `gpus` GPUs, a line each.

    Raises:
        ConfigError: so many processes cannot share an iteration.
    """
    # Objectives come with torch, which the command line's help does without.
    from flowgrpo.objectives.describe import looked_at, scouted_by
    from flowgrpo.rewards.table import is_address

    sample, optim = config.sample, config.optim
    lines = {
        "images": f"{sample.prompts_per_iteration} prompts x {sample.group_size} = {sample.rows} "
        "an iteration",
        **({"scouts": scouted_by(config)} if sample.scouts else {}),
        "updates": f"{optim.updates_per_iteration} an iteration, each of "
        f"{config.chunks_per_update} micro-batches of {sample.batch_size} images x "
        f"{looked_at(config)}",
    }
    if gpus > 1:
        lines |= process_lines(config, gpus)
    if servers := reward_servers(config):
        lines["servers"] = "; ".join(
            ("" if is_address(name) else f"{name}: ") + ", ".join(urls)
            for name, urls in servers.items()
        )
    arch = sizes_of(config.policy.model, config.policy.variant)
    if arch is None:
        return lines
    if config.policy.adapter == "full":
        gib = trained_weights(config, arch, gpus)
        # Activations are known of frozen weights with adapters alone.
        lines["memory"] = (
            f"{gib:.1f} GiB a GPU for weights, gradients, AdamW, average and reference; what else "
            "a run needs is not known for policy.adapter full"
        )
        return lines
    memory = expected_memory(config, arch, gpus)
    total = memory.pop("total")
    last = "update, rollout, evaluation and encode"
    if "evaluation" not in memory:
        last = last.replace(" evaluation", "").replace("rollout,", "rollout")
    components = ", ".join(f"{name} {gib:.1f}" for name, gib in memory.items() if gib >= 0.05)
    text = f"about {total:.0f} GiB"
    if available is not None:
        text += f" of {available:.0f}"
        if total > available:
            text += ", which is more than there is: lower sample.batch_size"
    if gpus > 1:
        text += " a GPU"
    lines["memory"] = f"{text} ({components}; of {last} the largest counts)"
    return lines
