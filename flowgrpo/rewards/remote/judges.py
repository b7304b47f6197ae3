"""Vision-language models as judges, behind an OpenAI-compatible endpoint (vLLM, SGLang,
`transformers serve`): POST {url}/chat/completions with the image as a PNG data URL.

unifiedreward: UnifiedReward (Wang et al., https://arxiv.org/abs/2503.05236). Question and form of
the answer are the authors' (the point_score scripts for image generation under inference_qwen in
https://github.com/CodeGoat24/UnifiedReward); decoding is greedy.

    style "final"   one grade, "Final Score: 1 ... 5"                  score = grade / 5
    style "acs"     UnifiedReward 2.0: alignment, coherence, style     score = mean / 5

flow_grpo asks as "final" does but for the sentence about key elements, and resizes the image to
512 x 512; here it is sent as it is. The authors print the three grades of "acs"; the mean is ours.

deqa: DeQA-Score (You et al., https://arxiv.org/abs/2501.11561; src/evaluate/scorer.py of
https://github.com/zhiyuanyou/DeQA-Score). The answer is begun with "The quality of the image is";
the score is the mean of 5 excellent, 4 good, 3 fair, 2 poor, 1 bad under the softmax of the next
token among these five words, divided by 5 as flow_grpo does. The endpoint has to continue a message
and return log-probabilities (`continue_final_message` and `top_logprobs`: vLLM and SGLang do,
`transformers serve` does not). A word that is not among the 20 likeliest tokens counts as
impossible.

An answer without a grade scores NaN and is logged, so the trainer drops its group; flow_grpo
gives 0.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowgrpo.distributed.world import SPECIFIC
from flowgrpo.rewards.images import to_png
from flowgrpo.rewards.interface import ReplyError, RewardError
from flowgrpo.rewards.options import configurable
from flowgrpo.rewards.remote.server import Server
from flowgrpo.rewards.remote.servers import Servers, addresses

log = logging.getLogger("flowgrpo")

# Questions are the authors' word for word: the models were trained on them.
FINAL = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated "
    "image using the format: 'element (type): value' (where value=0 means not generated, and "
    "value=1 means generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
ACS = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy."
    "\n\nOutput your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
AXES = ("Alignment", "Coherence", "Style")
NUMBER = r"([1-4](?:\.\d+)?|5(?:\.0+)?)(?![\d.]*\d)"
STYLES: dict[str, tuple[str, Callable[[str], float]]] = {}
"""Style -> (question, function that reads the grade in 1 ... 5, or NaN, from the answer)."""

QUALITY = "How would you rate the quality of this image?"
BEGIN = "The quality of the image is"
LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}


@configurable("unifiedreward")
def unifiedreward(
    *,
    url: str = "",
    model: str = "CodeGoat24/UnifiedReward-7b-v1.5",
    style: str = "final",
    token: str | None = None,
    max_tokens: int = 512,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 3,
    backoff: float = 0.5,
    wait: float = 300.0,
    tolerance: float = 0.05,
    offset: int = 0,
):
    """Build UnifiedReward.

    url: of the API, for example http://127.0.0.1:8000/v1, or several with commas between them.
    style: final or acs. concurrency: requests to a server. The others: see servers.py.
    """
    if style not in STYLES:
        raise RewardError(
            f"the style of reward 'unifiedreward' is {style!r}, but one of {', '.join(STYLES)} is "
            "expected; name one of these."
        )
    question, grade = STYLES[style]

    def judge(server: Server, image: Tensor, prompt: str) -> float:
        payload = {
            "model": model,
            "messages": [_user(image, question.format(prompt=prompt), image_first=True)],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        return grade(answer(server, server.post(payload))) / 5

    return _as_reward(
        "unifiedreward",
        url,
        judge,
        token=token,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        concurrency=concurrency,
        wait=wait,
        tolerance=tolerance,
        offset=offset,
    )


@configurable("deqa")
def deqa(
    *,
    url: str = "",
    model: str = "zhiyuanyou/DeQA-Score-Mix3",
    token: str | None = None,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 3,
    backoff: float = 0.5,
    wait: float = 300.0,
    tolerance: float = 0.05,
    offset: int = 0,
):
    """Build DeQA-Score. The options are those of `unifiedreward`."""

    def judge(server: Server, image: Tensor, prompt: str) -> float:
        payload = {
            "model": model,
            "messages": [
                _user(image, QUALITY, image_first=False),
                {"role": "assistant", "content": BEGIN},
            ],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
        }
        return expected_level(server, server.post(payload)) / 5

    return _as_reward(
        "deqa",
        url,
        judge,
        token=token,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        concurrency=concurrency,
        wait=wait,
        tolerance=tolerance,
        offset=offset,
    )


def answer(server: Server, reply: dict[str, Any]) -> str:
    """Read the text of a chat completion."""
    return _first_choice(server, reply, "message", "content")


def final_score(text: str) -> float:
    """Read the grade after "Final Score:", or NaN."""
    match = re.search(rf"Final Score:\s*{NUMBER}", text)
    return float(match[1]) if match else math.nan


def axes_score(text: str) -> float:
    """Average the three grades; NaN if one is missing."""
    grades = [re.search(rf"{axis} Score \(1-5\):\s*{NUMBER}", text) for axis in AXES]
    return sum(float(match[1]) for match in grades) / len(AXES) if all(grades) else math.nan


STYLES.update(final=(FINAL, final_score), acs=(ACS, axes_score))


def expected_level(server: Server, reply: dict[str, Any]) -> float:
    """Average LEVELS under the model's next token; NaN if none is likely.

    Raises:
        RewardError: the endpoint returns no log-probabilities.
    """
    logprobs = _first_choice(server, reply, "logprobs", kind=(dict, type(None)))
    try:
        likeliest = logprobs["content"][0]["top_logprobs"]
        tokens = {str(entry["token"]): float(entry["logprob"]) for entry in likeliest}
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise RewardError(
            f"the endpoint {server.url} of reward 'deqa' returns no log-probabilities, but the "
            "reward is made of them; use one that knows top_logprobs (vLLM, SGLang)."
        ) from error
    weights = dict.fromkeys(LEVELS, 0.0)
    for token, value in tokens.items():
        # Tokens carry the space before them, as " good" or "▁good".
        level = token.strip(" ▁Ġ").lower()
        if level in weights:
            weights[level] += math.exp(value)
    total = sum(weights.values())
    return sum(LEVELS[w] * weights[w] for w in LEVELS) / total if total else math.nan


def _as_reward(name: str, url: str, judge: Callable[[Server, Tensor, str], float], **options: Any):
    """Build a reward that asks `judge` about all images at once; options: of `Servers`."""

    def score_one(server: Server, image: Tensor, prompt: str, metadata: dict[str, Any]) -> float:
        return judge(server, image, prompt)

    urls = [_completions(address) for address in addresses(url)]
    servers = Servers(name, urls, score_one, health="../models", **options)

    def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        images = images.cpu()
        servers.compare_by_first(images, prompts, metadata)
        pairs = list(zip(images, prompts, strict=True))
        scores = servers.each(lambda server, pair: judge(server, *pair), pairs)
        without = sum(math.isnan(value) for value in scores)
        if without:
            log.warning(
                "reward %r: %d of %d answers have no grade where one is expected",
                name,
                without,
                len(scores),
                extra=SPECIFIC,
            )
        return scores

    rate.reach, rate.servers = servers.reach, servers
    return rate


def _completions(url: str) -> str:
    """Add the path of completions to the address of an API."""
    return url and url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def _user(image: Tensor, question: str, *, image_first: bool) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{to_png(image)}"}},
        {"type": "text", "text": question},
    ]
    return {"role": "user", "content": content if image_first else content[::-1]}


def _first_choice(server: Server, reply: dict[str, Any], *path: str, kind: Any = str) -> Any:
    """Read the value at `path` in the reply's first choice."""
    try:
        value = reply["choices"][0]
        for name in path:
            # An endpoint without log-probabilities leaves the key out.
            value = value.get(name) if name == "logprobs" else value[name]
        if not isinstance(value, kind):
            raise TypeError(type(value).__name__)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ReplyError(
            f"the endpoint {server.url} of reward {server.reward!r} answered {str(reply)[:80]!r}, "
            f"but a chat completion with choices[0].{'.'.join(path)} is expected; check the url.",
            f"answered {str(reply)[:80]!r}",
        ) from error
    return value
