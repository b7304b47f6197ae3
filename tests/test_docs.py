"""README and docs: snippets run, command lines parse; links, paths, names and numbers are true."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
import tempfile
import types
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flowgrpo_kernels as kernels
from flowgrpo import nano, objectives, rewards, train
from flowgrpo.cli import options
from flowgrpo.cli.doctor import LIBRARIES
from flowgrpo.comparison.studies import STUDIES, parse_study
from flowgrpo.config import Config, PolicyConfig, SampleConfig, reference, to_json
from flowgrpo.curation.curate import curate
from flowgrpo.curation.options import CurateOptions
from flowgrpo.evaluation import systems
from flowgrpo.policies import Policy
from flowgrpo.policies.family import Family
from flowgrpo.recipes import RECIPES, recipe, tasks
from flowgrpo.records import Prompts
from flowgrpo.rewards import REWARDS, Scorer
from flowgrpo_kernels.compat import flow_grpo
from support import grey_pictures, hub_copy

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FILES += sorted((ROOT / "docs").glob("*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def fences(page: str, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the one table whose first line begins with `head`."""
    lines = PAGES[page].splitlines()
    [start] = [number for number, line in enumerate(lines) if line.startswith(head)]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        rows.append([cell.strip() for cell in cells])
    return rows


def names(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def linked_record(page: str, name: str) -> dict:
    """The JSON file of that name that a page links to."""
    [target] = {t for t in re.findall(r"\]\(([^)]+\.json)\)", PAGES[page]) if Path(t).name == name}
    return json.loads(((ROOT / page).parent / target).read_text(encoding="utf-8"))


# Python

RUNNERS: dict[str, Callable[..., None]] = {}


def runs(words: str):
    """Decorator: runs the snippet that has these words."""

    def register(runner: Callable[..., None]) -> Callable[..., None]:
        RUNNERS[words] = runner
        return runner

    return register


SNIPPETS = [(page, text) for page in PAGES for text in fences(page, "python")]


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_snippets_run(page, text, monkeypatch, capsys):
    [runner] = [runner for words, runner in RUNNERS.items() if words in text]
    runner(text, monkeypatch, capsys)


def test_every_runner_has_a_snippet():
    for words in RUNNERS:
        assert sum(words in text for _, text in SNIPPETS) == 1, words


@runs("= flow_sde(")
def rollout_and_loss(text, monkeypatch, capsys):
    """Under the names that the text leaves to the reader; on policy the ratio is exactly 1."""
    net = torch.nn.Conv2d(16, 16, 1)
    seeds, states = torch.arange(3), []

    def model(x, step):
        states.append(x.detach())
        return net(x.detach())

    scope = {
        "sigmas": torch.linspace(1, 0, 5),
        "seeds": seeds,
        "device": "cpu",
        "model": model,
        "reference": lambda x, step: torch.zeros_like(x),
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "step": 1,
    }
    rollout, update = text.split("out = grpo_loss(")
    with torch.no_grad():
        exec(rollout, scope)
    scope |= {"x_t": states[1], "x_next": states[2]}
    with torch.no_grad():
        args = (net(states[1]), states[1], scope["transitions"], 1)
        _, scope["old_log_prob"] = scope["sde_step"](*args, seeds=seeds)
    exec("out = grpo_loss(" + update, scope)
    assert scope["x"].shape == (3, 16, 64, 64)
    assert torch.equal(scope["out"].ratio, torch.ones(3)) and scope["out"].kl > 0
    assert net.weight.grad.abs().sum() > 0


@runs("= window(cps(")
def guided_window(text, monkeypatch, capsys):
    net = torch.nn.Conv2d(16, 16, 1, dtype=torch.bfloat16)
    scope = {
        "torch": torch,
        "sigmas": torch.linspace(1, 0, 5),
        "seeds": torch.arange(2),
        "device": "cpu",
        "model": lambda x, step: net(x),
        "empty": lambda x, step: 0.5 * net(x),
    }
    ratios = []
    ending = "    x = x_next\n"
    assert text.endswith(ending)
    with torch.no_grad():
        exec(text + "    ratios.append(ratio)\n", scope | {"ratios": ratios})
    assert len(ratios) == 4
    assert all(torch.equal(ratio, torch.ones(2)) for ratio in ratios)


@runs("import nft_loss")
def forward_process_loss(text, monkeypatch, capsys):
    """On policy both errors agree, and what succeeded is drawn to its result."""
    net = torch.nn.Conv2d(16, 16, 1)
    sigma, x0, noise = torch.rand(3), torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8)
    scope = {"s": sigma.view(-1, 1, 1, 1), "sigma": sigma, "x0": x0, "noise": noise}
    scope |= {"model": net, "old_model": lambda x: net(x).detach(), "adv_clip": 5.0}
    scope["advantages"] = torch.tensor([9.0, -9.0, 0.0])
    exec(text, scope)
    assert scope["optimality"].tolist() == [1.0, 0.0, 0.5]
    assert torch.equal(scope["out"].positive_error, scope["out"].negative_error)
    assert net.weight.grad.abs().sum() > 0


