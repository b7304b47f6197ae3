"""Random input: only the documented exceptions come out of the config parser, the command line of
`train`, the prompt loaders and the reward server.

FLOWGRPO_FUZZ=N in the environment tries N examples of each, chosen anew; the suite's few are the
same in every run. `python benchmarks fuzz` records such a run.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from flowgrpo.cli import options as cli_options
from flowgrpo.cli.options import EvaluateOptions, SampleOptions, ServeOptions
from flowgrpo.cli.train import parse_train
from flowgrpo.config import Config, ConfigError, from_dict, from_json, replace, to_dict, to_json
from flowgrpo.evaluation import picture_sets, systems
from flowgrpo.prompts.load import load_prompts
from flowgrpo.recipes import RECIPES
from flowgrpo.rewards import RewardError
from flowgrpo.rewards.images import to_png
from flowgrpo.rewards.remote.http import scores_in
from flowgrpo.rewards.remote.server import RemoteError, Server

EXAMPLES = int(os.environ.get("FLOWGRPO_FUZZ", "0"))


def fuzz(small: int, share: int = 1):
    """Settings of a test: `small` examples in the suite, or one in `share` of FLOWGRPO_FUZZ."""
    return settings(
        max_examples=max(1, EXAMPLES // share) if EXAMPLES else small,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


DEEP = "[" * 100_000
LONG = "1" * 5_000
FIELDS = [
    f"{section.name}.{f.name}" if dataclasses.is_dataclass(value) else section.name
    for section in dataclasses.fields(Config)
    for value in [getattr(Config(), section.name)]
    for f in (dataclasses.fields(value) if dataclasses.is_dataclass(value) else [section])
]
SECTIONS = [name for name, value in to_dict(Config()).items() if isinstance(value, dict)]

texts = st.text(max_size=8)
numbers = st.one_of(
    st.integers(-3, 100),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
names = st.one_of(st.sampled_from([*FIELDS, *SECTIONS]), texts)


def values_of(name: str) -> st.SearchStrategy:
    """Values for the field `name`: anything, of its kind, and some that fit."""
    section, _, rest = name.partition(".")
    owner = typing.get_type_hints(Config).get(section)
    hint = typing.get_type_hints(owner).get(rest) if rest and owner else owner
    choices = typing.get_args(hint)
    if hint is bool:
        kind = st.booleans()
    elif hint in (int, float):
        kind = st.one_of(numbers, st.integers(0, 24), st.floats(0, 1))
    elif typing.get_origin(hint) is typing.Literal:
        kind = st.sampled_from(choices)
    elif typing.get_origin(hint) is dict:
        kind = st.dictionaries(texts, texts if choices[1] is str else numbers, max_size=3)
    elif hint is str or hint == str | None:
        kind = texts
    else:
        kind = st.one_of(st.none(), st.lists(st.one_of(st.integers(-2, 12), texts), max_size=3))
    return st.one_of(kind, kind, kind, json_values)


@st.composite
def changes(draw):
    """Changes of a configuration by dotted name."""
    chosen = draw(st.lists(names, max_size=4, unique=True))
    return {name: draw(values_of(name)) for name in chosen}


@st.composite
def near_configs(draw):
    """What `to_dict` gives, with some fields changed, removed or added."""
    values = to_dict(Config())
    for name, value in draw(changes()).items():
        section, _, rest = name.partition(".")
        holder = values.get(section)
        if rest and isinstance(holder, dict):
            holder[rest] = value
        else:
            values[section] = value
    for name in draw(st.lists(st.sampled_from(list(values)), max_size=2)):
        values.pop(name, None)
    return values


def refused(error: ConfigError) -> None:
    """A message is one line of a length that can be read, whatever is in the value."""
    event("refused")
    text = str(error)
    assert text.isprintable() and text.endswith(".") and len(text) < 1000, text


def accepted(config: Config) -> None:
    """A configuration that exists survives JSON."""
    event("accepted")
    assert to_json(from_json(to_json(config))) == to_json(config)


@pytest.mark.slow
@fuzz(40)
@given(st.one_of(near_configs(), json_values))
@example({"sample": {"prompts_per_iteration": 10**15 + 37, "batch_size": 10**9}})
@example({"sample": {"steps": 10**400}})
@example({"reward": {"weights": {"a": 10**400}}})
def test_from_dict(values):
    try:
        config = from_dict(values)
    except ConfigError as error:
        return refused(error)
    accepted(config)


@pytest.mark.slow
@fuzz(40)
@given(st.one_of(texts, json_values.map(json.dumps), near_configs().map(json.dumps)))
@example(DEEP)
@example(LONG)
@example('{"recipe": "\\ud800"}')
def test_from_json(text):
    try:
        config = from_json(text)
    except ConfigError as error:
        return refused(error)
    accepted(config)


@pytest.mark.slow
@fuzz(40)
@given(changes())
@example({"sample": 3, "sample.steps": 4})
@example({"sample.steps": 10**5000})
@example({"": 1})
def test_replace(values):
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    try:
        config = replace(Config(), **values)
    except ConfigError as error:
        return refused(error)
    accepted(config)


words = st.one_of(
    st.sampled_from(["None", "True", "false", "inf", "nan", "-1", "0", "1e999", "{}", "a:b", "--"]),
    numbers.map(lambda number: str(number)[:400]),
    texts,
)
options = st.one_of(
    st.sampled_from([f"--{name}" for name in FIELDS[1:]]),
    st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS[1:]]),
    st.sampled_from(["--help", "-h", "--no-policy.fused", "--sample"]),
    texts.map("--{}".format),
)


@st.composite
def command_lines(draw):
    """Arguments of `flowgrpo train`."""
    argv = draw(
        st.one_of(
            st.just([]),
            st.sampled_from(list(RECIPES)).map(lambda r: [r]),
            st.lists(words, max_size=1),
        )
    )
    for option in draw(st.lists(options, max_size=3)):
        argv = [*argv, option, *draw(st.lists(words, max_size=2))]
    # A reward's or recipe's module of one's own is imported, and may do anything.
    return [word.replace(":", "") for word in argv]


def parse(argv: list[str], read=parse_train):
    """What `read` makes of a command line; None where it is refused as documented."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return read(argv)
        except ConfigError as error:
            return refused(error)
        except SystemExit as stop:
            assert stop.code in (0, 2)
            return None


