"""Recipes: functions that return a Config, and the table that finds them by name.

    sd35m_geneval, sd35m_ocr, sd35m_pickscore    the paper (arXiv 2505.05470) on SD3.5-M
    ..._window    Flow-GRPO-Fast: CPS, three trained steps, no guidance
    ..._guard     GRPO-Guard: balanced ratios, a smaller clip range, no KL
    ..._1gpu      eight groups in place of 48, text encoders off the GPU, fewer reward models
    ..._24gb, sd35m_ocr_12gb    the same on one card of so many GiB: weights in 4 or 8 bits, blocks
                  recomputed; FLUX.1-dev and Z-Image at rank 32
    flux_pickscore, flux_pickscore_window, flux_pickscore_1gpu    the same for FLUX.1-dev
    flux2_klein_pickscore, flux2_klein_ocr, ..._1gpu    Flow-Factory's numbers, on FLUX.2-klein-base
    flux2_klein_distilled_pickscore    the same for FLUX.2-klein, in four steps without guidance
    qwen_image_pickscore, qwen_image_ocr    Qwen-Image-2512, sharded by torchrun; ..._1gpu in 8 bits
    wan22_ti2v_5b_ocr, wan22_ti2v_5b_pickscore_window, ..._1gpu    videos of Wan 2.2 TI2V-5B
    zimage_pickscore, zimage_ocr, zimage_turbo_pickscore, ..._1gpu    Z-Image and its Turbo
    nano, nano_awm    the embedded model, in flowgrpo/nano/recipes.py
    nano_text    its sibling that writes words, in flowgrpo/nano/text/recipes.py

sd3.py  flux.py  flux2.py  qwen.py  wan.py  zimage.py
           the numbers of one family, each with its source
tasks.py   what the papers train for: prompts, rewards, weight of the KL, length
fit.py     a recipe's last step: the user's own values, and the rows of a forward

None of these recipes has been run to its end here; only the embedded model's has. Ours, in all of
them: the frozen weights are bfloat16 (flow_grpo: float16 for SD3.5, under a GradScaler; here
policy.dtype float16 has a fixed loss scale). Rows of a forward follow from the memory of the GPU
(flow_grpo: 9 of SD3.5-M, 3 of FLUX), which changes no number but the time. The prompts are this
package's; name a folder of flow_grpo's data sets by sample.prompts for the paper's own. Length and
evaluation are ours too: flow_grpo trains until it is stopped.
"""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config, ConfigError
from flowgrpo.config.user_code import advice, import_function, split_target
from flowgrpo.config.validation import require, similar