def patched(text: str, **theirs: dict) -> dict[str, object]:
    """Runs a snippet that patches modules or classes; what it put there, by name.

    theirs: of each name in the snippet, what the module or class has.
    """
    is_class = {name: name[0].isupper() for name in theirs}
    scope = {
        name: type(name, (), has) if is_class[name] else types.ModuleType(name)
        for name, has in theirs.items()
    }
    for name, has in theirs.items():
        if not is_class[name]:
            vars(scope[name]).update(has)
    owners = dict(scope)
    exec(text, scope | {"torch": torch, "flow_grpo": flow_grpo})
    found = {}
    for name, has in theirs.items():
        for key, value in has.items():
            if isinstance(value, type):
                found |= {key: vars(value)}
            else:
                found[f"{name}.{key}"] = getattr(owners[name], key)
    return found


def flow_grpo_step(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None):
    """flow_grpo's, and Precise's."""


def module_of(function) -> str:
    return function.__module__.removeprefix("flowgrpo_kernels.compat.")


@runs("flow_grpo.patch(their_pipeline")
def drop_in_of_flow_grpo(text, monkeypatch, capsys):
    has = {"sde_step_with_logprob": flow_grpo_step}
    found = patched(text, their_pipeline=has, their_training_script=has)
    assert [module_of(f) for f in found.values()] == ["flow_grpo"] * 2


@runs("flow_grpo.patch(flux_pipeline")
def drop_in_of_flux_pipelines(text, monkeypatch, capsys):
    """What is stored in bfloat16 is what was scored."""
    has = {"sde_step_with_logprob": flow_grpo_step}
    step = patched(text, flux_pipeline=has, flux_script=has)["flux_script.sde_step_with_logprob"]
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
    scheduler = SimpleNamespace(sigmas=sigmas, timesteps=sigmas[:-1] * 1000)
    out = step(scheduler, torch.randn(2, 3), scheduler.timesteps[:2], torch.randn(2, 3))[0]
    assert torch.equal(out.bfloat16().float(), out)


@runs("dance_grpo.patch(")
def drop_in_of_dance_grpo(text, monkeypatch, capsys):
    def step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
        """DanceGRPO's."""

    found = patched(text, train_grpo_flux={"flux_step": step})
    assert [module_of(f) for f in found.values()] == ["dance_grpo"]


@runs("flow_factory.patch(")
def drop_in_of_flow_factory(text, monkeypatch, capsys):
    def step(self, noise_pred, timestep, latents, next_latents=None, timestep_next=None):
        """Flow-Factory's."""

    has = {"step": step}
    found = patched(text, FlowMatchEulerDiscreteSDEScheduler=has, UniPCMultistepSDEScheduler=has)
    assert [module_of(f) for f in found.values()] == ["flow_factory"] * 2


@runs("verl_omni.patch(")
def drop_in_of_verl_omni(text, monkeypatch, capsys):
    def step(self, sample, model_output, timestep=None, generator=None):
        """verl-omni's."""

    found = patched(text, FlowMatchSDEDiscreteScheduler={"sample_previous_step": step})
    assert [module_of(f) for f in found.values()] == ["verl_omni"]


@runs("unirl.patch(")
def drop_in_of_unirl(text, monkeypatch, capsys):
    def denoise(self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None):
        """UniRL's."""

    strategy = type("CPSSDEStrategy", (), {"denoise": denoise, "canonical_name": "cps"})
    found = patched(text, strategies={"CPSSDEStrategy": strategy})
    assert module_of(found["CPSSDEStrategy"]["denoise"]) == "unirl"


