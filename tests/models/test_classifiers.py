"""Classifiers read texts behind prompts, find a segment's last token, and start from any language model or encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

from rlhf_kit.errors import RunError
from rlhf_kit.models.classifiers import Classifier, encode, load_token_classifier, longest_input, pad
from rlhf_kit.models.config import Lora, Pretrained
from rlhf_kit.models.loading import load_model

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "na", "##ive", "cafe", "bad", "##ly", "done", ".", "who", "?"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small encoder whose WordPiece tokenizer lowers case and strips accents."""
    backend = Tokenizer(models.WordPiece({piece: k for k, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=12, **special)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label={0: "none", 1: "bad"},
        label2id={"none": 0, "bad": 1},
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def classifier(bert: Path) -> Classifier:
    return Classifier(AutoModelForTokenClassification.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert))


def test_offsets_count_the_texts_own_characters_whatever_stands_before_it(classifier: Classifier) -> None:
    text = "Naïve  CAFÉ badly done."
    for prompt in ("", "Who?"):
        found = encode(classifier.tokenizer, prompt, text)
        assert [text[start:end] for start, end in found.offsets] == ["Na", "ïve", "CAFÉ", "bad", "ly", "done", "."]
        pieces = classifier.tokenizer.convert_ids_to_tokens(found.inputs["input_ids"])
        assert [pieces[k] for k in found.tokens] == ["na", "##ive", "cafe", "bad", "##ly", "done", "."]
        assert len(found) == len(pieces) == len(found.tokens) + (5 if prompt else 2)


def test_the_last_token_of_a_segment_is_the_last_that_overlaps_it(classifier: Classifier) -> None:
    found = encode(classifier.tokenizer, "", "badly done.")  # [CLS] bad ##ly done . [SEP]
    assert [found.last_token(s) for s in ((0, 5), (0, 2), (3, 4), (6, 11), (5, 6))] == [2, 1, 2, 4, None]
    empty = replace(found, offsets=[(0, 3), (3, 5), (5, 5), (10, 11)])  # a token without text, and "done" dropped
    assert [empty.last_token(s) for s in ((0, 5), (0, 6), (6, 10), (6, 11), (0, 1))] == [2, 2, None, 4, 1]


def test_logits_are_those_of_the_text_alone_read_by_the_model(classifier: Classifier) -> None:
    prompts, texts = ["Who?", "", ""], ["done badly.", "bad", "bad. done"]
    cuts = [[(0, 4), (5, 11)], None, [(0, 4), (5, 9)]]
    results = classifier(prompts, texts, cuts)
    for prompt, text, result in zip(prompts, texts, results, strict=True):
        assert result is not None
        inputs: Any = cast(Any, classifier.tokenizer)(*([prompt, text] if prompt else [text]), return_tensors="pt")
        with torch.no_grad():
            logits = classifier.model(**inputs).logits[0]
        last = {"done badly.": [4, 7], "bad": [1], "bad. done": [2, 3]}[text]
        torch.testing.assert_close(result[1], logits[last])
    assert results[1] is not None and results[1][0] == [(0, 3)]


def test_a_text_beyond_the_limit_has_no_result_and_an_empty_one_no_segments(classifier: Classifier) -> None:
    assert classifier.longest == longest_input(classifier.model, classifier.tokenizer) == 12
    long, fits, empty = classifier(["", "", ""], ["a " * 11, "a " * 10, ""], [None, None, None])
    assert long is None and fits is not None and len(fits[0]) == 10
    assert empty is not None and empty[0] == [] and empty[1].shape == (0, 2)


@pytest.mark.parametrize("kind", [RobertaForTokenClassification, RobertaForSequenceClassification])
def test_positions_that_padding_takes_are_not_counted_as_readable(kind: Any, bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert, model_max_length=int(1e30))  # as one that says no limit
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=14,
        pad_token_id=1,
    )
    config.architectures = [kind.__name__]
    reader = Classifier(kind(config).eval(), tokenizer)
    assert reader.longest == 12  # positions 2 to 13
    fits, long = reader(["", ""], ["a " * 10, "a " * 11], [[(0, 19)], [(0, 21)]])
    assert fits is not None and fits[1].shape == (1, 2) and long is None