@pytest.mark.slow
@fuzz(10, share=10)
@given(command_lines())
@example(["--run.resume", "\x1f\n"])
def test_the_command_line_of_train(argv):
    config = parse(argv)
    if config is not None:
        accepted(config)


COMMANDS = (EvaluateOptions, SampleOptions, ServeOptions)


@pytest.mark.slow
@fuzz(20, share=4)
@given(st.sampled_from(COMMANDS), st.data())
def test_the_other_command_lines(command, data):
    known = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(command)]
    argv = data.draw(st.lists(st.one_of(st.sampled_from(known), options, words), max_size=5))
    parsed = parse(argv, lambda words: cli_options.parse(command, words, "flowgrpo"))
    assert parsed is None or isinstance(parsed, command)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.slow
@fuzz(20, share=10)
@given(st.one_of(st.binary(max_size=20), near_configs().map(lambda v: json.dumps(v).encode())))
def test_a_run_directory_of_something_else(folder, content):
    (folder / "config.json").write_bytes(content)
    parse(["--run.resume", str(folder)])


LINES = [b'{"prompt": "a red cat"}', b'{"prompt": 3}', b"[]", b"a red cat", b"\xef\xbb\xbf", b"{"]
lines = st.one_of(
    st.sampled_from(LINES),
    st.binary(max_size=12),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.one_of(st.just("prompt"), texts), json_values, max_size=3).map(
        lambda value: json.dumps(value).encode()
    ),
)
contents = st.one_of(
    st.binary(max_size=60),
    st.lists(lines, max_size=4).map(b"\n".join),
    st.lists(lines, max_size=4).map(b"\r\n".join),
)
PROMPT_FILES = ("p.txt", "p.jsonl", "p.JSONL", "p", "p.csv", "p.md")
SPLIT_FILES = (
    "train.txt",
    "train.jsonl",
    "train_metadata.jsonl",
    "test.txt",
    "test_metadata.jsonl",
)
splits = st.one_of(st.sampled_from(["train", "test", "heldout"]), texts)


