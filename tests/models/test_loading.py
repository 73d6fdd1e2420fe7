"""Models and tokenizers come as their configuration says, and every form of a folder loads."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from rlhf_kit.models.adapters import adapter_parameters
from rlhf_kit.models.config import Lora, Pretrained, Scratch
from rlhf_kit.models.loading import holds_adapter, load_model, load_tokenizer, lora_config, scratch_vocabulary

IDS = torch.tensor([[4, 5, 6, 7, 8]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapter_folder(base: str, folder: Path) -> torch.Tensor:
    """Write a LoRA adapter that changes what its base computes; returns the logits with it."""
    torch.manual_seed(1)
    model = load_model(Pretrained(path=base, peft=Lora(r=2)))
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits(model)


def test_scratch_has_the_configured_sizes_and_its_tokenizers_ids() -> None:
    config = Scratch(
        type="scratch",
        vocabulary=("a", "b"),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=17,
        config={"tie_word_embeddings": True},
    )
    model, tokenizer = load_model(config), load_tokenizer(config)
    assert isinstance(model, LlamaForCausalLM)
    assert (model.config.hidden_size, model.config.intermediate_size) == (24, 40)
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (3, 2)
    assert (model.config.max_position_embeddings, model.config.vocab_size) == (17, 6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (0, tokenizer.eos_token_id)


def test_the_vocabulary_of_running_sums_holds_every_number_and_the_equals_sign() -> None:
    words = scratch_vocabulary(Scratch(type="scratch", vocabulary="running_sums"))
    assert words == (*map(str, range(23)), "=")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_a_folder_loads_in_the_configured_precision(saved, dtype) -> None:
    model = load_model(Pretrained(path=saved, dtype=dtype))
    assert model.dtype == {"auto": torch.float32}.get(dtype) or getattr(torch, dtype)
    assert not model.training


def test_peft_wraps_the_model_with_the_configured_adapter(saved) -> None:
    lora = Lora(r=3, alpha=6, dropout=0.1, target_modules=("q_proj",))
    model = load_model(Pretrained(path=saved, peft=lora))
    assert isinstance(model, PeftModel)
    shapes = {tuple(parameter.shape) for parameter in adapter_parameters(model, "default")}
    assert shapes == {(3, 16), (16, 3)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.default.weight" for half in "AB"
    }
    config = lora_config(lora)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 6, 0.1, {"q_proj"})


def test_a_folder_with_an_adapter_gives_its_base_with_the_adapter_merged_in(saved, tmp_path) -> None:
    expected = adapter_folder(saved, tmp_path / "adapter")
    assert holds_adapter(tmp_path / "adapter") and not holds_adapter(saved)
    model = load_model(Pretrained(path=str(tmp_path / "adapter")))
    assert isinstance(model, LlamaForCausalLM)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(load_model(Pretrained(path=saved))), expected, atol=1e-2)


def test_a_merged_adapter_leaves_a_model_that_learns(saved, tmp_path) -> None:
    load_model(Pretrained(path=str(saved), peft=Lora(r=2))).save_pretrained(tmp_path / "adapter")
    model = load_model(Pretrained(path=str(tmp_path / "adapter")))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_on_an_adapter_holds_both(saved, tmp_path) -> None:
    adapter_folder(saved, tmp_path / "first")
    expected = adapter_folder(str(tmp_path / "first"), tmp_path / "second")
    model = load_model(Pretrained(path=str(tmp_path / "second")))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def write_gguf(path: Path) -> None:
    """A GGUF file of a Llama with one layer of 32 channels and 10 words."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(10)
    shapes = {"token_embd": (10, 32), "output": (10, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype(np.float32)
        if values.ndim == 1 or name in ("token_embd", "output"):
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_with_weights_that_can_be_trained_and_saved_again(tmp_path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    model = load_model(Pretrained(path=str(tmp_path), gguf_file="tiny.gguf"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(Pretrained(path=str(tmp_path / "saved")))), logits(model))


def test_the_tokenizer_pads_on_the_left_with_its_end_token_where_it_has_no_pad_token(saved, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved, padding_side="right", pad_token=None)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "padless")
    assert AutoTokenizer.from_pretrained(tmp_path / "padless").pad_token is None
    loaded = load_tokenizer(Pretrained(path=saved, tokenizer=str(tmp_path / "padless")))
    assert (loaded.padding_side, loaded.pad_token) == ("left", "<eos>")
    assert load_tokenizer(Pretrained(path=saved)).pad_token == "<pad>"


def test_the_chat_template_is_a_file_or_its_text(saved, tmp_path) -> None:
    template = "{% for m in messages %}{{ m['content'] }} = {% endfor %}"
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    long = template + "{# longer than a path can be #}" * 200
    for given in (template, long, str(tmp_path / "chat.jinja")):
        tokenizer = load_tokenizer(Pretrained(path=saved, chat_template=given))
        assert tokenizer.apply_chat_template([{"role": "user", "content": "1 2"}], tokenize=False) == "1 2 = "
