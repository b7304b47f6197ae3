"""UnifiedReward behind a real `transformers serve` with a tiny vision-language model."""

import time
import urllib.error
import urllib.request

import pytest
import torch

from flowgrpo.rewards import load
from flowgrpo.rewards.remote.serve import bind
from support import processes

pytest.importorskip("openai", reason="`transformers serve` needs transformers[serving]")
pytest.importorskip("uvicorn", reason="`transformers serve` needs transformers[serving]")

# It is token 0, and a language head of zeros makes greedy decoding choose token 0.
ANSWER = "Final Score: 4"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_judge(folder):
    """A LLaVA of 32 x 32 pixels which answers ANSWER, in the layout of a Hub repository."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = [ANSWER, "<unk>", "<pad>", "<eos>", "<image>", "You", "are", "given", "user", "image"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
    )
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**layer, num_attention_heads=2, image_size=32, patch_size=16)
    text = LlamaConfig(
        **layer, num_attention_heads=2, vocab_size=len(words), eos_token_id=3, pad_token_id=2
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4
    )
    model = LlavaForConditionalGeneration(config)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    save_judge(folder)
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    module = "transformers.cli.transformers"
    process = processes.Fork(folder / "log.txt", processes.run_module, module, *words).process
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.is_alive(), (folder / "log.txt").read_text()[-2000:]
            assert time.monotonic() < deadline, (folder / "log.txt").read_text()[-2000:]
            try:
                urllib.request.urlopen(url + "/health", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                time.sleep(0.3)
        yield url + "/v1", str(folder)
    finally:
        process.terminate()
        process.join(20)
        if process.is_alive():
            process.kill()


@pytest.mark.slow
def test_a_real_server_judges_images(endpoint):
    url, model = endpoint
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    reward = load("unifiedreward").configured(
        url=url, model=model, max_tokens=4, concurrency=1, timeout=60.0, retries=0
    )
    assert reward(images, ["a red car", "a dog"], [{}, {}]) == [0.8, 0.8]
