"""The sections of a configuration: one frozen dataclass per concern.

The line under a field is its help text (tyro prints it); numbers that follow from others are
properties. A rule that a value breaks raises ``ConfigError`` with the rule in it. A path may be a
`pathlib.Path`; it is stored as text, with ~ expanded.

Shape letters: K prompts per iteration, G samples per prompt, T sampling steps, B = K G rows.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Literal

from flowgrpo.config.validation import (
    check_positive,
    check_types,
    require,
    settle_paths,
    similar,
)


@dataclass(frozen=True)
class PolicyConfig:
    """The model that is trained, and which of its weights are."""

    model: str = "nano"
    """An embedded model (nano, nano_text), a folder in diffusers' layout, or a Hub id."""
    variant: str = ""
    """Which of the model's files: "fp16" reads NAME.fp16.safetensors; empty: NAME.safetensors."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the frozen weights; auto: bfloat16 where the device is fast at it, else float32."""
    device: str = "auto"
    """Torch device; auto: cuda when there is one, else cpu."""
    adapter: Literal["lora", "full"] = "lora"
    """Train LoRA matrices in float32 over the frozen model, or the whole transformer."""
    lora_rank: int = 32
    """Rank of the LoRA matrices."""
    lora_alpha: int = 64
    """LoRA scale: the update is multiplied by lora_alpha / lora_rank."""
    lora_init: Literal["gaussian", "kaiming"] = "gaussian"
    """Draw of LoRA's A: normal with std 1 / lora_rank, or PEFT's own default; B starts at 0."""
    lora_targets: tuple[str, ...] | None = None
    """Name endings of the linear layers that get a LoRA matrix; default: flow_grpo's list."""
    # The run starts as the model with it: the reference, and what is evaluated before training.
    init_adapter: str = ""
    """LoRA weights to start from: folder, file or Hub id. The KL is then to the model with them."""
    resolution: int = 0
    """Pixels on each side of an image; 0: the model's own default (1024 for those of the Hub)."""
    height: int = 0
    """Pixels of an image from top to bottom; 0: policy.resolution."""
    width: int = 0
    """Pixels of an image from left to right; 0: policy.resolution."""
    frames: int = 0
    """Frames of a video, 4n + 1 of them; 0: the model's own default (81 for Wan)."""
    # flow_grpo encodes 128 tokens for SD3.5 and FLUX.1; diffusers' defaults are 256 (SD3) and 512.
    # FLUX.2 sees the padding, so that its texts have the length that it was trained with.
    max_sequence_length: int = 0
    """Tokens of a prompt, of T5 or Qwen; 0: 128 as in flow_grpo, 512 of FLUX.2 and Wan."""
    # FLUX.1's default in diffusers, and flow_grpo's in its pickscore_flux recipes.
    embedded_guidance: float = 3.5
    """Guidance value that a guidance-distilled model (FLUX.1-dev) is told; not a second forward."""
    # Arguments of Z-Image's pipeline, by their names there.
    cfg_normalization: float = 0.0
    """Z-Image: largest norm of a guided velocity, in norms of the conditional one; 0: any."""
    cfg_truncation: float = 1.0
    """Z-Image: time 1 - sigma beyond which steps have no guidance; 1: all have it."""
    text_cache: str = "auto"
    """Folder of text embeddings; auto: flowgrpo/text in $XDG_CACHE_HOME or ~/.cache; "": none."""
    offload_text_encoders: bool = False
    """Keep the text encoders off the GPU except while they encode a text that is not cached."""
    attention: str = "auto"
    """Attention kernel: auto, plain, or a name of diffusers' such as native_flash or xformers."""
    compile: bool = False
    """torch.compile the transformer's blocks; the first call of each kind takes minutes."""
    fused: bool = False
    """Run norms, gates and heads of the blocks by fused kernels of ours; not with compile."""
    # Of the linear layers of the blocks; adapters go on top, as on others. Not with adapter full.
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Keep the transformer's frozen weights in 4 or 8 bits: docs/small-cards.md has the price."""
    quantize_text: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Keep the weights of the text encoders in 4 or 8 bits."""
    vae_slicing: bool = False
    """Decode images one at a time: less memory, more time."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory in the update, one more forward."""

    def __post_init__(self) -> None:
        settle_paths(self, "model", "init_adapter", "text_cache")
        check_types("policy.", self)
        check_positive("policy", self, "lora_rank", "lora_alpha")
        zero = ("resolution", "height", "width", "frames", "max_sequence_length")
        zero += ("embedded_guidance", "cfg_normalization", "cfg_truncation")
        check_positive("policy", self, *zero, zero=True)
        require(
            self.max_sequence_length <= 512,
            f"policy.max_sequence_length is {self.max_sequence_length}, but diffusers takes 512 "
            "tokens at most; lower it.",
        )
        require(
            self.quantize == "none" or self.adapter == "lora",
            f"policy.quantize is {self.quantize} with policy.adapter full, but weights in few bits "
            "cannot take an optimizer's small steps; set policy.adapter to lora, or "
            "policy.quantize to none.",
        )
        require(
            self.quantize == "none" or not self.compile,
            f"policy.quantize is {self.quantize} with policy.compile, but a compiled block has its "
            "weights as inputs, and these are packed; set one of them to none or false.",
        )
        require(
            not (self.compile and self.fused),
            "policy.compile and policy.fused are both on, but they replace the same operations; "
            "choose one.",
        )
        require(
            not (self.adapter == "full" and self.init_adapter),
            f"policy.init_adapter is {self.init_adapter!r} with policy.adapter full, but only LoRA "
            "starts from an adapter; merge it into the model by fuse_lora(), or set policy.adapter "
            "to lora.",
        )
        require(
            self.adapter == "full" or self.lora_targets != (),
            "policy.lora_targets is empty, but LoRA needs at least one layer name ending; name "
            "one or set policy.adapter to full.",
        )


