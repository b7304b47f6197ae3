"""Text embeddings from disk are the fresh ones to the bit; the cache knows when they are not."""

from __future__ import annotations

import logging
import os
import shutil
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.distributed.world import World
from flowgrpo.policies import Policy, text_cache
from flowgrpo.records import Conditioning
from support import pipelines

TEXTS = ["a red circle", "two blue square", "a red circle", ""]


def load(folder, cache, dtype="float32", **fields):
    fields = {"resolution": 16, "max_sequence_length": 8, **fields}
    config = PolicyConfig(text_cache=str(cache), **fields)
    return Policy.load(str(folder), device="cpu", dtype=dtype, config=config)


def same(one, other):
    return torch.equal(one.embeds, other.embeds) and torch.equal(one.pooled, other.pooled)


def warnings(caplog):
    """What this package warned of."""
    return [r.getMessage() for r in caplog.records if r.name == "flowgrpo"]


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def count(policy, monkeypatch):
    """Texts that the pipeline's encode_prompt is given from now on."""
    seen, own = [], policy.pipeline.encode_prompt

    def encode_prompt(prompt, *arguments, **keywords):
        seen.extend(prompt)
        return own(prompt, *arguments, **keywords)

    monkeypatch.setattr(policy.pipeline, "encode_prompt", encode_prompt)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["latent_model", "flux_model"])
def test_cached_is_fresh_bit_for_bit(model, dtype, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(model)
    fresh = load(folder, "", dtype).encode(TEXTS)
    first = load(folder, tmp_path, dtype)
    seen = count(first, monkeypatch)
    assert same(first.encode(TEXTS), fresh) and seen == [*TEXTS[:2], ""]
    assert len(files(tmp_path)) == 3 and not list(tmp_path.rglob(".*"))
    again = load(folder, tmp_path, dtype)
    seen = count(again, monkeypatch)
    assert same(again.encode(TEXTS), fresh) and not seen
    # Neither the texts beside it nor their number change an embedding.
    assert same(load(folder, "", dtype).encode(TEXTS[1:2]), fresh.rows(torch.tensor([1])))


@pytest.mark.slow
def test_key_holds_all_that_decides_the_bits(latent_model, tmp_path):
    cache, model = tmp_path / "cache", shutil.copytree(latent_model, tmp_path / "model")
    expected = 0
    for fields in ({}, {"dtype": "bfloat16"}, {"max_sequence_length": 9}):
        load(model, cache, **fields).encode(["a"])
        expected += 1
        assert len(files(cache)) == expected
    # Another image size is the same text; other weights of an encoder are not, nor another word.
    load(model, cache, resolution=8).encode(["a"])
    assert len(files(cache)) == expected
    pipelines.save_latent_pipeline(tmp_path / "other", seed=1)
    shutil.rmtree(model / "text_encoder_2")
    shutil.copytree(tmp_path / "other" / "text_encoder_2", model / "text_encoder_2")
    load(model, cache).encode(["a"])
    assert len(files(cache)) == expected + 1
    assert same(load(model, cache).encode(["a"]), load(model, "").encode(["a"]))


@pytest.mark.slow
def test_a_moved_model_still_hits(latent_model, tmp_path):
    load(shutil.copytree(latent_model, tmp_path / "model"), tmp_path / "cache").encode(["a"])
    os.rename(tmp_path / "model", tmp_path / "moved")
    load(tmp_path / "moved", tmp_path / "cache").encode(["a"])
    assert len(files(tmp_path / "cache")) == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no safetensors at all"),
    ],
)
def test_a_corrupt_file_is_computed_again_with_a_warning(latent_model, tmp_path, damage, caplog):
    fresh = load(latent_model, tmp_path).encode(TEXTS[:1])
    (path,) = files(tmp_path)
    damage(path)
    with caplog.at_level(logging.WARNING, logger="flowgrpo"):
        assert same(load(latent_model, tmp_path).encode(TEXTS[:1]), fresh)
    (message,) = warnings(caplog)
    assert "is encoded again" in message and path.name in message
    caplog.clear()
    assert same(load(latent_model, tmp_path).encode(TEXTS[:1]), fresh) and not warnings(caplog)


