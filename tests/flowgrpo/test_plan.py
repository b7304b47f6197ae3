"""The plan of a run: sizes against the real classes, stored bytes against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub import constants

from flowgrpo import plan
from flowgrpo.cli import main
from flowgrpo.config import Config, PolicyConfig, replace
from flowgrpo.policies import attention, blocks, modulation
from flowgrpo.policies.adapters import add_adapter
from flowgrpo.policies.families import family_of
from flowgrpo.policies.flux.sizes import DOUBLE, SINGLE
from flowgrpo.policies.flux2 import sizes as flux2_sizes
from flowgrpo.policies.pipelines import cast
from flowgrpo.policies.qwen import sizes as qwen_sizes
from flowgrpo.policies.qwen.attention import real_tables
from flowgrpo.policies.sd3.sizes import DUAL, JOINT
from flowgrpo.policies.shared_sizes import CLIP_G_PACKED, CLIP_L_PACKED, T5_XXL_PACKED
from flowgrpo.policies.wan import sizes as wan_sizes
from flowgrpo.policies.zimage import sizes as zimage_sizes
from flowgrpo.policies.zimage.forward import BatchForward
from flowgrpo.recipes import recipe
from models import configurations
from support import pipelines


def count(make) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def linears(make) -> tuple[int, int, int]:
    """Weights of the linear layers of a transformer's blocks that do not modulate norms by the
    time, of those that do, and of the largest of the former; by their names."""
    with torch.device("meta"):
        model = make()
    sizes = {
        f"{i}.{name}": module.in_features * module.out_features
        for i, block in enumerate(family_of(model).blocks_of(model))
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    by_time = {n for n in sizes if ".norm" in n or "_mod." in n or "adaLN" in n}
    others = [size for name, size in sizes.items() if name not in by_time]
    return sum(others), sum(sizes[name] for name in by_time), max(others)


def sd3(**changes):
    from diffusers import SD3Transformer2DModel

    values = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
        "caption_projection_dim": 64 * changes["num_attention_heads"],
    }
    return SD3Transformer2DModel(**{**values, **changes})


def flux(**changes):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        **{"pooled_projection_dim": 768, "guidance_embeds": True, **changes}
    )


def flux2(**changes):
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(**{"guidance_embeds": False, **changes})


def qwen(**changes):
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(**changes)


def wan(**changes):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**changes)


def zimage(**changes):
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(**changes)


@pytest.mark.slow
def test_known_sizes_are_those_of_the_real_classes():
    medium = {
        "num_layers": 24,
        "num_attention_heads": 24,
        "dual_attention_layers": tuple(range(13)),
        "sample_size": 128,
        "pos_embed_max_size": 384,
    }
    large = {
        "num_layers": 38,
        "num_attention_heads": 38,
        "sample_size": 128,
        "pos_embed_max_size": 192,
    }
    ti2v = {
        "num_attention_heads": 24,
        "in_channels": 48,
        "out_channels": 48,
        "ffn_dim": 14336,
        "num_layers": 30,
    }
    klein = {"num_layers": 5, "num_single_layers": 20, "joint_attention_dim": 7680}
    larger = {"num_layers": 8, "num_single_layers": 24, "joint_attention_dim": 12288}
    for name, make in (
        ("stabilityai/stable-diffusion-3.5-medium", lambda: sd3(**medium)),
        ("stabilityai/stable-diffusion-3.5-large", lambda: sd3(**large)),
        ("black-forest-labs/FLUX.1-dev", flux),
        (
            "black-forest-labs/FLUX.2-klein-base-4B",
            lambda: flux2(num_attention_heads=24, **klein),
        ),
        ("black-forest-labs/FLUX.2-klein-9B", lambda: flux2(num_attention_heads=32, **larger)),
        ("Qwen/Qwen-Image", qwen),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", lambda: wan(**ti2v)),
        ("Tongyi-MAI/Z-Image-Turbo", zimage),
    ):
        found = plan.sizes_of(name)
        assert found.parameters == count(make), name
        assert (found.packed, found.modulating, found.packed_largest) == linears(make), name


def stored(transformer, inputs) -> int:
    """Bytes that autograd keeps for one forward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transformer(**inputs)
    return sum(size for size, _ in seen.values())