@dataclass(frozen=True)
class SampleConfig:
    """Prompts, and how images are sampled from them."""

    prompts: str = "nano"
    """Prompt set: nano, geneval, ocr, general, a text or JSONL file, folder, or hub:OWNER/NAME."""
    curated: str = ""
    """Folder of a curated set: sft learns its images, dpo its pairs, and see optim.sft_weight."""
    prompts_per_iteration: int = 8
    """K: prompts drawn for one iteration."""
    group_size: int = 12
    """G: images sampled for each prompt; rewards are compared inside the group."""
    # Deterministic rollouts agree with their scouts best; `scouts.agreement` in metrics.jsonl.
    scouts: int = 0
    """N: candidates of a prompt that are previewed by few forwards and scored, of which the best
    and the worst, G in all, are sampled in full and learned from; 0: none, G are sampled."""
    scout_forwards: int = 0
    """Forwards of a preview, fewer than sample.steps; 0: half of them."""
    batch_size: int = 48
    """Rows of one forward in rollout and update alike; it must divide K G."""
    steps: int = 10
    """T: sampling steps of a training rollout."""
    eval_steps: int = 40
    """Sampling steps of an evaluation, always by the deterministic ODE."""
    transition: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    """The Gaussian step: Flow-GRPO's SDE, DanceGRPO's SDE or coefficients-preserving sampling."""
    noise_level: float = 0.7
    """How much noise a step adds: a of flow_sde and cps, eta of dance_sde."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in rollout, update and evaluation; 1: none, one forward a step."""
    window_size: int = 0
    """Consecutive steps that are stochastic and trained, the rest ODE; 0: all but the last."""
    window_range: tuple[int, int] | None = None
    """First step and end (exclusive) between which a window is drawn; default: all but the last."""
    window_schedule: Literal["random", "progressive"] = "random"
    """Place of a window: drawn for each group, or MixGRPO's, which moves on from the first step."""
    window_interval: int = 25
    """Iterations that a progressive window stays at a place before it moves."""
    window_stride: int = 1
    """Steps that a progressive window moves by."""
    # 0.1 and 13 by default in the code of MixGRPO's authors.
    window_decay: float = 0.0
    """k: at step l a progressive window stays ceil(interval exp(-k max(0, l - window_decay_from)))
    iterations; 0: everywhere as long."""
    window_decay_from: int = 0
    """Step of a progressive window from which on it stays shorter, by window_decay."""
    window_return: bool = False
    """Move a progressive window from the last place to the first again; else it stays there."""
    shared_noise: bool = False
    """Start the images of one group from the same initial noise."""
    # Its last steps run in other batches, so bits of the images differ from the plain rollout's.
    share_prefix: bool = True
    """With shared_noise, sample the steps before a window once per group, captured or not."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Sample by replaying CUDA graphs, to the same bits as without; auto: where there is CUDA."""
    overlap: int = 2
    """Chunks that may be with the rewards while the next is sampled; 0: rewards come after all."""

    def __post_init__(self) -> None:
        settle_paths(self, "prompts", "curated")
        check_types("sample.", self)
        names = ("prompts_per_iteration", "group_size", "batch_size", "eval_steps", "noise_level")
        check_positive("sample", self, *names, "guidance_scale")
        check_positive("sample", self, "overlap", zero=True)
        require(
            self.steps >= 2,
            f"sample.steps is {self.steps}, but a rollout needs at least 2 steps; raise it.",
        )
        require(
            self.group_size >= 2,
            f"sample.group_size is {self.group_size}, but rewards are compared inside a group, "
            "which needs at least 2 images; raise it.",
        )
        require(
            self.rows % self.batch_size == 0,
            f"sample.batch_size {self.batch_size} does not divide the {self.rows} rows of an "
            f"iteration (prompts_per_iteration {self.prompts_per_iteration} x group_size "
            f"{self.group_size}); choose a batch_size that divides {self.rows}, for example "
            f"{_nearest_divisor(self.rows, self.batch_size)}.",
        )
        self._check_scouts()
        low, high = self.window_bounds
        require(
            0 <= low < high <= self.steps and self.window_size >= 0,
            f"sample.window_range is {self.window_range} and window_size {self.window_size}, but "
            f"0 <= first < end <= steps ({self.steps}) and window_size >= 0 must hold; change "
            "them or sample.steps.",
        )
        require(
            not (self.transition == "cps" and high == self.steps),
            f"sample.window_range is {self.window_range} with sample.transition cps, but cps adds "
            "no noise to the last step, and a step is trained by its noise; end the range at "
            f"{self.steps - 1}.",
        )
        require(
            not (self.transition == "cps" and self.noise_level >= 2),
            f"sample.noise_level is {self.noise_level:g} with sample.transition cps, but an angle "
            "of noise_level times 90 degrees must be below 180; choose one below 2, such as 0.8.",
        )
        require(
            self.window_size <= high - low,
            f"sample.window_size {self.window_size} does not fit into the window range "
            f"[{low}, {high}); make the window smaller or the range wider.",
        )
        self._check_window_schedule()

    def _check_window_schedule(self) -> None:
        """Raise ConfigError for a progressive window that cannot move, or for numbers of one."""
        check_positive("sample", self, "window_interval", "window_stride")
        check_positive("sample", self, "window_decay", "window_decay_from", zero=True)
        if self.window_schedule == "progressive":
            low, high = self.window_bounds
            require(
                self.last_start > low,
                f"sample.window_schedule is progressive with sample.window_size {self.window_size} "
                f"and the range [{low}, {high}), which has one place for a window alone; make the "
                "window smaller or the range wider.",
            )
            return
        for name in ("interval", "stride", "decay", "decay_from", "return"):
            [default] = [f.default for f in fields(self) if f.name == f"window_{name}"]
            value = getattr(self, f"window_{name}")
            require(
                value == default,
                f"sample.window_{name} is {value!r} with sample.window_schedule random, but only a "
                f"progressive window has one; set window_schedule to progressive, or leave it at "
                f"{default!r}.",
            )

    def _check_scouts(self) -> None:
        """Raise ConfigError for candidates of which there is nothing to choose, or that cost as
        much as images."""
        check_positive("sample", self, "scouts", "scout_forwards", zero=True)
        require(
            self.scouts == 0 or self.scouts > self.group_size,
            f"sample.scouts is {self.scouts}, but the {self.group_size} images of a group "
            "(sample.group_size) are chosen of them, so more are expected; raise it, or set it to "
            "0.",
        )
        require(
            self.scout_forwards < self.steps,
            f"sample.scout_forwards is {self.scout_forwards}, but a preview is to cost less than "
            f"the {self.steps} steps of an image (sample.steps); lower it.",
        )
        require(
            self.scouts > 0 or self.scout_forwards == 0,
            f"sample.scout_forwards is {self.scout_forwards} with sample.scouts 0, but without "
            "candidates there are no previews; set sample.scouts, or leave it at 0.",
        )

    @property
    def rows(self) -> int:
        """Images sampled in one iteration, B = K G."""
        return self.prompts_per_iteration * self.group_size

    @property
    def candidates(self) -> int:
        """Candidates of one iteration, K N; 0 without scouts."""
        return self.prompts_per_iteration * self.scouts

    @property
    def forwards_of_a_scout(self) -> int:
        """Forwards of a preview, S."""
        return self.scout_forwards or self.steps // 2

    @property
    def chunks(self) -> int:
        """Forwards of `batch_size` rows that cover one iteration."""
        return self.rows // self.batch_size

    @property
    def window_bounds(self) -> tuple[int, int]:
        """First and end (exclusive) of the steps that a window may cover. flow_grpo leaves out the
        last step too, int(T * 0.99): its Gaussian is too sharp for a ratio to be trusted."""
        return self.window_range or (0, int(self.steps * 0.99))

    @property
    def last_start(self) -> int:
        """The latest step at which a window may begin."""
        return self.window_bounds[1] - self.trained_steps

    @property
    def trained_steps(self) -> int:
        """Stochastic steps of one row, W, each trained in the update."""
        low, high = self.window_bounds
        return self.window_size or high - low


