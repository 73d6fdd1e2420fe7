"""What vLLM is given to load; the engine itself needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kit.models.config import Lora, Pretrained
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.pairs.config import Generation
from rlhf_kit.pairs.sampling import VllmSampler, whole_weights

IDS = torch.tensor([[0, 1, 2, 3]])


@pytest.fixture
def adapter(talker_of_sums: Path, tmp_path: Path) -> Pretrained:
    """A folder with an adapter that changes what its base says."""
    model = load_model(Pretrained(path=str(talker_of_sums), peft=Lora(r=2)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(Pretrained(path=str(talker_of_sums))).save_pretrained(tmp_path / "adapter")
    return Pretrained(path=str(tmp_path / "adapter"))


def said(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_adapter_is_merged_for_as_long_as_it_is_read(adapter, talker_of_sums) -> None:
    with whole_weights(adapter) as whole:
        assert not (Path(whole.path) / "adapter_config.json").exists()
        merged = said(AutoModelForCausalLM.from_pretrained(whole.path))
        words = AutoTokenizer.from_pretrained(whole.path).get_vocab()
    torch.testing.assert_close(merged, said(load_model(adapter)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged, said(load_model(Pretrained(path=str(talker_of_sums)))), atol=1e-2)
    assert words == load_tokenizer(adapter).get_vocab()
    assert not Path(whole.path).exists()


def test_a_whole_model_is_read_where_it_is(talker_of_sums) -> None:
    model = Pretrained(path=str(talker_of_sums), revision="abc")
    with whole_weights(model) as whole:
        assert whole == model


def test_the_engine_is_given_the_merged_model(adapter, monkeypatch) -> None:
    """In vLLM's place stands what loads as it does: whole models, by the folder that it is given."""
    loaded = {}

    def engine(model: str, tokenizer: str, **options: object) -> None:
        loaded["said"] = said(AutoModelForCausalLM.from_pretrained(model))
        loaded["words"] = AutoTokenizer.from_pretrained(tokenizer).get_vocab()

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=engine))
    VllmSampler(adapter, load_tokenizer(adapter), [], Generation(use_vllm=True))
    torch.testing.assert_close(loaded["said"], said(load_model(adapter)), atol=1e-5, rtol=1e-5)
    assert loaded["words"] == load_tokenizer(adapter).get_vocab()