def load(path: Path | str, split: str) -> None:
    try:
        prompts = load_prompts(str(path), split)
    except ConfigError as error:
        return refused(error)
    event("accepted")
    assert len(prompts) >= 1 and len(prompts.metadata) == len(prompts)
    assert all(isinstance(text, str) and text.strip() for text in prompts.texts)
    json.dumps(prompts.metadata)


@fuzz(40)
@given(contents)
@example(DEEP.encode())
@example(b'{"prompt": "a", "image": ' + LONG.encode() + b"}")
@example(b'{"prompt": "a", "image": "~nobody/\\u0000.png"}')
@example(b'{"prompt": "a", "image": "' + b"a" * 5_000 + b'"}')
@example(b'{"prompt": "a", "image": "b.png", "metadata": ["c"]}')
def test_files_that_name_pictures(folder, content):
    """Each that is taken has pictures with prompts; there is none here that can be read."""
    (folder / "pictures.jsonl").write_bytes(content)
    try:
        pictures = picture_sets.find_pictures(folder / "pictures.jsonl")
    except ConfigError as error:
        return refused(error)
    event("accepted")
    assert len(pictures) == len(pictures.prompts)
    json.dumps(pictures.prompts.metadata)
    with pytest.raises(ConfigError, match=r"cannot be read \(|can be read \("):
        picture_sets.read(pictures, False)


def measured() -> dict:
    """One system as evaluation.json has it."""
    score = {"mean": 0.5, "interval": [0.4, 0.6], "groups": {"a": 0.5}, "failed": 0}
    task = {"prompt_set": "p", "fingerprint": "f", "prompts": 1, "images": 2}
    task |= {"scores": {"ocr": score}, "settings": {"ocr": {"engine": "e"}}}
    task |= {"source": "s", "sizes": {"8x8": 2}, "skipped": ["a: b"]}
    return {"format": 1, "systems": [{"label": "a", "task": task, "quality": None}]}


@fuzz(40)
@given(st.data())
def test_evaluations_of_something_else(folder, data):
    """One value of the file is another."""
    values = measured()
    parent, depth = values, data.draw(st.integers(0, 5))
    for _ in range(depth):
        inside = [key for key, value in parent.items() if isinstance(value, dict) and value]
        inside += ["systems"] if isinstance(parent.get("systems"), list) else []
        if not inside:
            break
        key = data.draw(st.sampled_from(inside))
        parent = parent[key][0] if key == "systems" else parent[key]
    key = data.draw(st.sampled_from(sorted(parent) or ["a"]))
    parent[key] = data.draw(st.one_of(json_values, st.just(10**400)))
    (folder / "evaluation.json").write_text(json.dumps(values))
    try:
        rows = systems.load(folder)
    except ConfigError as error:
        return refused(error)
    event("accepted")
    assert systems.markdown(systems.merge(rows)).startswith("| Model |")


@fuzz(40)
@given(st.sampled_from(PROMPT_FILES), contents, splits)
@example("p.jsonl", DEEP.encode(), "train")
@example("p.jsonl", LONG.encode(), "train")
@example("p.jsonl", b'{"prompt": "a", "count": ' + LONG.encode() + b"}", "train")
@example("p.txt", b"\xff\xfea\x00", "train")
@example("p.jsonl", b'{"prompt": "\\ud800"}', "train")
def test_prompt_files(folder, name, content, split):
    path = folder / name
    path.write_bytes(content)
    load(path, split)


@fuzz(15)
@given(st.dictionaries(st.sampled_from(SPLIT_FILES), contents, max_size=3), splits)
def test_prompt_folders(folder, files, split):
    path = folder / "prompts"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    load(path, split)


@fuzz(20)
@given(st.text(max_size=12).filter(lambda name: not name.startswith("hub:")), splits)
@example("a\0b", "train")
@example("a" * 5000, "train")
@example("\ud800", "train")
@example("", "train")
@example("/proc/self/mem", "train")
@example("nano", "")
def test_names_of_prompt_sets(name, split):
    load(name, split)


PNG = base64.b64decode(to_png(torch.arange(48, dtype=torch.uint8).view(3, 4, 4)))


def png(mode: str, size: tuple[int, int]) -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@st.composite
def broken_pngs(draw):
    """A PNG file of which some bytes are changed and the end may be cut off."""
    data = bytearray(PNG)
    for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=4)):
        data[place] = draw(st.integers(0, 255))
    end = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    return base64.b64encode(bytes(data[:end])).decode()