@runs("mixgrpo.patch(")
def drop_in_of_mixgrpo(text, monkeypatch, capsys):
    def flow(model_output, latents, eta, sigmas, index, prev_sample, generator=None):
        """MixGRPO's."""

    def dance(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
        """MixGRPO's."""

    both = {"flow_grpo_step": flow, "dance_grpo_step": dance}
    found = patched(text, sampling_utils=both, train_grpo_flux={"dance_grpo_step": dance})
    assert [module_of(f) for f in found.values()] == ["mixgrpo"] * 3


@runs("precise.patch(")
def drop_in_of_precise(text, monkeypatch, capsys):
    has = {"sde_step_with_logprob": flow_grpo_step}
    found = patched(text, their_pipeline=has, their_trainer=has)
    assert [module_of(f) for f in found.values()] == ["precise"] * 2


@runs("import transition_rows")
def rows_from_tensors(text, monkeypatch, capsys):
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
    scope = {"torch": torch, "log_prob": kernels.log_prob, "sigmas": sigmas}
    scope |= {"sigma": sigmas[:2], "sigma_next": sigmas[1:3]}
    scope["noise_level"] = torch.tensor([0.7, 0.3])
    scope |= {name: torch.randn(2, 3) for name in ("velocity", "sample", "prev_sample")}
    exec(text, scope)
    assert scope["log_p"].isfinite().all() and scope["mean"].shape == (2, 3)


@runs("import gated_residual, joint_heads, norm_modulate")
def block_kernels(text, monkeypatch, capsys):
    x = torch.randn(2, 5, 96)
    scope = {"x": x, "scale": torch.zeros(2, 96), "shift": torch.zeros(2, 96)}
    scope |= {"gate": torch.ones(2, 96), "image": x, "text": x[:, :3]}
    scope |= {"image_weight": torch.ones(4), "text_weight": torch.ones(4)}
    exec(text, scope)
    torch.testing.assert_close(
        scope["y"], torch.nn.functional.layer_norm(x, (96,), eps=1e-6), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(scope["x"], x + scope["y"])
    assert scope["q"].shape == (2, 8, 24, 4)


def test_the_hub_page_lists_every_layer():
    listed = {name for _, cell in table("docs/hub.md", "| model |") for name in names(cell)}
    layers = {name: getattr(kernels.layers, name) for name in kernels.layers.__all__}
    modules = {
        n for n, x in layers.items() if isinstance(x, type) and issubclass(x, torch.nn.Module)
    }
    assert listed == modules


@runs("import fuse")
def fused_transformer(text, monkeypatch, capsys):
    transformer, inputs = hub_copy.sd3()
    theirs = transformer(**inputs, return_dict=False)[0]
    exec(text, {"pipeline": SimpleNamespace(transformer=transformer)})
    assert "forward" in vars(transformer.transformer_blocks[0])
    ours = transformer(**inputs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


@runs("LocalLayerRepository(")
def kernelized(text, monkeypatch, capsys):
    """Run by tests/kernels/test_hub_copy.py, with the library installed."""
    assert text == hub_copy.snippets()[0]


@runs("get_local_kernel(")
def from_a_repository(text, monkeypatch, capsys):
    """As the one before."""
    assert text == hub_copy.snippets()[1]


def own_rewards(text: str, monkeypatch) -> types.ModuleType:
    """The module my_rewards with the text of a snippet."""
    module = types.ModuleType("my_rewards")
    exec(text, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


def blue_images() -> torch.Tensor:
    """Two images: black, and wholly blue."""
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1, 2] = 255
    return images


@runs("def blue(")
def plain_reward(text, monkeypatch, capsys):
    own_rewards(text, monkeypatch)
    scorer = Scorer({"my_rewards:blue": 1.0})
    assert scorer(blue_images(), Prompts.of(["a"]), 2).total.tolist() == [0.0, 1.0]


@runs('@configurable("blue")')
def configurable_reward(text, monkeypatch, capsys):
    own_rewards(text, monkeypatch)
    [line] = [line for line in LINES if "my_rewards:score.weight" in line]
    config = train_config(line, monkeypatch)
    assert config.reported == ("nano_strict", "nano_partial", "my_rewards:score")
    for reported in ((), config.reported[2:]):
        scorer = Scorer.of(config.reward, reported)
        assert list(scorer.weights) == ["my_rewards:score"]
        assert scorer(blue_images(), Prompts.of(["a"]), 2).total.tolist() == [0.0, 2.0]


@runs("def calm(")
def reward_of_videos(text, monkeypatch, capsys):
    """Given whole videos: a still one is calm, black and white in turn is not."""
    own_rewards(text, monkeypatch)
    videos = torch.zeros(2, 4, 3, 4, 4, dtype=torch.uint8)
    videos[1, ::2] = 255
    scorer = Scorer({"my_rewards:calm": 1.0}, frames=3)
    assert scorer(videos, Prompts.of(["a"]), 2).total.tolist() == [0.0, -1.0]


@runs("nano.recipe(")
def run_from_python(text, monkeypatch, capsys):
    configs = []
    summary = {"before": {"accuracy": 0.25}, "after": {"accuracy": 0.5}}
    monkeypatch.setattr(train, "run", lambda config: configs.append(config) or summary)
    exec(text, {})
    assert capsys.readouterr().out == "0.25 0.5\n"
    assert (configs[0].run.steps, configs[0].sample.noise_level) == (200, 0.8)
    assert nano.recipe().run.steps != 200


@runs("from flowgrpo.comparison.studies import Study")
def study_from_python(text, monkeypatch, capsys):
    exec(text, {})
    assert capsys.readouterr().out == "3e-3 0.003 8\n1e-3 0.001 8\n"


def test_studies_of_the_pages_can_be_compared():
    texts = [text for page in PAGES for text in fences(page, "yaml") if "arms:" in text]
    assert texts
    for text in texts:
        study = parse_study(text, Path("my_study.yaml")).with_budget(None, None)
        assert len(study.configs()) == len(study.arms) > 1


def test_the_page_lists_the_shipped_studies_and_their_arms():
    rows = {names(name)[0]: arms for name, arms, _ in table("docs/compare.md", "| study | arms")}
    assert list(rows) == list(STUDIES)
    assert rows["methods"].split(", ") == list(STUDIES["methods"].arms)
    steps = [str(arm["sample.steps"]) for arm in STUDIES["steps"].arms.values()]
    assert rows["steps"].startswith(f"T = {', '.join(steps)} in training")


@runs("class MyPolicy(Policy)")
def policy_skeleton(text, monkeypatch, capsys):
    """The methods of the page are exactly those that a family has to write."""
    scope = {}
    exec(text, scope)
    methods = {name for name, value in vars(scope["MyPolicy"]).items() if callable(value)}
    assert methods == Policy.__abstractmethods__
    assert not scope["MyPolicy"].__abstractmethods__


@runs("REINFORCE (Williams")
def objective(text, monkeypatch, capsys):
    """The loss on one batch, its ratio and its gradient."""
    from flowgrpo_kernels import flow_sde, sde_step

    scope = {}
    exec(text, scope)
    row = scope["OBJECTIVE"]
    assert isinstance(row, objectives.Objective)
    factor = torch.tensor(0.3, requires_grad=True)
    policy = SimpleNamespace(velocity=lambda sample, sigma, conditioning: factor * sample)
    transitions = flow_sde(torch.linspace(1, 0, 5), noise_level=0.7)
    sample, step = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    with torch.no_grad():
        state, log_prob = sde_step(0.3 * sample, sample, transitions, step, seeds=torch.arange(2))
    advantages, weights = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0])
    batch = SimpleNamespace(
        sample=sample, sigma=None, conditioning=None, uncond=None, prev_sample=state,
        transitions=transitions, table_row=step, old_log_prob=log_prob, advantages=advantages,
        weights=weights,
    )  # fmt: skip
    out = row.loss(policy, batch, nano.recipe())
    assert torch.equal(out.ratio, torch.ones(2))
    torch.testing.assert_close(out.loss.detach(), -(advantages * log_prob).mean())
    out.loss.backward()
    assert factor.grad.isfinite() and factor.grad != 0


@runs("CuratedSet.load(")
def curated_set(text, monkeypatch, capsys):
    """On the set that the page's first command makes, here of eight grey pictures."""
    out = "curated/photos"
    assert f"flowgrpo curate photos --out {out} " in PAGES["docs/curate.md"]
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        pictures = {f"{i}.png": (20 * i, f"prompt {i // 2}") for i in range(8)}
        grey_pictures.captioned(Path("photos"), pictures)
        rewards = grey_pictures.write_rewards(Path(folder))
        score = {"rewards": {rewards["brightness"]: 1.0}, "pairs": True, "resolution": 8}
        curate(CurateOptions(("photos",), out, shares=(1.0, 0.0, 0.0), **score))
        scope = {}
        exec(text, scope)
    assert scope["images"].shape == (4, 3, 8, 8) and scope["images"].dtype == torch.uint8
    assert scope["images"][:, 0, 0, 0].tolist() == [0, 20, 40, 60]
    assert scope["chosen"][:, 0, 0, 0].tolist() == [20, 60]
    assert scope["rejected"][:, 0, 0, 0].tolist() == [0, 40]
    assert capsys.readouterr().out.startswith("prompt 0 {")


# Command lines

LINES = [
    line
    for page in PAGES
    for block in fences(page, "sh")
    for line in block.replace("\\\n", " ").splitlines()
    if shlex.split(line, comments=True)
]
INLINE = [
    text for page in PAGES for text in names(prose(page)) if re.match(r"flowgrpo [a-z-]+", text)
]
# Of a command that torchrun starts, what it starts.
LAUNCHER = r"^torchrun .* -m (?=flowgrpo )"
COMMANDS = [
    re.sub(LAUNCHER, "", command)
    for line in LINES + INLINE
    for command in re.split(r" && ", line.partition("  #")[0])
    if "..." not in command
]
# Programs that are no part of this repository.
OTHERS = ("hf", "pre-commit", ".")


def entry_point() -> Callable[[list[str]], int]:
    """The function that pyproject.toml installs as `flowgrpo`."""
    module, function = re.search(r'^flowgrpo = "([\w.]+):(\w+)"', PYPROJECT, re.MULTILINE).groups()
    return getattr(importlib.import_module(module), function)


def train_config(line: str, monkeypatch) -> Config:
    """The configuration that a `flowgrpo train` line hands to `train.run`."""
    configs = []
    monkeypatch.setattr(train, "run", lambda config, **_: configs.append(config) or {})
    assert entry_point()(shlex.split(line, comments=True)[1:]) == 0, line
    return configs[0]


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """A working directory with the modules and the run that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    for name, function in {"my_rewards": "score", "my_recipes": "mine"}.items():
        module = types.ModuleType(name)
        setattr(module, function, nano.recipe)
        monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "runs" / "nano-0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(nano.recipe()))


TRAIN = [line for line in COMMANDS if line.startswith("flowgrpo train")]


@pytest.mark.parametrize("line", list(dict.fromkeys(TRAIN)))
def test_training_commands_run(line, working_directory, monkeypatch):
    if "--run.resume" not in line:
        # `flowgrpo train` alone would take the directory of the run that is resumed.
        line += " --run.out new"
    assert train_config(line, monkeypatch).run.steps > 0


def test_other_commands_parse():
    classes = {
        "compare": options.CompareOptions,
        "evaluate": options.EvaluateOptions,
        "sample": options.SampleOptions,
        "curate": CurateOptions,
        "serve-reward": options.ServeOptions,
    }
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[0] == "flowgrpo" and words[1] != "train":
            assert words[1] in (*classes, "doctor", "plan"), line
            assert words[1] != "plan" or entry_point()(words[1:]) == 0, line
            if words[1] in classes:
                assert options.parse(classes[words[1]], words[2:], line)


def extras() -> set[str]:
    """The extras of pyproject.toml."""
    section = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def markers() -> set[str]:
    """The test markers of pyproject.toml."""
    return set(re.findall(r'"(\w+): ', PYPROJECT.partition("markers = [")[2].partition("]\n")[0]))


def test_installs_name_extras_that_are_declared():
    installs = [c for c in COMMANDS if re.search(r"\bpip install ", c)]
    assert any("'.[train]'" in c for c in installs) and any("'.[test]'" in c for c in installs)
    texts = [*installs, *re.findall(r"`pip install [^`]+`", "".join(PAGES.values()))]
    for text in texts:
        for listed in re.findall(r"\.\[([\w,]+)\]", text):
            assert set(listed.split(",")) <= extras(), text
        if " -c " in text:
            assert (ROOT / text.split(" -c ")[1].split()[0]).is_file(), text


def test_programs_and_modules_of_command_lines_are_there():
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        program = Path(words[0]).name
        if program == "python" and words[1] == "-m":
            assert importlib.util.find_spec(words[2]), line
            if words[2] == "pytest" and "-m" in words[3:]:
                expression = words[words.index("-m", 3) + 1]
                assert set(re.findall(r"\w+", expression)) - {"not"} <= markers(), line
            for word in words[3:]:
                assert not word.endswith(".py") or (ROOT / word).is_file(), line
        elif program == "python":
            assert (ROOT / words[1]).is_file(), line
        elif "/" in words[0] and program not in ("pip", "python"):
            assert (ROOT / words[0]).is_file(), line
        else:
            assert program in ("pip", "flowgrpo") or words[0] in OTHERS, line


# Links, paths and names


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_resolve():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(slug, headings), f"{page}: {target}"


def test_the_readme_links_to_every_page():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, page


def test_paths_exist():
    pattern = r"(?:flowgrpo|kernels|benchmarks|tests|docs|\.ci)/[\w./-]*"
    for page in PAGES:
        for text in names(prose(page)):
            if re.fullmatch(pattern, text):
                assert (ROOT / text).exists(), f"{page}: {text}"
                assert text.endswith("/") == (ROOT / text).is_dir(), f"{page}: {text}"


def test_the_tree_says_where_each_thing_is():
    [tree] = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    named: set[Path] = set()
    folder = ROOT
    for line in tree.splitlines():
        words = line.split()
        entries = []
        while words and re.fullmatch(r"[\w/]+(\.py|/)", words[0]):
            entries.append(words.pop(0))
        assert entries and words, f"no entry or no description: {line}"
        if not line.startswith(" "):
            folder = ROOT / entries[0]
        for entry in entries:
            path = (folder if line.startswith(" ") else ROOT) / entry
            assert path.exists() and path.is_dir() == entry.endswith("/"), entry
            named.add(path)
        for word in words:
            if re.fullmatch(r"\w+\.py", word.strip(",:;")):
                assert (folder / word.strip(",:;")).is_file(), line
    rooms = [p for p in (ROOT / "flowgrpo").glob("[!_]*") if p.suffix == ".py" or p.is_dir()]
    rooms += [p for p in (ROOT / "kernels" / "flowgrpo_kernels").glob("[!_]*") if p.is_dir()]
    rooms += [ROOT / name for name in ("kernels/csrc", "benchmarks", "docs", "tests")]
    assert {path for path in rooms if path.is_dir() or path.suffix == ".py"} <= named


def test_modules_of_the_changelog_are_there():
    rows = table("CHANGELOG.md", "| before")
    assert len(rows) > 20
    for before, now in rows:
        for name in names(now):
            package, *parts = name.split(".")
            root = ROOT / ("kernels" if package == "flowgrpo_kernels" else "") / package
            path = root.joinpath(*parts)
            assert path.with_suffix(".py").is_file() or path.is_dir(), f"{before}: {name}"


def fields() -> set[str]:
    """section.field of every field of the configuration."""
    return {
        f"{name}.{field.name}"
        for name, section in reference.sections().items()
        for field in dataclasses.fields(section)
    }


def test_fields_of_the_configuration_are_named_as_they_are():
    for page in PAGES:
        text = prose(page)
        if page == "docs/moving-from-flow_grpo.md":
            # The first column has flow_grpo's names.
            text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
        for name in names(text):
            section, _, field = name.partition(".")
            if re.fullmatch(r"(policy|sample|reward|optim|run)\.[a-z_]+", name) and field != "py":
                method = section == "policy" and hasattr(Policy, field)
                assert name in fields() or method, f"{page}: {name}"


def test_configuration_page_is_current():
    assert PAGES["docs/configuration.md"] == reference.page(), (
        "run python -m flowgrpo.config.reference > docs/configuration.md"
    )


def test_configuration_page_has_every_field_with_its_text():
    lines = PAGES["docs/configuration.md"].splitlines()
    for name in fields():
        [line] = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert len(re.split(r"(?<!\\)\|", line)[4].split()) > 1, line
    assert reference.field_docs(PolicyConfig)["lora_rank"] == "Rank of the LoRA matrices."


def test_recipes_of_moving_from_flow_grpo():
    rows = table("docs/moving-from-flow_grpo.md", "| recipe of flow_grpo |")
    assert len(rows) > 6
    for theirs, ours in rows:
        assert names(ours) and set(names(ours)) <= set(RECIPES), theirs


def test_supported_table():
    rows = {row[0]: names(row[1]) for row in table("README.md", "| | | checked so far")}
    choices = typing.get_type_hints(SampleConfig)["transition"]
    assert rows["transitions"] == list(typing.get_args(choices))
    assert set(rows["rewards"]) == {name for name in REWARDS if not name.startswith("nano")}
    assert rows["objectives"] == list(objectives.OBJECTIVES)


def test_objectives_table():
    rows = table("docs/new-objective.md", "| field |")
    fields = [field.name for field in dataclasses.fields(objectives.Objective)]
    assert [names(row[0]) for row in rows] == [[name] for name in fields]


def test_family_table():
    rows = table("docs/new-model.md", "| field |")
    fields = {field.name: field.default for field in dataclasses.fields(Family)}
    assert [names(row[0]) for row in rows] == [[name] for name in fields]
    for name, _, default in rows:
        assert (default == "") == (fields[names(name)[0]] is dataclasses.MISSING), name


def test_rewards_table():
    listed = {}
    for cell, _, settings in table("docs/new-reward.md", "| reward |"):
        listed |= dict.fromkeys(names(cell), names(settings))
    assert set(listed) == set(REWARDS)
    for name, settings in listed.items():
        assert settings == list(getattr(rewards.load(name), "defaults", {})), name


def test_quality_rewards_of_the_evaluation_page():
    rows = table("docs/evaluation.md", "| reward | column |")
    assert [names(row[0]) for row in rows] == [[name] for name in systems.PRESETS["paper"]]
    head = table("docs/evaluation.md", "| Model | task metric |")
    assert head == []
    for (name, header, models, factor, needs), reward in zip(
        rows, systems.PRESETS["paper"], strict=True
    ):
        assert (header, float(factor)) == systems.COLUMNS[reward], name
        defaults = rewards.load(reward).defaults
        keys = [key for key in ("model", "head", "tokenizer") if key in defaults]
        assert names(models) == [defaults[key] for key in keys]
        remote = "url" in defaults
        libraries = LIBRARIES.get(reward, ())
        assert ("flowgrpo[rewards]" in names(needs)) == bool(libraries) == remote
        assert not remote or f"{reward}.url" in names(needs)


def test_tasks_of_the_evaluation_page():
    rows = table("docs/evaluation.md", "| recipe | prompts |")
    for (cell, prompts, metric, needs, numbers, figures), (name, task) in zip(
        rows, tasks.TASKS.items(), strict=True
    ):
        [recipe_name] = names(cell)
        config = recipe(recipe_name, memory=80.0)
        assert names(prompts) == [config.sample.prompts]
        assert (
            names(metric)
            == [*config.reward.weights, config.reported[0]]
            == [
                name,
                task.reported[0],
            ]
        )
        [extra] = names(needs)
        assert f"pip install '{extra}'" in task.needs
        assert (extra == "flowgrpo[rewards]") == bool(LIBRARIES.get(name))
        assert names(numbers) == [tasks.CONFIGS["sd3", "paper", name]]
        assert re.findall(r"[\d.]+", figures) == re.findall(r"[\d.]+", task.published)
    guards = "`pickscore`, `aesthetic` and `imagereward`"
    assert tuple(names(guards)) == tasks.GUARDS and guards in prose("docs/evaluation.md")


# Numbers


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def accuracy(report: dict) -> str:
    low, high = report["interval"]
    return f"{percent(report['accuracy'])} ({percent(low)} to {percent(high)})"


def read_record(name: str) -> dict:
    """A record under benchmarks/results."""
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def seed_record(seed: int) -> dict:
    """The default run's record of one seed."""
    return read_record(f"nano/default/summary-seed{seed}.json")


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def test_results_are_those_of_the_record():
    record = linked_record("README.md", "summary-seed0.json")
    reports = [record[name] for name in ("before", "before_guided", "after")]
    reports.append(read_record("nano/awm/summary-awm.json")["after"])
    rows = table("README.md", "| 480 pictures, 40 ODE steps")
    for row, report in zip(rows, reports, strict=True):
        assert row[1].replace("**", "") == accuracy(report)
        assert row[2:] == [percent(report["tasks"][task]) for task in TASKS]
        assert (report["images"], report["steps"]) == (480, 40)
    before, after = (percent(reports[i]["accuracy"]) for i in (0, 2))
    seconds = record["seconds"]
    training = sum(seconds[name] for name in ("rollout", "reward", "update"))
    text = " ".join(README.split())
    assert f"from {before} to {after} % in {training:.0f} s of training" in text
    assert f"and {seconds['total']:.0f} s in all" in text
    bf16 = linked_record("README.md", "summary-bf16.json")["seconds"]["total"]
    assert f"with AVX-512 and bfloat16 they took {bf16:.0f} s" in text
    others = [percent(seed_record(seed)["after"]["accuracy"]) for seed in (1, 2)]
    assert f"Seeds 1 and 2 end at {others[0]} and {others[1]}." in text


def test_results_of_nano_are_those_of_the_records():
    page = "docs/nano.md"
    record = linked_record(page, "summary-seed0.json")
    reports = [record[name] for name in ("before", "before_guided", "after")]
    first, *rows = table(page, "| 480 pictures |")
    assert [cell.replace("**", "") for cell in first[1:]] == [accuracy(r) for r in reports]
    for row, task in zip(rows[:6], TASKS, strict=True):
        assert row[1:] == [percent(report["tasks"][task]) for report in reports]
    for row, name in zip(rows[6:], ("palette", "background", "diversity"), strict=True):
        assert row[1:] == [f"{report['quality'][name]:.3f}" for report in reports]
    assert f"{record['iterations']} iterations, {record['images']:,} images" in PAGES[page]
    text = " ".join(PAGES[page].split())
    tuning = linked_record(page, "evaluation-tune-seed0.json")["reports"]
    assert f"the same weights have {accuracy(tuning['iteration 120'])} where the base" in text
    assert f"where the base has {accuracy(tuning['base'])}" in text
    awm = linked_record(page, "summary-awm.json")
    assert f"{accuracy(awm['after'])} after {awm['images']:,} images" in text
    others = [percent(seed_record(seed)["after"]["accuracy"]) for seed in (1, 2)]
    assert f"Seeds 1 and 2 end at {others[0]} and {others[1]}." in text


def test_results_of_scouts_are_those_of_the_records():
    folder = ROOT / "benchmarks" / "results" / "nano" / "scouts"
    record = json.loads((folder / "comparison.json").read_text())

    def rows(case, arm, metric):
        """The row over all seeds, then those of each."""
        keys = ("case", "provider", "metric")
        here = [r for r in record["rows"] if tuple(r[k] for k in keys) == (case, arm, metric)]
        return sorted(here, key=lambda r: "seed" in r)

    def accuracy(case, arm):
        values = (
            rows(case, arm, "accuracy")[0]["value"],
            *rows(case, arm, "accuracy")[0]["interval"],
        )
        return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in values))

    lines = [["base", accuracy("start", "base"), *["-"] * 5]]
    for arm in record["arms"]:
        seeds = [100 * row["value"] for row in rows("seconds", arm, "accuracy")[1:]]
        files = sorted(folder.glob(f"metrics-{arm.replace(' + ', '-')}-seed*.jsonl"))
        assert len(files) == (3 if "scouts" in arm else 0)
        logged = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        logged = [line for line in logged if line["kind"] == "train"]
        agreement = share = "-"
        if logged:
            agreement = f"{sum(x['scouts']['agreement'] for x in logged) / len(logged):.2f}"
            spent = sum(x["seconds"]["scout"] for x in logged)
            share = f"{100 * spent / sum(sum(x['seconds'].values()) for x in logged):.0f} %"
        lines.append(
            [
                arm,
                accuracy("seconds", arm),
                f"{min(seeds):.1f} to {max(seeds):.1f}",
                f"{rows('seconds', arm, 'images')[0]['value']:,.0f}",
                accuracy("images", arm),
                agreement,
                share,
            ]
        )
    budgets = record["budgets"]
    head = f"| | after {budgets['seconds']['value']:.0f} s | seeds, lowest to highest | images |"
    assert f"after {budgets['images']['value']:,.0f} images" in PAGES["docs/objectives.md"]
    assert table("docs/objectives.md", head) == lines