def test_padding_is_ignored_by_loss_and_attention(classifier: Classifier) -> None:
    rows = [
        {"input_ids": [2, 4], "attention_mask": [1, 1], "labels": [-100, 1]},
        {"input_ids": [2], "attention_mask": [1], "labels": [0]},
    ]
    batch = pad(rows, classifier.tokenizer)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[2, 4], [2, 0]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[-100, 1], [0, -100]],
    }


def test_a_softmax_for_one_class_of_several_and_a_sigmoid_where_several_can_hold(classifier: Classifier) -> None:
    logits = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(classifier.probabilities(logits), logits.softmax(dim=-1))
    several = Classifier(classifier.model, classifier.tokenizer)
    several.multi_label = True
    torch.testing.assert_close(several.probabilities(logits), logits.sigmoid())


# --- starting points ---


def test_a_language_models_body_gets_a_head_of_the_classes(talker: Path) -> None:
    model: Any = load_token_classifier(Pretrained(path=str(talker)), ("none", "bad", "worse"))
    assert model.config.id2label == {0: "none", 1: "bad", 2: "worse"} and model.config.label2id["worse"] == 2
    language: Any = load_model(Pretrained(path=str(talker)))
    for name, parameter in language.model.named_parameters():
        torch.testing.assert_close(dict(model.model.named_parameters())[name], parameter)
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 3)


def test_lora_is_on_the_body_and_the_head_is_trained_whole(talker: Path) -> None:
    for modules in ("all-linear", r".*layers\.1\..*_proj"):
        config = Pretrained(path=str(talker), peft=Lora(r=2, target_modules=modules))
        model = load_token_classifier(config, ("none", "bad"))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        head = [name for name in trained if "lora" not in name]
        assert sorted(name.rpartition(".")[2] for name in head) == ["bias", "weight"]
        assert all("score.modules_to_save" in name for name in head)
        layers = {name.split("layers.")[1][0] for name in trained if "lora" in name}
        assert layers == ({"0", "1"} if modules == "all-linear" else {"1"})


def test_an_adapter_of_a_language_model_is_merged_into_the_body(talker: Path, tmp_path: Path) -> None:
    adapted: Any = load_model(Pretrained(path=str(talker), peft=Lora(r=2)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(talker).save_pretrained(tmp_path)
    model: Any = load_token_classifier(Pretrained(path=str(tmp_path)), ("none", "bad"))
    ids = torch.tensor([[5, 6, 7]])
    body = adapted.get_base_model().model
    torch.testing.assert_close(model.model(input_ids=ids)[0], body(input_ids=ids)[0], rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_encoder_keeps_a_head_that_it_has(bert: Path) -> None:
    saved = AutoModelForTokenClassification.from_pretrained(bert)
    model: Any = load_token_classifier(Pretrained(path=str(bert)), ("none", "bad"))
    torch.testing.assert_close(model.classifier.weight, saved.classifier.weight)


def test_fewer_layers_are_the_first_and_more_than_there_are_are_refused(talker: Path, tmp_path: Path) -> None:
    language: Any = load_model(Pretrained(path=str(talker)))
    adapted: Any = load_model(Pretrained(path=str(talker), peft=Lora(r=2)))  # which starts as its base
    adapted.save_pretrained(tmp_path)
    for path in (talker, tmp_path):
        model: Any = load_token_classifier(Pretrained(path=str(path)), ("none", "bad"), layers=1)
        assert model.config.num_hidden_layers == len(model.model.layers) == 1
        torch.testing.assert_close(
            model.model.layers[0].mlp.up_proj.weight, language.model.layers[0].mlp.up_proj.weight
        )
        with pytest.raises(RunError, match="the model has 2, not 3"):
            load_token_classifier(Pretrained(path=str(path)), ("none", "bad"), layers=3)