sound = base64.b64encode(PNG).decode()
images = st.one_of(
    st.just(sound),
    broken_pngs(),
    st.sampled_from(
        [png(mode, size) for mode in ("1", "L", "P", "RGBA", "I;16") for size in ((4, 4), (9, 7))]
    ),
    texts,
)
prompts = st.one_of(texts, scalars)
metadata = st.one_of(st.dictionaries(texts, json_values, max_size=2), json_values)


@st.composite
def requests(draw):
    """A body that is one of the protocol, or nearly."""
    count = draw(st.integers(0, 3))

    def items(each):
        size = draw(st.one_of(st.just(count), st.integers(0, 3)))
        return draw(st.lists(each, min_size=size, max_size=size))

    body = {"images": items(images), "prompts": items(texts), "metadata": items(st.just({}))}
    if draw(st.booleans()):
        body["prompts"], body["metadata"] = items(prompts), items(metadata)
    for name in draw(st.lists(st.sampled_from([*body, "other"]), max_size=1)):
        body[name] = draw(json_values)
    return json.dumps(body).encode()


odd_headers = st.fixed_dictionaries(
    {},
    optional={
        "content-type": st.one_of(
            st.sampled_from(["text/plain", "application/json; charset=x"]),
            st.text(st.characters(max_codepoint=255), max_size=12),
        ),
        "authorization": st.one_of(
            st.just("Bearer s"), st.text(st.characters(max_codepoint=255), max_size=12)
        ),
        "content-length": st.integers(0, 10**20).map(str),
    },
)
headers = st.one_of(st.just({}), st.just({}), odd_headers)


async def answer(application, method: str, path: str, body: bytes, fields: dict[str, str]):
    """(status, body) of one request by the ASGI protocol."""
    head = {"content-type": "application/json", "content-length": str(len(body)), **fields}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in head.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8400),
    }
    sent = []
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await application(scope, receive, send)
    [start] = [message for message in sent if message["type"] == "http.response.start"]
    return start["status"], b"".join(message.get("body", b"") for message in sent)


def means(images, prompts, metadata):
    return images.double().mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def server():
    """The loop that an application runs in, and the application."""
    pytest.importorskip("fastapi")
    from flowgrpo.rewards.remote.serve import app

    loop = asyncio.new_event_loop()
    yield loop, app(means, "means", token="s", max_bytes=100_000, max_images=2)
    loop.close()


@pytest.mark.slow
@fuzz(60)
@given(
    st.sampled_from([*["POST"] * 7, "GET", "PUT"]),
    st.sampled_from([*["/score"] * 9, "/health", "/", "/openapi.json"]),
    st.one_of(
        requests(),
        requests(),
        json_values.map(lambda v: json.dumps(v).encode()),
        st.binary(max_size=30),
    ),
    headers,
)
@example("POST", "/score", DEEP.encode(), {"authorization": "Bearer s"})
@example("POST", "/score", LONG.encode(), {"authorization": "Bearer s"})
@example("POST", "/score", b"\x80", {"content-type": "text/plain"})
@example("POST", "/score", b'{"images": ["a"], "prompts": ["\\ud800"], "metadata": [{}]}', {})
@example("POST", "/score", b'{"\\ud800": 1}', {})
def test_requests_to_the_reward_server(server, method, path, body, fields):
    loop, application = server
    fields = {"authorization": "Bearer s", **fields}
    status, reply = loop.run_until_complete(answer(application, method, path, body, fields))
    event(str(status))
    assert status == 200 or 400 <= status < 500, (status, reply)
    assert isinstance(json.loads(reply), dict)


@pytest.fixture(scope="module")
def client():
    pytest.importorskip("httpx")
    return Server("http", "http://127.0.0.1:9/score")


@fuzz(40)
@given(
    st.one_of(
        st.dictionaries(st.just("scores"), st.one_of(json_values, st.lists(numbers, max_size=3))),
        st.dictionaries(texts, json_values, max_size=2),
    ),
    st.integers(1, 3),
)
@example({"scores": [10**400]}, 1)
def test_replies_of_a_reward_server(client, reply, count):
    try:
        scores = scores_in(client, reply, count)
    except (RemoteError, RewardError):
        return
    assert len(scores) == count and all(isinstance(score, float) for score in scores)