def test_seconds_of_the_trainer_are_those_of_the_record():
    page = "docs/performance.md"
    record = linked_record(page, "summary-seed0.json")
    seconds = record["seconds"]
    stages = {"rewards": "reward", "evaluation": "evaluate"}
    for name, value, share in table(page, "| | seconds | share |"):
        total = seconds[stages.get(name, name)]
        assert value == f"{total:.0f}"
        if name == "total":
            assert share == f"{record['images']:,} images, {record['images'] / total:.0f} images/s"
        else:
            assert share == f"{100 * total / seconds['total']:.0f} %"


def test_results_of_nano_text_are_those_of_the_record():
    record = linked_record("docs/nano.md", "summary-text.json")
    reports = [record[name] for name in ("before", "before_guided", "after")]
    rows = table("docs/nano.md", "| 480 pictures, 40 ODE steps")
    for row, report in zip(rows, reports, strict=True):
        scores = [accuracy(report), percent(report["scores"]["ocr"])]
        assert [cell.replace("**", "") for cell in row[1:]] == scores and report["images"] == 480
    before, after = (percent(report["accuracy"]) for report in (reports[0], reports[2]))
    assert f"goes from {before} to {after} % of words read exactly" in " ".join(README.split())
    seconds = record["seconds"]
    training = sum(seconds[name] for name in ("rollout", "reward", "update"))
    text = f"took {training:.0f} s of training and {seconds['total']:.0f} s in all"
    assert text in " ".join(PAGES["docs/nano.md"].split())