ROWS = 2
"""Of a forward. With one, the tokens of image and text lie in one piece and nothing is copied."""


def trainable(model, rank=8, fuse=False):
    cast(model.requires_grad_(False), torch.bfloat16)
    family = family_of(model)
    # With a mask PyTorch chooses its flash kernel by itself, and stores no more.
    kernel = "native" if family.masked_attention else "native_flash"
    attention.pin(model, family, kernel, torch.device("cpu"), torch.bfloat16)
    if fuse:
        blocks.fuse(model, family)
    add_adapter(model, PolicyConfig(lora_rank=rank, lora_alpha=rank))
    return model


def per_block(fewer, more, tokens):
    """Bytes a token that one block more leaves: what grows with both blocks and tokens."""
    few, many = tokens
    grown = [run(many) - run(few) for run in (fewer, more)]
    return (grown[1] - grown[0]) / (many - few) / ROWS


def sd3_run(layers, dual, fuse, text=20, rank=8):
    small = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "sample_size": 24}
    kinds = {"num_layers": layers, "dual_attention_layers": tuple(range(dual))}
    model = trainable(
        sd3(num_attention_heads=2, pos_embed_max_size=24, **small, **kinds), rank, fuse
    )

    def run(image):
        side = 2 * math.isqrt(image)
        return stored(
            model,
            {
                "hidden_states": torch.randn(ROWS, 16, side, side, dtype=torch.bfloat16),
                "timestep": torch.rand(ROWS),
                "encoder_hidden_states": torch.randn(ROWS, text, 32, dtype=torch.bfloat16),
                "pooled_projections": torch.randn(ROWS, 16, dtype=torch.bfloat16),
            },
        )

    return run


def flux_run(double, single, fuse, rank=8):
    small = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "num_attention_heads": 1}
    model = trainable(flux(num_layers=double, num_single_layers=single, **small), rank, fuse)

    def run(image):
        return stored(
            model,
            {
                "hidden_states": torch.randn(ROWS, image, 64, dtype=torch.bfloat16),
                "encoder_hidden_states": torch.randn(ROWS, 20, 32, dtype=torch.bfloat16),
                "pooled_projections": torch.randn(ROWS, 16, dtype=torch.bfloat16),
                "timestep": torch.rand(ROWS),
                "guidance": torch.ones(ROWS),
                "img_ids": torch.zeros(image, 3),
                "txt_ids": torch.zeros(20, 3),
            },
        )

    return run


