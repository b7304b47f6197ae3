"""The KL of the trained model to the untrained one, along the paths of one sampler for all.

Training's own figure is no measure of a comparison: some objectives have none, and it depends on
the steps and the sampler that a run trains with. Here every run has the same: T = 20 steps of
flow_sde, first images of held-out prompts, fixed seeds. With mu_i and mu_ref_i the means of step i
under the two models, both from a state of the trained model's path (Girsanov's sum, as in
flowgrpo_kernels.transitions with kl="gaussian"),

    KL = sum over i of mean |mu_i - mu_ref_i|^2 / 2 C_i^2        a mean over elements and rows

in nats for one element of the latents. The last step is left out, as in training: its noise is
not in the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo.config import SampleConfig
from flowgrpo.evaluation.evaluation_set import EvaluationSet
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.guidance import guide, velocities
from flowgrpo.sampling.rollout import chunks, prepare_both, rollout
from flowgrpo.sampling.schedule import Schedule, table_rows, training_schedule

STEPS = 20
"""T. More change the sum little, which nears an integral over time."""
ROWS = 48
"""Images that are sampled, of as many prompts, at most."""


@torch.no_grad()
def path_kl(
    policy: Policy,
    evaluation_set: EvaluationSet,
    noise_level: float,
    batch_size: int,
    guidance_scale: float = 1.0,
) -> float:
    """Measure the KL of the policy's present weights to the model before training, in nats for
    one element of the latents.

    Args:
        evaluation_set: prompts and seeds; the first image of up to `ROWS` of them is sampled.
        noise_level: of flow_sde.
        batch_size: rows of one forward.
    """
    prompts, samples = evaluation_set.prompts, evaluation_set.samples
    count = min(ROWS, len(prompts))
    sample = SampleConfig(steps=STEPS, transition="flow_sde", noise_level=noise_level)
    schedule = training_schedule(policy, sample, "gaussian")
    conditioning = policy.encode(
        list(prompts.texts[:count]), images=prompts.images and prompts.images[:count]
    )
    uncond = policy.encode_empty(guidance_scale)
    trained_steps = torch.arange(STEPS - 1)[:, None].expand(-1, count)
    # A graph would be recorded for this length alone.
    graphs, policy.graphs = policy.graphs, None
    try:
        trajectory = rollout(
            policy,
            conditioning,
            schedule,
            table_rows(trained_steps, STEPS),
            groups=torch.arange(count),
            seeds=evaluation_set.seeds[::samples][:count],
            batch_size=min(batch_size, count),
            uncond=uncond,
            guidance_scale=guidance_scale,
            keep_velocities=True,
        )
        conditioning, uncond = prepare_both(policy, schedule, conditioning, uncond)
        # The rows of a forward are those of the rollout, its short last one filled up as there, so
        # that a model that has not moved has a KL of 0.
        offsets, distances = torch.arange(min(batch_size, count)), []
        with policy.reference():
            for rows in chunks(count, batch_size):
                index = (offsets + rows.start).clamp(max=count - 1).to(policy.device)
                terms = _distances(
                    policy,
                    schedule,
                    trajectory.latents[:, index],
                    trajectory.velocities[:, index],
                    conditioning.rows(trajectory.groups[index]),
                    uncond,
                    guidance_scale,
                )
                distances.append(terms[:, : rows.stop - rows.start])
    finally:
        policy.graphs = graphs
    # float64 [T - 1]: K B^2 of each step.
    table = schedule.transitions.table[: STEPS - 1].double()
    means = torch.cat(distances, dim=1).mean(dim=1)
    return float((means * table[:, 5] * table[:, 1] ** 2).sum())


def _distances(
    policy: Policy,
    schedule: Schedule,
    latents: Tensor,
    trained: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
    guidance_scale: float,
) -> Tensor:
    """Mean squared differences, float64 [T - 1, b], between the velocities `trained` [T, b, ...]
    and those of the present model at `latents` [T + 1, b, ...]."""
    rows, distances = latents.shape[1], []
    for i in range(STEPS - 1):
        reference = guide(
            *velocities(
                policy,
                latents[i],
                schedule.sigmas[i].expand(rows),
                conditioning.at(i),
                None if uncond is None else uncond.at(i),
                guidance_scale,
            ),
            guidance_scale,
        )
        difference = trained[i].double() - reference.double()
        distances.append(difference.flatten(1).square().mean(dim=1))
    return torch.stack(distances)