CASES = {
    "rollout step": "step",
    "loss, forward and backward": "loss",
    "loss with KL": "loss-kl",
    "the same with KL": "loss-kl",
}


def times(record: dict, case: str, rows: int) -> dict[str, dict[str, float]]:
    """Provider -> metric -> milliseconds of one case of the record."""
    values: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        if row["case"] == f"{case} sd3-512 b{rows} float32/float32" and row["unit"] == "us":
            values.setdefault(row["provider"], {})[row["metric"]] = row["value"] / 1000
    return values


def test_speeds_of_the_readme_are_those_of_the_record():
    record = linked_record("README.md", "kernels-cpu.json")
    for name, *cells in table("README.md", "| two CPU cores"):
        best = {p: v["best"] for p, v in times(record, CASES[name], 16).items()}
        assert cells[:2] == [f"{best['eager']:.2f} ms", f"{best['ours']:.2f} ms"]
        assert cells[2] == f"{best['eager'] / best['ours']:.1f}"


def test_speeds_of_the_drop_ins_are_those_of_the_records():
    page = "docs/drop-ins.md"
    medians = [
        {
            (row["case"], row["provider"]): row["value"]
            for row in linked_record(page, name)["rows"]
            if row["metric"] == "time"
        }
        for name in ("dropins-cpu.json", "dropins-keep-memory-cpu.json")
    ]
    lines = table(page, "| trainer |")
    cases = {case for case, _ in medians[0] if case.endswith("replay")}
    assert {f"{name} replay" for name, *_ in lines} == cases
    for name, *cells in lines:
        times = [
            [values[f"{name} {kind}", p] for p in ("ours", "bare", "eager")]
            for values in medians
            for kind in ("replay", "backward")
        ]
        replay = times[0]
        assert cells == [
            f"{replay[0] / 1000:.2f}",
            f"{replay[0] / replay[1]:.2f}",
            f"{replay[2] / 1000:.2f}",
            *(f"{eager / ours:.1f}" for ours, _, eager in times),
            f"{times[2][2] / medians[1][f'{name} replay', 'pass']:.1f}",
            f"{medians[1][f'{name} host', 'ours'] / 1000:.2f}",
        ]