def test_sizes_of_flux2s_encoders_and_vae():
    """Qwen3-4B and Qwen3-8B by their config.json, and the VAE's defaults."""
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen3Config, Qwen3ForCausalLM

    both = {
        "vocab_size": 151936,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    for width, inner, tied, size in (
        (2560, 9728, True, flux2_sizes.QWEN3_4B),
        (4096, 12288, False, flux2_sizes.QWEN3_8B),
    ):
        config = Qwen3Config(
            hidden_size=width, intermediate_size=inner, tie_word_embeddings=tied, **both
        )
        assert count(lambda config=config: Qwen3ForCausalLM(config)) == size
    assert count(AutoencoderKLFlux2) == flux2_sizes.VAE


def flux2_run(double, single, fuse, rank=8):
    small = {"joint_attention_dim": 32, "num_attention_heads": 1}
    model = trainable(flux2(num_layers=double, num_single_layers=single, **small), rank, fuse)

    def run(image):
        return stored(
            model,
            {
                "hidden_states": torch.randn(ROWS, image, 128, dtype=torch.bfloat16),
                "encoder_hidden_states": torch.randn(ROWS, 20, 32, dtype=torch.bfloat16),
                "timestep": torch.rand(ROWS),
                "img_ids": torch.zeros(image, 4),
                "txt_ids": torch.zeros(20, 4),
            },
        )

    return run


def test_sizes_of_qwens_encoder_and_vae():
    """Qwen2.5-VL-7B by its config.json, and the VAE's defaults."""
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    assert count(lambda: Qwen2_5_VLForConditionalGeneration(config)) == qwen_sizes.ENCODER
    assert count(AutoencoderKLQwenImage) == qwen_sizes.VAE


def test_size_of_z_images_encoder():
    """Qwen3-4B by its config.json; the VAE is FLUX.1's."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    assert count(lambda: Qwen3Model(config)) == zimage_sizes.ENCODER


def zimage_run(layers, refiners, fuse, rank=8):
    model = trainable(
        zimage(
            dim=128,
            n_heads=1,
            n_kv_heads=1,
            n_layers=layers,
            n_refiner_layers=refiners,
            cap_feat_dim=32,
        ),
        rank,
        fuse,
    )

    def run(image):
        side = math.isqrt(image)
        forward = BatchForward(model, side, side, 32, torch.device("cpu"))
        given = {
            "sample": torch.randn(ROWS, 16, 2 * side, 2 * side, dtype=torch.bfloat16),
            "time": torch.rand(ROWS),
            "embeds": torch.randn(ROWS, 32, 32, dtype=torch.bfloat16),
            "valid": torch.ones(ROWS, 32),
        }
        with forward.put_into(model):
            return stored(model, given)

    return run


def qwen_run(layers, fuse, rank=8):
    model = trainable(
        qwen(num_layers=layers, num_attention_heads=1, joint_attention_dim=32), rank, fuse
    )
    tables = model.pos_embed

    def run(image):
        side = math.isqrt(image)
        rotary = real_tables(tables([[(1, side, side)]], max_txt_seq_len=20, device="cpu"))
        model.pos_embed = modulation.Constant(rotary)
        mask = torch.zeros(ROWS, 1, 1, 20 + image, dtype=torch.bfloat16)
        return stored(
            model,
            {
                "hidden_states": torch.randn(ROWS, image, 64, dtype=torch.bfloat16),
                "encoder_hidden_states": torch.randn(ROWS, 20, 32, dtype=torch.bfloat16),
                "timestep": torch.rand(ROWS),
                "attention_kwargs": {"attention_mask": mask},
            },
        )

    return run


def test_sizes_of_wans_encoder_and_vae():
    """UMT5-XXL and the VAE of TI2V-5B by their config.json."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    text = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config = UMT5Config(**text, feed_forward_proj="gated-gelu")
    vae = configurations.WAN22_TI2V_5B.vae
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    linear = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(p.numel() for p in encoder.parameters()) == wan_sizes.ENCODER
    assert sum(m.in_features * m.out_features for m in linear) == wan_sizes.ENCODER_PACKED
    assert count(lambda: AutoencoderKLWan(**vae)) == wan_sizes.VAE


def test_sizes_of_a_wan_folder():
    """Those of the table, from config.json; and a VAE of Wan2.1's form."""
    model = configurations.WAN22_TI2V_5B
    known = plan.sizes_of("Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    numbers = (known.parameters, known.encoders, known.vae)
    known = replace(known, encoders_packed=0)
    assert wan_sizes.read(model.transformer, model.vae, *numbers) == known
    other = {"base_dim": 96, "temperal_downsample": [False, True, True]}
    found = wan_sizes.read({**model.transformer, "in_channels": 16}, other, 1, 2, 3)
    assert (found.latent_pixels, found.pixels, found.channels) == (8, 16, 16)
    assert (found.decoder_width, found.decoder_maps) == (384, wan_sizes.PLAIN)
    assert wan_sizes.read(model.transformer, {}, 1, 2, 0) is None


def test_memory_of_a_video_moves_with_its_frames():
    arch = plan.sizes_of("Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    base = recipe("wan22_ti2v_5b_ocr", memory=80.0, **{"sample.batch_size": 2})

    def parts(**changes):
        return plan.expected_memory(
            replace(base, **{f"policy.{n}": v for n, v in changes.items()}), arch
        )

    # 9 frames of latents of 33, 21 of 81.
    short, long = parts(frames=33), parts(frames=81)
    assert long["trajectory"] == pytest.approx(short["trajectory"] * 21 / 9)
    assert short["trajectory"] == pytest.approx(256 * 48 * 9 * 16 * 26 * 21 * 4 / 2**30)
    tokens, text = 9 * 8 * 13, 512
    kept = 30 * 4 * (tokens * (wan_sizes.block(14336 / 3072).stored[0] * 3072 + 12 * 32))
    kept += 30 * 4 * text * (wan_sizes.TEXT.stored[0] * 3072 + 4 * 32)
    copies = 2 * 240 * ((3072 + 32) * 3072 + 32 * 3072)
    passing = wan_sizes.PASSING * 3072 * tokens * 4
    assert short["update"] == pytest.approx((kept + copies + passing) / 2**30)
    # The pipeline's own size where none is given, and a square where it is.
    assert parts(height=0, width=0, frames=0) == parts(height=480, width=832, frames=81)
    assert parts(height=0, width=0, resolution=256) == parts(height=256, width=256)


def wan_run(layers, fuse, rank=8, text=20):
    width = {"num_attention_heads": 3, "ffn_dim": 384 * 14 // 3, "text_dim": 32}
    model = trainable(wan(num_layers=layers, in_channels=8, out_channels=8, **width), rank, fuse)

    def run(image):
        return stored(
            model,
            {
                "hidden_states": torch.randn(ROWS, 8, image // 16, 8, 8, dtype=torch.bfloat16),
                "encoder_hidden_states": torch.randn(ROWS, text, 32, dtype=torch.bfloat16),
                "timestep": 1000 * torch.rand(ROWS),
            },
        )

    return run


@pytest.mark.parametrize("fuse", [False, True])
def test_stored_bytes_of_a_video_and_of_its_text(fuse):
    """Of three heads: a token is 384 numbers."""
    runs = [wan_run(layers, fuse) for layers in (2, 3)]
    kind = wan_sizes.block(14 / 3)
    a, b = kind.stored_fused if fuse else kind.stored
    assert per_block(*runs, (64, 144)) == pytest.approx(384 * a + 8 * b, rel=0.02)
    if fuse:
        return
    longer = [wan_run(layers, False, text=60) for layers in (2, 3)]
    grown = [(more(64) - less(64)) for less, more in zip(runs, longer, strict=True)]
    a, b = wan_sizes.TEXT.stored
    assert (grown[1] - grown[0]) / 40 / ROWS == pytest.approx(384 * a + 8 * b, rel=0.02)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("kind", "run", "fewer", "more"),
    [
        (JOINT, sd3_run, (2, 0), (3, 0)),
        # The first block has nothing to keep before its adapters, so the second is the one counted.
        (DUAL, sd3_run, (3, 1), (3, 2)),
        (DOUBLE, flux_run, (1, 1), (2, 1)),
        (SINGLE, flux_run, (1, 1), (1, 2)),
        (flux2_sizes.DOUBLE, flux2_run, (1, 1), (2, 1)),
        (flux2_sizes.SINGLE, flux2_run, (1, 1), (1, 2)),
        # The last block's text goes nowhere, so the blocks counted stand before it.
        (qwen_sizes.JOINT, qwen_run, (2,), (3,)),
    ],
)
def test_stored_bytes_are_what_autograd_keeps(kind, run, fewer, more, fuse):
    a, b = kind.stored_fused if fuse else kind.stored
    found = per_block(run(*fewer, fuse), run(*more, fuse), (64, 144))
    assert found == pytest.approx(128 * a + 8 * b, rel=0.02)


def test_linear_layers_of_text_encoders():
    """By the real classes, as their models have them."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from models import configurations

    classes = {
        "clip": (CLIPTextModelWithProjection, CLIPTextConfig),
        "t5": (T5EncoderModel, T5Config),
    }
    counts = []
    for kind, values in configurations.SD35_MEDIUM.encoders:
        cls, config = classes[kind]
        with torch.device("meta"):
            model = cls(config(**values))
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        counts.append(sum(layer.in_features * layer.out_features for layer in layers))
    assert counts == [CLIP_L_PACKED, CLIP_G_PACKED, T5_XXL_PACKED]


def test_packed_weights_are_counted():
    """By hand: 1.46 billion weights of the blocks, 0.76 of the modulation, 5.35 of the encoders."""
    base = recipe("sd35m_geneval", memory=80.0)
    arch = plan.sizes_of(base.policy.model)

    def saved(**changes):
        fields = {f"policy.{name}": value for name, value in changes.items()}
        counts = [plan.expected_memory(c, arch) for c in (base, replace(base, **fields))]
        return [counts[0][name] - counts[1][name] for name in ("weights", "update")]

    linear, modulating, text = 1.4604e9, 0.76205e9, 5.3468e9
    eight, _ = saved(quantize="int8")
    assert eight * plan.GIB == pytest.approx(linear + modulating, rel=1e-3)
    four, copies = saved(quantize="nf4")
    assert four * plan.GIB == pytest.approx(1.4375 * linear + modulating, rel=1e-3)
    # No merged copies of 191 layers, but one layer at a time.
    merged = 191 * 2 * (1536 * 1536 + 2 * 32 * 1536) - 12 * 4 * 1536**2
    assert copies * plan.GIB == pytest.approx(merged, rel=1e-3)
    assert saved(quantize_text="nf4")[0] * plan.GIB == pytest.approx(1.4375 * text, rel=1e-3)


@pytest.mark.parametrize("fuse", [False, True])
def test_stored_bytes_of_z_images_blocks(fuse):
    """A layer, and a refiner, which is the same block; tokens come in multiples of 32."""
    a, b = zimage_sizes.LAYER.stored_fused if fuse else zimage_sizes.LAYER.stored
    two = zimage_run(2, 1, fuse)
    for more in (zimage_run(3, 1, fuse), zimage_run(2, 2, fuse)):
        assert per_block(two, more, (64, 256)) == pytest.approx(128 * a + 8 * b, rel=0.02)


def test_a_folder_has_the_sizes_of_its_files(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    folder = pipelines.save_latent_pipeline(tmp_path / "model")
    found = plan.sizes_of(str(folder))
    parts = StableDiffusion3Pipeline.from_pretrained(folder).components
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in parts.items() if is_model(m)}
    # A file has the table of positions too, which is no parameter.
    assert found.parameters == sum(t.numel() for t in parts["transformer"].state_dict().values())
    assert found.vae == sizes["vae"]
    assert found.encoders == pytest.approx(
        sum(size for name, size in sizes.items() if name.startswith("text")), rel=0.01
    )
    assert (found.blocks, found.width) == (((JOINT, 2), (DUAL, 0)), 16)
    encoders = [m for name, m in parts.items() if name.startswith("text_encoder")]
    linear = [m for e in encoders for m in e.modules() if isinstance(m, torch.nn.Linear)]
    assert found.encoders_packed == sum(m.in_features * m.out_features for m in linear)
    for other in ("nano", str(tmp_path), "someone/else"):
        assert plan.sizes_of(other) is None


def is_model(part) -> bool:
    return isinstance(part, torch.nn.Module)


def test_memory_moves_with_what_it_is_made_of():
    base = recipe("sd35m_geneval", memory=80.0)
    arch = plan.sizes_of(base.policy.model)

    def parts(**changes):
        names = {name.replace("__", "."): value for name, value in changes.items()}
        return plan.expected_memory(replace(base, **names), arch)

    whole = parts(sample__batch_size=8)
    # 2.24 + 5.58 + 0.08 billion parameters and a table of 0.23 billion numbers of 2 bytes.
    assert whole["weights"] == pytest.approx(15.15, abs=0.01)
    assert parts(sample__batch_size=4)["update"] < 0.6 * whole["update"]
    assert parts(sample__batch_size=8, sample__guidance_scale=1.0)["update"] == pytest.approx(
        whole["update"] / 2, rel=0.05
    )
    recomputed = parts(sample__batch_size=8, policy__gradient_checkpointing=True)["update"]
    # 0.9 of it are the joined matrices, which stay; test_on_device_memory.py counts them.
    assert recomputed == pytest.approx(4.26, abs=0.01)
    offloaded = parts(sample__batch_size=8, policy__offload_text_encoders=True)
    assert offloaded["weights"] == pytest.approx(4.76, abs=0.01)
    assert offloaded["encode"] == pytest.approx(10.39, abs=0.01)
    assert whole["trajectory"] == pytest.approx(1152 * 11 * 65536 * 4 / 2**30)
    # CLIP-L twice asked for is there once: 986 + 446 + 428 + 69 million float32.
    assert whole["rewards"] == pytest.approx(4 * 1.929e9 / 2**30, rel=1e-3)
    moving = {"update", "rollout", "encode"}
    always = sum(v for name, v in whole.items() if name not in {*moving, "total"})
    assert whole["total"] == pytest.approx(always + max(whole[name] for name in moving))


@pytest.mark.parametrize("memory", [28.0, 40.0, 80.0, 141.0])
def test_rows_of_a_forward_fit_and_divide(memory):
    found = recipe("sd35m_geneval_1gpu", memory=memory)
    rows = found.sample.batch_size
    arch = plan.sizes_of(found.policy.model)
    assert 96 % rows == 0 and rows <= plan.MOST_ROWS
    assert plan.expected_memory(found, arch)["total"] <= 0.8 * memory
    larger = [r for r in range(rows + 1, plan.MOST_ROWS + 1) if 96 % r == 0]
    for more in larger[:1]:
        trial = replace(found, **{"sample.batch_size": more})
        assert plan.expected_memory(trial, arch)["total"] > 0.8 * memory


def test_the_plan_is_printed_before_anything_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "gpu_memory", lambda: 24.0)
    # The environment was read when huggingface_hub was imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    line = ["train", "sd35m_geneval", "--sample.batch-size", "8", "--run.out", str(tmp_path / "r")]
    line += ["--reward.weights", "geneval", "1", "--reward.report", "geneval"]
    assert main.main(line) == 2
    shown = capsys.readouterr()
    assert "images: 48 prompts x 24 = 1152 an iteration" in shown.out
    assert "updates: 2 an iteration, each of 72 micro-batches of 8 images x 9 steps" in shown.out
    assert "GiB of 24, which is more than there is: lower sample.batch_size" in shown.out
    assert shown.err.count("\n") == 1 and "cannot be loaded" in shown.err


def test_reward_models_on_other_devices_are_not_counted():
    base = recipe("sd35m_geneval", memory=80.0)
    arch = plan.sizes_of(base.policy.model)

    def counted(**changes):
        fields = {f"reward.{name}": value for name, value in changes.items()}
        return plan.expected_memory(replace(base, **fields), arch)["rewards"]

    assert counted(devices={"all": "cuda:1"}) == 0.0
    assert counted(devices={"all": "cuda"}) == counted(devices={"all": "cuda:0"}) == counted()
    # CLIP-H's 986 million and ImageReward's 446 are elsewhere; CLIP-L and Mask2Former here.
    some = {"pickscore": "cuda:1", "imagereward": "cpu"}
    assert counted(devices=some) == pytest.approx(4 * 0.497e9 / 2**30, rel=1e-3)
    options = {"pickscore.device": "cuda:0"}
    with_option = counted(devices=some, options=options)
    assert with_option == pytest.approx(4 * 1.483e9 / 2**30, rel=1e-3)
    away = replace(base, **{"policy.device": "cuda:1", "reward.devices": {"all": "cuda:1"}})
    assert plan.expected_memory(away, arch)["rewards"] == counted()


def test_the_plan_names_the_servers_of_rewards(monkeypatch):
    reward = {"http://a:1,http://b:2/score": 1.0, "unifiedreward": 0.5, "no.such:reward": 1.0}
    options = {"unifiedreward.url": "http://c:3/v1, http://d:4/v1"}
    config = replace(Config(), **{"reward.weights": reward, "reward.options": options})
    assert plan.plan_lines(config)["servers"] == (
        "http://a:1, http://b:2/score; unifiedreward: http://c:3/v1, http://d:4/v1"
    )


def test_a_model_of_unknown_size_has_arithmetic_only():
    assert set(plan.plan_lines(Config())) == {"images", "updates"}