def test_a_file_says_what_it_is(latent_model, tmp_path):
    load(latent_model, tmp_path).encode(TEXTS[:1])
    with safe_open(files(tmp_path)[0], "pt") as file:
        assert file.metadata()["text"] == TEXTS[0] and set(file.keys()) == {"embeds", "pooled"}


@pytest.mark.slow
def test_a_full_disk_costs_the_cache_only(latent_model, tmp_path, caplog, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_cache, "save_file", full)
    policy = load(latent_model, tmp_path)
    assert same(policy.encode(TEXTS), load(latent_model, "").encode(TEXTS))
    (message,) = warnings(caplog)
    assert "No space left on device" in message and "no more text is cached" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be(latent_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"text_cache '.*' cannot be created"):
        load(latent_model, tmp_path / "file" / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("home", ["file", "none"])
def test_a_default_cache_that_cannot_be_is_a_warning(
    latent_model, tmp_path, monkeypatch, caplog, home
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    if home == "file":
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:

        def homeless(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(text_cache.Path, "expanduser", homeless)
    policy = load(latent_model, "auto")
    assert same(policy.encode(TEXTS), load(latent_model, "").encode(TEXTS))
    (message,) = warnings(caplog)
    reason = "Not a directory" if home == "file" else "Could not determine home directory."
    assert message.startswith("Text embeddings are not cached") and reason in message


def test_default_folder_and_small_models(latent_model, pixel_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(pixel_model, "auto", resolution=8).encode(["a"])
    assert not list(tmp_path.iterdir()), "one small encoder needs no cache"
    load(latent_model, "auto").encode(["a"])
    assert len(files(tmp_path / "flowgrpo" / "text")) == 1


def test_fingerprint_of_large_files(tmp_path):
    """A change in the middle shows by its time, one at the ends by content, one in the Hub's cache
    by the name of the blob."""
    part = tmp_path / "text_encoder"
    part.mkdir()
    path = part / "model.safetensors"
    path.write_bytes(bytes(3 * text_cache.WHOLE))
    found = {text_cache.fingerprint(tmp_path, ["text_encoder"])}
    status = path.stat()
    path.write_bytes(bytes(text_cache.WHOLE) + b"\x01" + bytes(2 * text_cache.WHOLE - 1))
    found.add(text_cache.fingerprint(tmp_path, ["text_encoder"]))
    path.write_bytes(bytes(3 * text_cache.WHOLE - 1) + b"\x01")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    found.add(text_cache.fingerprint(tmp_path, ["text_encoder"]))
    assert len(found) == 3
    for digest in ("a" * 64, "b" * 64):
        (tmp_path / digest).write_bytes(b"")
        path.unlink()
        path.symlink_to(tmp_path / digest)
        found.add(text_cache.fingerprint(tmp_path, ["text_encoder"]))
    assert len(found) == 5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["latent_model", "flux_model"])
def test_encoders_move_only_for_texts_that_are_not_cached(model, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(model)
    policy = load(folder, tmp_path, offload_text_encoders=True)
    moves = []
    for name in ("text_encoder", "text_encoder_2"):
        part, own = getattr(policy.pipeline, name), getattr(policy.pipeline, name).to
        monkeypatch.setattr(
            part, "to", lambda where, own=own, name=name: moves.append((name, where)) or own(where)
        )
    fresh = load(folder, "").encode(TEXTS)
    assert same(policy.encode(TEXTS), fresh)
    there, back = torch.device("cpu"), "cpu"
    assert moves == [
        *(("text_encoder", there), ("text_encoder_2", there)),
        *(("text_encoder", back), ("text_encoder_2", back)),
    ]
    moves.clear()
    assert same(policy.encode(TEXTS), fresh) and not moves
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.encode(["three circle"])
    assert moves[-1] == ("text_encoder_2", "cpu"), "they leave the GPU after an error too"


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["latent_model", "flux_model"])
def test_encoders_leave_the_gpu(model, request, tmp_path):
    config = {"resolution": 16, "max_sequence_length": 8, "text_cache": str(tmp_path)}
    folder = str(request.getfixturevalue(model))
    away = PolicyConfig(offload_text_encoders=True, **config)
    policy = Policy.load(folder, device="cuda", dtype="bfloat16", config=away)
    found = policy.encode(TEXTS)
    assert policy.pipeline.text_encoder.device.type == policy.pipeline.text_encoder_2.device.type
    assert policy.pipeline.text_encoder.device.type == "cpu" != found.embeds.device.type
    stay = PolicyConfig(**{**config, "text_cache": ""})
    assert same(
        found, Policy.load(folder, device="cuda", dtype="bfloat16", config=stay).encode(TEXTS)
    )


def test_a_folder_that_is_removed_in_mid_run_comes_back(tmp_path):
    """It may be deleted at any time."""
    cache = text_cache.TextCache(tmp_path / "text", {})
    row = Conditioning(torch.ones(1, 2, 3), torch.ones(1, 3))
    shutil.rmtree(tmp_path / "text")
    cache.write("a", row)
    assert torch.equal(cache.read("a").embeds, row.embeds)


@pytest.mark.parametrize("error", [PackageNotFoundError("torch"), PermissionError(13, "denied")])
def test_without_what_the_key_is_made_of_there_is_no_cache(tmp_path, monkeypatch, caplog, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(text_cache, "fingerprint", fail)
    source = SimpleNamespace(folder=tmp_path, dtype=torch.float32, variant="", text_quantizer="")
    place = str(tmp_path / "text")
    assert text_cache.open_cache(place, source, [], 8, torch.device("cpu")) is None
    assert "Text embeddings are not cached" in caplog.text and type(error).__name__ in caplog.text


def test_the_cache_stays_where_it_is_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    source = SimpleNamespace(folder=tmp_path, dtype=torch.float32, variant="", text_quantizer="")
    cache = text_cache.open_cache("text", source, [], 8, torch.device("cpu"))
    monkeypatch.chdir(tmp_path / "other")
    cache.write("a", Conditioning(torch.ones(1, 2, 3), torch.ones(1, 3)))
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_process_encodes_a_share(size, latent_model, monkeypatch):
    policy = load(latent_model, "")
    whole = policy.encode(TEXTS)
    seen = count(policy, monkeypatch)
    # What each process would send to the others, from one after the other.
    monkeypatch.setattr(World, "all_rows", lambda world, rows: [rows])
    shares, texts = [], []
    for rank in range(size):
        shares.append(policy.encode_shares(TEXTS, World(rank, size)))
        texts.append(seen.copy())
        seen.clear()
    assert same(
        Conditioning(*(torch.cat([getattr(s, n) for s in shares]) for n in ("embeds", "pooled"))),
        whole,
    )
    assert max(map(len, texts)) == -(-len(TEXTS) // size)


def test_a_callers_encoder_sees_all_texts(pixel_model):
    """Its rows may depend on the texts beside them."""
    seen = []

    def encode(texts):
        seen.append(list(texts))
        sizes = policy.transformer.config
        embeds = torch.zeros(len(texts), 8, sizes.joint_attention_dim)
        return Conditioning(embeds, torch.zeros(len(texts), sizes.pooled_projection_dim))

    policy = Policy.load(str(pixel_model), device="cpu", dtype="float32", encode=encode)
    assert len(policy.encode_shares(TEXTS, World(1, 2))) == len(TEXTS)
    assert seen == [TEXTS]