def test_speeds_of_the_performance_page_are_those_of_the_record():
    page = "docs/performance.md"
    record = linked_record(page, "kernels-cpu.json")
    for name, rows, *cells in table(page, "| case | rows |"):
        best = {p: v["best"] for p, v in times(record, CASES[name], int(rows)).items()}
        assert cells == [
            f"{best['eager']:.2f}",
            f"{best['ours']:.2f}",
            f"{best['eager'] / best['ours']:.1f}",
            f"{best['ceiling']:.2f}",
        ]
    medians = [times(record, case, 16) for case in ("step", "loss", "loss-kl")]
    ratios = [f"{m['eager']['time'] / m['ours']['time']:.1f}" for m in medians]
    text = " ".join(PAGES[page].split())
    assert f"give {ratios[0]}, {ratios[1]} and {ratios[2]} times at 16 rows" in text
    fallback, eager = (medians[0][provider]["best"] for provider in ("reference", "eager"))
    assert f"{fallback:.1f} ms instead of {eager:.2f} at 16 rows" in text


COUNTED = {
    "SD3.5-M, 16 rows, KL": "sd3.5-m t2 b16 no-cfg w1 kl",
    "SD3.5-M, 9 rows, guidance, KL": "sd3.5-m t2 b9 cfg w1 kl",
    "FLUX.1-dev, 4 rows": "flux.1-dev t2 b4 no-cfg w1 no-kl",
}
PROVIDERS = ("ours", "ours-fused", "ours-recomputed", "eager")


