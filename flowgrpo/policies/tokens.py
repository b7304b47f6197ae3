"""Prompts that are longer than what a model's text encoders see: counted and said, once a set."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flowgrpo.policies.base import Policy

log = logging.getLogger("flowgrpo")
CHUNK = 1024
"""Texts that are tokenized at once."""


def count_cut(policy: Policy, texts: Sequence[str]) -> dict[int, int]:
    """Count the texts that are cut: tokens that an encoder sees -> texts with more than these."""
    counts: dict[int, int] = {}
    for tokenizer, limit in policy.token_limits():
        longer = 0
        for start in range(0, len(texts), CHUNK):
            # verbose: transformers would speak of sequences too long for the model.
            tokens = tokenizer(list(texts[start : start + CHUNK]), verbose=False).input_ids
            longer += sum(len(ids) > limit for ids in tokens)
        counts[limit] = max(longer, counts.get(limit, 0))
    return counts


def warn_of_cut(policy: Policy, texts: Sequence[str], kind: str = "prompts") -> None:
    """Log how many of the prompts the text encoders see only the beginning of, if there are any;
    `kind` is what they are called."""
    texts = list(dict.fromkeys(texts))
    counts = {limit: count for limit, count in count_cut(policy, texts).items() if count}
    if counts:
        numbers = " and ".join(f"{count} at {limit} tokens" for limit, count in counts.items())
        log.warning(
            "of %d %s the text encoders cut %s; what follows there is not seen",
            len(texts),
            kind,
            numbers,
        )