def _nearest_divisor(number: int, size: int) -> int:
    """Find the divisor of `number` that is nearest to `size`, the smaller of two.

    Beyond 10^10 it may not be the nearest: a search of all of them would not end.
    """
    small = [d for d in range(1, min(math.isqrt(number), 10**5) + 1) if number % d == 0]
    divisors = [*small, *(number // d for d in small)]
    return min(divisors, key=lambda d: (abs(d - size), d))


@dataclass(frozen=True)
class RewardConfig:
    """Rewards of the images, and how they are combined."""

    weights: dict[str, float] = field(default_factory=lambda: {"nano_strict": 1.0})
    """Rewards and their weights: a name in flowgrpo.rewards, module:function, file.py:function."""
    report: tuple[str, ...] = ()
    """Rewards that evaluation reports, the first as the accuracy; those of weights follow."""
    frames: int = 1
    """Frames of a video, at even distances, whose mean an image reward scores; 1: the middle."""
    retries: int = 2
    """How often a failing reward is tried again before its groups are dropped."""
    timeout: float = 0.0
    """Seconds after which one call of a remote reward counts as failed; 0: the reward's own."""
    # Tokens are better kept in FLOWGRPO_REWARD_NAME_TOKEN: this dictionary is written to files.
    options: dict[str, str] = field(default_factory=dict)
    """Options of rewards: NAME.OPTION VALUE, for example geneval.batch_size 16."""
    devices: dict[str, str] = field(default_factory=dict)
    """Devices of reward models: NAME DEVICE, or all DEVICE, for example all cuda:1; an option
    NAME.device counts before it."""
    # group is GDPO's (arXiv 2601.05242); with optim.advantage_std global the whole of it.
    normalize: Literal["none", "std", "group"] = "none"
    """Before the weighted sum, divide each reward by its std inside the groups of the iteration
    (std), or make it mean 0 and std 1 in each group (group)."""

    def __post_init__(self) -> None:
        if isinstance(self.options, dict):
            texts = {
                name: os.fspath(value) if isinstance(value, os.PathLike) else value
                for name, value in self.options.items()
            }
            object.__setattr__(self, "options", texts)
        check_types("reward.", self)
        check_positive("reward", self, "retries", "timeout", zero=True)
        check_positive("reward", self, "frames")
        finite = all(abs(weight) < float("inf") for weight in self.weights.values())
        require(
            finite and any(self.weights.values()),
            f"reward.weights is {self.weights}, but at least one reward with a finite weight other "
            "than 0 is expected; name one, for example --reward.weights nano_strict 1.0.",
        )
        names = (*self.weights, *self.report)
        for name in self.devices:
            require(
                name == "all" or name in names,
                f"reward.devices has {name!r}, but all or one of the rewards of this run, "
                f"{', '.join(dict.fromkeys(names))}{similar(name, names)}, is expected; correct "
                "the name.",
            )


@dataclass(frozen=True)
class OptimConfig:
    """The loss and the optimizer."""

    objective: str = "grpo"
    """Objective of the update: grpo, awm, nft, sft, orw, dpo, opd, refl; see docs/objectives.md."""
    lr: float = 3e-4
    """Learning rate of AdamW after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    # Gradients of a whole transformer have a smaller RMS, at the same norm, and lie below 1e-8.
    eps: float = 0.0
    """AdamW's epsilon; 0: 1e-8, or 1e-12 where policy.adapter is full."""
    warmup: int = 0
    """Updates over which the learning rate rises linearly to lr."""
    decay: int = 0
    """Updates over which it falls linearly to a tenth of lr, where it stays; 0: it does not."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    clip_range: float = 1e-4
    """The ratio is clipped to 1 +- clip_range."""
    adv_clip: float = 5.0
    """Advantages are clamped to +- adv_clip."""
    # 0.04 with kl std_dev is about the paper's 0.004 with kl gaussian.
    beta: float = 0.04
    """Weight of the KL to the model before training; 0 also spares its forward."""
    # C^2 = -S^2 dt: std_dev leaves dt out, as flow_grpo's code has done since July 2025.
    kl: Literal["std_dev", "gaussian"] = "std_dev"
    """KL = |mean - reference mean|^2 / 2 S^2 (std_dev) or / 2 C^2 (gaussian, the true KL)."""
    advantage_std: Literal["group", "global", "none"] = "group"
    """Divide rewards less their group's mean by the std of the group, of all rows, or not."""
    # With std the gradient of every step has the same scale.
    step_weighting: Literal["none", "std"] = "none"
    """Weight of a step in the policy term: 1, or its std / |d mean / d velocity|."""
    updates_per_iteration: int = 2
    """Optimizer steps on the images of one iteration."""
    guard: bool = False
    """GRPO-Guard: recentre the ratio and balance the steps; not for transition cps."""
    dppo: bool = False
    """Flow-DPPO: in place of the clip, leave out samples past dppo_threshold that move away."""
    dppo_threshold: float = 1e-5
    """KL per element from the rollout's step above which a sample may only move back."""
    ema_decay: float = 0.9
    """Decay of the averaged weights that evaluation and the saved adapter use; 0: no average."""
    ema_every: int = 8
    """Updates between two steps of the average."""
    ratio_tolerance: float = 0.0
    """Largest |ratio - 1| that the first update of an iteration may show before the run stops."""
    # A replay costs one forward for each trained step, without a backward.
    anchor: Literal["rollout", "replay"] = "rollout"
    """Old log-probabilities: the rollout's, or computed again by the forward of the update."""
    # More rows may mean other kernels, and then the first ratios are not 1: see anchor.
    steps_per_forward: int = 1
    """Trained steps of a chunk in one forward of the update; it must divide their number."""
    # Weights that run.parallel fsdp gathers serve all steps; products are as many and as large.
    split_forward: bool = False
    """Compute such a forward module by module in parts of one step each: the rollout's bits."""
    capture: Literal["on", "off"] = "off"
    """Replay forward and backward as one CUDA graph; pays where launches take longer than work."""
    levels: int = 1
    """Noise levels that an objective of the forward process looks at each result at."""
    level_weight: Literal["uniform", "sigma", "normalized"] = "uniform"
    """Weight of a matching error: 1, the noise level, or that over the mean absolute error."""
    sft_weight: float = 0.0
    """Weight of flow matching on images of sample.curated beside grpo, awm or nft."""
    tau: float = 0.5
    """Temperature of orw: an image counts exp(reward / tau)."""
    refl_steps: int = 3
    """Last steps of a rollout of which refl draws one for each image, to learn by."""
    teacher: str = ""
    """LoRA weights that opd learns from, over the same model: folder, file or Hub id."""
    dpo_beta: float = 100.0
    """Strength of dpo's preferences; errors are means over the elements of a latent."""
    nft_beta: float = 1.0
    """How far nft's positive and negative velocities lie from the old policy's."""
    old_decay: float = 0.5
    """Largest share of itself that nft's old policy keeps after an iteration; 0: none."""
    old_decay_rise: float = 0.001
    """Growth of that share with each optimizer step, from 0."""

    def __post_init__(self) -> None:
        settle_paths(self, "teacher")
        check_types("optim.", self)
        check_positive("optim", self, "lr", "clip_range", "adv_clip", "ema_every")
        check_positive("optim", self, "updates_per_iteration", "steps_per_forward")
        check_positive("optim", self, "levels", "tau", "nft_beta", "dpo_beta")
        check_positive("optim", self, "dppo_threshold", "refl_steps")
        require(
            not (self.guard and self.dppo),
            "optim.guard and optim.dppo are both on, but each has its own way to bound an update; "
            "choose one.",
        )
        nonnegative = (
            "eps",
            "weight_decay",
            "warmup",
            "decay",
            "max_grad_norm",
            "beta",
            "ratio_tolerance",
            "old_decay_rise",
            "sft_weight",
        )
        check_positive("optim", self, *nonnegative, zero=True)
        require(
            all(0 <= b < 1 for b in (*self.betas, self.ema_decay, self.old_decay)),
            f"optim.betas is {self.betas}, ema_decay {self.ema_decay} and old_decay "
            f"{self.old_decay}, but each must be at least 0 and below 1; change the one outside.",
        )
        require(
            self.clip_range < 1,
            f"optim.clip_range is {self.clip_range}, but it must be below 1; lower it.",
        )

    @property
    def keeps_velocities(self) -> bool:
        """True: an update compares its velocities with the rollout's, which are stored."""
        return self.guard or self.dppo


@dataclass(frozen=True)
class RunConfig:
    """Output, length and evaluation of the run."""

    out: str | None = None
    """Run directory: new, empty, or of a run that never began; default: runs/RECIPE-SEED."""
    steps: int = 100
    """Iterations (rollout, reward, update) from the start of the run."""
    min_seconds: float = 0.0
    """Go on past run.steps until rollouts, rewards and updates have taken so many seconds."""
    seed: int = 0
    """Seed of prompts, noise, windows and adapter weights."""
    eval_every: int = 50
    """Iterations between two evaluations, up to run.steps; 0: only before and after."""
    # How many iterations fit into them is the machine's matter, and so is where these evaluations
    # come: equal runs agree in their numbers, not in these lines.
    eval_seconds: float = 0.0
    """Seconds of training between two more, each saved, until run.min_seconds; 0: none."""
    eval_prompts: int = 120
    """Held-out prompts of an evaluation; 0: all of the set."""
    eval_samples: int = 2
    """Images for each prompt of an evaluation (two or more show diversity within a prompt)."""
    # Rows of an evaluation's forward become fewer as its images become larger.
    eval_resolution: int = 0
    """Pixels on each side of an evaluation's images; 0: as in training."""
    eval_guidance: float = 1.0
    """Guidance scale of one more evaluation of the untrained model, for comparison; 1: none."""
    eval_kl: float = 0.0
    """Noise level of flow_sde at which evaluations measure the KL to the untrained model; 0: no."""
    checkpoint_every: int = 50
    """Iterations between two checkpoints; 0: only at the end."""
    resume: str | None = None
    """Run directory to go on with; its configuration is taken from there. auto: run.out if a run
    has begun there, else a new one."""
    accept_changes: bool = False
    """Go on though prompts or model weights are others than the run began with; recorded."""
    threads: int = 0
    """CPU threads; 0: what torch chooses."""
    rank_timeout: float = 1800.0
    """Seconds that one of several processes waits for the others."""
    reduction: Literal["auto", "tree", "all_reduce"] = "auto"
    """Order in which gradients are added: in a tree, the same for any number of processes; or as
    they come and by torch.distributed's all-reduce, in less memory. auto: the tree for LoRA."""
    leaves: int = 128
    """Parts that the gradients of an optimizer step are added in by the tree, at most: as many
    processes may share it. Each doubling holds one more copy of the gradients."""
    # Gradients of what is sharded are summed by FSDP; `reduction` is then of LoRA's matrices alone.
    parallel: Literal["replicate", "fsdp"] = "replicate"
    """Each of several processes holds the whole transformer, or a piece of it by FSDP2 (fsdp)."""
    shard_size: int = 0
    """Processes that share one copy of the transformer with fsdp, such as those of a machine; it
    divides their number. 0: all."""
    cpu_offload: bool = False
    """With fsdp, keep the pieces in host memory, and the optimizer there too."""
    wandb: str = ""
    """Weights & Biases project that numbers and samples also go to; empty: none."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """Progress as a bar, as plain lines or not at all; auto: a bar on a terminal, else lines."""

    def __post_init__(self) -> None:
        settle_paths(self, "out", "resume")
        check_types("run.", self)
        check_positive(
            "run", self, "steps", "eval_samples", "eval_guidance", "rank_timeout", "leaves"
        )
        counts = ("seed", "eval_every", "eval_prompts", "checkpoint_every", "threads", "shard_size")
        others = ("min_seconds", "eval_seconds", "eval_kl", "eval_resolution")
        check_positive("run", self, *counts, *others, zero=True)
        require(self.seed < 2**63, f"run.seed is {self.seed}, but it must be below 2^63; lower it.")