def test_counts_of_the_performance_page_are_those_of_the_record():
    page = "docs/performance.md"
    values = {
        (row["case"], row["provider"], row["metric"]): row["value"]
        for row in linked_record(page, "counted-meta.json")["rows"]
    }
    rows = table(page, "| counted |")
    for memory, operations in zip(rows[::2], rows[1::2], strict=True):
        keys = [(COUNTED[memory[0]], provider) for provider in PROVIDERS]
        assert memory[2:] == [f"{values[(*key, 'counted_memory')]:.1f}" for key in keys]
        metrics = ("rollout_launches", "update_launches")
        assert operations[2:] == [
            ", ".join(f"{values[(*key, metric)]:.0f}" for metric in metrics) for key in keys
        ]
    waits = values[COUNTED["SD3.5-M, 16 rows, KL"], "eager", "update_waits"]
    assert f"flow_grpo's micro-step waits {waits:.0f} times" in " ".join(PAGES[page].split())
    assert not any(
        value for (_, provider, metric), value in values.items()
        if provider != "eager" and metric == "update_waits"
    )  # fmt: skip


def test_citations():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', PYPROJECT, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in text and "\nlicense: Apache-2.0\n" in text
    assert f"version = {{{version}}}" in README
    [bibtex] = fences("README.md", "bibtex")
    assert bibtex.count("@") == 2 and bibtex.count("{") == bibtex.count("}")
    for name in ("2505.05470", "Training Flow Matching Models via Online RL"):
        assert name in text and name in bibtex