SD3, FLUX, FLUX2, QWEN, WAN, ZIMAGE = (
    f"flowgrpo.recipes.{name}" for name in ("sd3", "flux", "flux2", "qwen", "wan", "zimage")
)

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "nano": ("flowgrpo.nano:recipe", {}),
    "nano_awm": ("flowgrpo.nano.recipes:awm", {}),
    "nano_text": ("flowgrpo.nano.text:recipe", {}),
    "sd35m_geneval": (f"{SD3}:paper", {"task": "geneval"}),
    "sd35m_geneval_1gpu": (f"{SD3}:paper", {"task": "geneval", "groups": 8}),
    "sd35m_geneval_24gb": (f"{SD3}:paper", {"task": "geneval", "groups": 8, "card": 24}),
    "sd35m_geneval_window": (f"{SD3}:window", {"task": "geneval"}),
    "sd35m_geneval_window_1gpu": (f"{SD3}:window", {"task": "geneval", "groups": 8}),
    "sd35m_geneval_guard": (f"{SD3}:guard", {"task": "geneval"}),
    "sd35m_ocr": (f"{SD3}:paper", {"task": "ocr"}),
    "sd35m_ocr_1gpu": (f"{SD3}:paper", {"task": "ocr", "groups": 8}),
    "sd35m_ocr_12gb": (f"{SD3}:paper", {"task": "ocr", "groups": 8, "card": 12}),
    "sd35m_ocr_24gb": (f"{SD3}:paper", {"task": "ocr", "groups": 8, "card": 24}),
    "sd35m_ocr_window": (f"{SD3}:window", {"task": "ocr"}),
    "sd35m_ocr_window_1gpu": (f"{SD3}:window", {"task": "ocr", "groups": 8}),
    "sd35m_ocr_guard": (f"{SD3}:guard", {"task": "ocr"}),
    "sd35m_pickscore": (f"{SD3}:paper", {"task": "pickscore"}),
    "sd35m_pickscore_1gpu": (f"{SD3}:paper", {"task": "pickscore", "groups": 8}),
    "sd35m_pickscore_24gb": (f"{SD3}:paper", {"task": "pickscore", "groups": 8, "card": 24}),
    "sd35m_pickscore_window": (f"{SD3}:window", {"task": "pickscore"}),
    "sd35m_pickscore_window_1gpu": (f"{SD3}:window", {"task": "pickscore", "groups": 8}),
    "sd35m_pickscore_guard": (f"{SD3}:guard", {"task": "pickscore"}),
    "flux_pickscore": (f"{FLUX}:paper", {}),
    "flux_pickscore_1gpu": (f"{FLUX}:paper", {"groups": 8}),
    "flux_pickscore_24gb": (f"{FLUX}:paper", {"groups": 8, "card": 24}),
    "flux_pickscore_window": (f"{FLUX}:window", {}),
    "flux_pickscore_window_1gpu": (f"{FLUX}:window", {"groups": 8}),
    "flux2_klein_pickscore": (f"{FLUX2}:base", {"task": "pickscore"}),
    "flux2_klein_pickscore_1gpu": (f"{FLUX2}:base", {"task": "pickscore", "groups": 8}),
    "flux2_klein_pickscore_24gb": (f"{FLUX2}:base", {"task": "pickscore", "groups": 8, "card": 24}),
    "flux2_klein_ocr": (f"{FLUX2}:base", {"task": "ocr"}),
    "flux2_klein_ocr_1gpu": (f"{FLUX2}:base", {"task": "ocr", "groups": 8}),
    "flux2_klein_ocr_24gb": (f"{FLUX2}:base", {"task": "ocr", "groups": 8, "card": 24}),
    "flux2_klein_distilled_pickscore": (f"{FLUX2}:distilled", {}),
    "flux2_klein_distilled_pickscore_1gpu": (f"{FLUX2}:distilled", {"groups": 8}),
    "qwen_image_ocr": (f"{QWEN}:window", {"task": "ocr"}),
    "qwen_image_ocr_1gpu": (f"{QWEN}:window", {"task": "ocr", "groups": 8}),
    "qwen_image_pickscore": (f"{QWEN}:window", {"task": "pickscore"}),
    "qwen_image_pickscore_1gpu": (f"{QWEN}:window", {"task": "pickscore", "groups": 8}),
    "wan22_ti2v_5b_ocr": (f"{WAN}:paper", {"task": "ocr"}),
    "wan22_ti2v_5b_ocr_1gpu": (f"{WAN}:paper", {"task": "ocr", "groups": 4}),
    "wan22_ti2v_5b_pickscore_window": (f"{WAN}:window", {}),
    "wan22_ti2v_5b_pickscore_window_1gpu": (f"{WAN}:window", {"groups": 4}),
    "zimage_ocr": (f"{ZIMAGE}:window", {"task": "ocr"}),
    "zimage_ocr_1gpu": (f"{ZIMAGE}:window", {"task": "ocr", "groups": 8}),
    "zimage_ocr_24gb": (f"{ZIMAGE}:window", {"task": "ocr", "groups": 8, "card": 24}),
    "zimage_pickscore": (f"{ZIMAGE}:window", {"task": "pickscore"}),
    "zimage_pickscore_1gpu": (f"{ZIMAGE}:window", {"task": "pickscore", "groups": 8}),
    "zimage_pickscore_24gb": (f"{ZIMAGE}:window", {"task": "pickscore", "groups": 8, "card": 24}),
    "zimage_turbo_pickscore": (f"{ZIMAGE}:turbo", {"task": "pickscore"}),
    "zimage_turbo_pickscore_1gpu": (f"{ZIMAGE}:turbo", {"task": "pickscore", "groups": 8}),
}
"""Recipe name -> "module:function" and its arguments; the function takes keyword overrides too."""
ENDINGS = ("_1gpu", "_12gb", "_24gb")
"""Endings of the names of a recipe's forms for one GPU of 80 GB, and for small cards."""
EMBEDDED = {name for name, (target, _) in RECIPES.items() if target.startswith("flowgrpo.nano")}
"""Recipes of the embedded model, which need no download and no GPU."""


def recipe(name: str, **overrides: Any) -> Config:
    """Build the Config of the recipe `name`: a key of RECIPES, "package.module:function" or
    "file.py:function".

    Args:
        overrides: handed to the function.
    """
    target, arguments = RECIPES.get(name, (name, {}))
    if not all(split_target(target)):
        whole = ", ".join(recipe for recipe in RECIPES if not recipe.endswith(ENDINGS))
        raise ConfigError(
            f"recipe {name!r} is unknown, but one of {whole}, some of them with an ending for "
            "one GPU or a small card (_1gpu, _24gb, _12gb), or package.module:function or "
            f"file.py:function is expected{similar(name, RECIPES)}; name one of these."
        )
    if name in RECIPES:
        return import_function(target)(**arguments, **overrides)
    # Here, since it imports torch, which no recipe of the package needs.
    from flowgrpo.config.isolation import isolated

    try:
        with isolated(f"recipe {name!r}"):
            build = import_function(target)
    # A module of the user's own may raise anything while it is imported, a script SystemExit.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"recipe {name!r} cannot be loaded from {target} ({type(error).__name__}: "
            f"{_line(error)}), but a function that returns a flowgrpo.config.Config is expected "
            f"there; {advice(error)}."
        ) from error
    require(
        callable(build),
        f"recipe {name!r} is {type(build).__name__}, but a function that returns a "
        "flowgrpo.config.Config is expected; write one around it.",
    )
    try:
        with isolated(f"recipe {name!r}"):
            config = build(**overrides)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"recipe {name!r} failed ({type(error).__name__}: {_line(error)}), but a "
            "flowgrpo.config.Config is expected; correct it."
        ) from error
    require(
        isinstance(config, Config),
        f"recipe {name!r} returned {type(config).__name__}, but a flowgrpo.config.Config is "
        "expected; return one.",
    )
    return config


def _line(error: BaseException) -> str:
    """Write an error's text on one line."""
    return " ".join(str(error).split())[:300]


def describe(name: str, config: Config) -> str:
    """Describe the recipe `name`, whose Config this is: rewards, what they need, sources of the
    numbers. The empty string for the embedded model's and for those of other modules."""
    target, arguments = RECIPES.get(name, ("", {}))
    module, _, method = target.partition(":")
    if module not in (SD3, FLUX, FLUX2, QWEN, WAN, ZIMAGE):
        return ""
    from flowgrpo.recipes import tasks

    task = arguments.get("task", "pickscore")
    return tasks.describe(module.rpartition(".")[2], method, task, config.reported)
