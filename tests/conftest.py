"""Settings for every test: no network, no threads of the tokenizers' own, and slow is not wrong."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("kit", deadline=None, max_examples=40)
settings.load_profile("kit")


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small untrained Llama over the numbers below 7, whose completions vary in length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_kit.data.tasks import running_sums_vocabulary
    from rlhf_kit.models.tokenizers import word_level_tokenizer

    folder = tmp_path_factory.mktemp("small_policy")
    torch.manual_seed(0)
    tokenizer = word_level_tokenizer(tuple(running_sums_vocabulary(7)))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small untrained Llama whose byte-level BPE tokenizer reads any text and has a chat template."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("talker")
    backend = ByteLevelBPETokenizer()
    words = ["Yes yes YES no No NO A B C good bad", "the film was good and the story was bad", "I like it. Thank you!"]
    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend.train_from_iterator(
        words * 3, vocab_size=350, min_frequency=2, special_tokens=specials, show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, eos_token="<|end|>", pad_token="<|end|>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
