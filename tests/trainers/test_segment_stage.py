"""The `segment` stage learns spans, says how well against baselines, and writes a model that loads anywhere."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, TrainerCallback

from rlhf_kit.errors import RunError
from rlhf_kit.models.classifiers import Classifier, load_token_classifier
from rlhf_kit.models.config import Pretrained
from rlhf_kit.rewards.segment_model import SegmentModelConfig, read_segment_record
from rlhf_kit.trainers.config import Segment
from rlhf_kit.trainers.segment import (
    class_weights,
    encode_texts,
    evaluate,
    judge,
    read_texts,
    run_segment,
    segment_loss,
)
from rlhf_kit.trainers.setup import StageRun

TEXTS = ["the film was bad", "the story was good", "I like it", "the film was good and the story was bad"]
LORA = {"type": "lora", "r": 4}


def annotated(texts: list[str], **fields: Any) -> list[dict[str, Any]]:
    """Rows in which every "bad" is marked."""
    rows = []
    for text in texts:
        starts = [k for k in range(len(text)) if text.startswith("bad", k)]
        rows.append({"text": text, "spans": [{"start": k, "end": k + 3, "label": "Bad"} for k in starts], **fields})
    return rows


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(rows: list[dict[str, Any]], name: str = "rows") -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return {"type": "jsonl", "path": str(path)}

    return make


@pytest.fixture
def stage(talker: Path) -> Callable[..., Segment]:
    """A `segment` stage on a tiny language model; `args` are those of its trainer."""

    def make(data: dict[str, Any], args: dict[str, Any] | None = None, **fields: Any) -> Segment:
        given = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
        settings: dict[str, Any] = {
            "type": "segment",
            "model": {"path": str(talker), **fields.pop("model", {})},
            "labels": {"bad": ["Bad"]},
            "data": data,
            "trainer": {"args": {**given, **(args or {})}},
        }
        return Segment.model_validate({**settings, **fields})

    return make


class Logs(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append(dict(logs))


# --- learning ---


@pytest.mark.parametrize(
    ("peft", "segments"), [(None, {"by": "token"}), (LORA, {"by": "step", "pattern": r"\s+"})], ids=["whole", "lora"]
)
def test_it_learns_which_words_are_bad_and_the_written_model_knows_it(stage, write, tmp_path, peft, segments) -> None:
    words = ["the", "film", "was", "good", "bad", "story", "and", "it"]
    chance = random.Random(0)
    texts = [" ".join(chance.choices(words, k=6)) for _ in range(64)]
    logs = Logs()
    given = stage(
        write(annotated(texts[:48])),
        {"max_steps": 60, "learning_rate": 1e-2},
        eval_data=write(annotated(texts[48:]), "held_out"),
        model={"peft": peft},
        layers=None if peft is None else 1,
        segments=segments,
    )
    results = run_segment(given, StageRun(tmp_path / "run", callbacks=[logs]))
    assert results["eval_char_f1"] > 0.95 and results["eval_f1/bad"] > 0.95
    assert logs.entries[-1]["eval_char_f1"] == results["eval_char_f1"]
    assert results["baselines"]["nothing"]["f1/bad"] == 0.0
    assert results["baselines"]["all bad"]["recall/bad"] == 1.0
    assert results["baselines"]["lexicon"]["f1/bad"] == 1.0

    folder = str(tmp_path / "run" / "model")
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "none", 1: "bad"}
    classifier = Classifier(model, AutoTokenizer.from_pretrained(folder))
    held_out = read_texts(given, "eval_data")
    cuts = [None if segments["by"] == "token" else given.segments.within(row.text) for row in held_out]
    found = classifier([""] * 16, [row.text for row in held_out], cuts)
    verdicts = [(result[0], result[1].argmax(dim=-1).tolist()) for result in found if result is not None]
    assert evaluate(given, held_out, verdicts) == {
        name.removeprefix("eval_"): value for name, value in results.items() if name.startswith("eval_")
    }
    assert read_segment_record(folder) == {"segments": given.segments.model_dump(), "prompt_template": None}
    source = {"type": "segment_model", "path": folder, "labels": {"bad": -1.0}}
    config = SegmentModelConfig.model_validate(source)
    assert list(config.problems(given.model, [config])) == []
    built = config.build(SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    assert built._segments == given.segments


def test_the_held_out_loss_chooses_the_best_checkpoint(stage, write, tmp_path) -> None:
    logs = Logs()
    strategy = {f"{what}_strategy": "steps" for what in ("eval", "save")}
    args = {"max_steps": 6, "learning_rate": 3e-2, **strategy, "eval_steps": 1, "save_steps": 1}
    good = [{"start": 7, "end": 11, "label": "Bad"}]
    opposite = [
        {"text": "it was bad", "spans": []},
        {"text": "it was good", "spans": good},
    ]  # learning is for the worse
    given = stage(
        write(annotated(TEXTS * 2)),
        {**args, "load_best_model_at_end": True},
        eval_data=write(opposite, "held_out"),
        model={"peft": LORA},
    )
    results = run_segment(given, StageRun(tmp_path / "run", callbacks=[logs]))
    losses = [entry["eval_loss"] for entry in logs.entries if "eval_loss" in entry]
    assert len(losses) == 6 and min(losses) < losses[-1] and results["updates"] == 6
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    encoded: Any = encode_texts(given, read_texts(given, "eval_data"), tokenizer, 1000)
    with torch.no_grad():
        outputs = [model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(dim=-1) for row in encoded]
    picked = [
        -output[k, label].item()
        for output, row in zip(outputs, encoded, strict=True)
        for k, label in enumerate(row["labels"])
        if label != -100
    ]
    assert sum(picked) / len(picked) == pytest.approx(min(losses), rel=1e-3)


def test_a_stopped_stage_goes_on_from_its_checkpoint_to_the_same_model(stage, write, tmp_path) -> None:
    data = write(annotated(TEXTS * 4))
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_segment(stage(data, args), StageRun(whole))
    with pytest.raises(KeyboardInterrupt):
        run_segment(stage(data, args), StageRun(stopped, callbacks=[Stop()]))
    assert not (stopped / "model").exists()
    assert run_segment(stage(data, args), StageRun(stopped))["updates"] == 4
    states = [AutoModelForTokenClassification.from_pretrained(run / "model").state_dict() for run in (whole, stopped)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- data ---


def test_labels_stand_at_the_last_token_of_each_segment(stage, write, talker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    given = stage(write(annotated(["I like it. the film was bad."])), segments={"by": "sentence"})
    rows = encode_texts(given, read_texts(given, "data"), tokenizer, 1000)
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    assert rows[0]["length"] == len(ids) == len(labels)
    ends = {k: label for k, label in enumerate(labels) if label != -100}
    assert list(ends.values()) == [0, 1] and list(ends)[1] == len(ids) - 1
    assert tokenizer.decode(ids[: next(iter(ends)) + 1]) == "I like it."


def test_the_prompt_is_read_in_its_form_and_has_no_labels(stage, write, talker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    data = write([{"prompt": "bad bad", **row} for row in annotated(["bad film"])])
    plain = stage(data)
    assert read_texts(plain, "data")[0].prompt == ""
    given = stage(data, prompt_template="Q: {prompt}\n")
    row: Any = encode_texts(given, read_texts(given, "data"), tokenizer, 1000)[0]
    assert tokenizer.decode(row["input_ids"]) == "Q: bad bad\nbad film"
    marked = [tokenizer.decode([i]) for i, k in zip(row["input_ids"], row["labels"], strict=True) if k == 1]
    assert "".join(marked).strip() == "bad"
    before = len(tokenizer("Q: bad bad\n")["input_ids"])
    assert row["labels"][:before] == [-100] * before


def test_held_out_texts_are_not_learnt_and_long_ones_are_left_out(stage, write, tmp_path, caplog) -> None:
    data, held_out = write(annotated(TEXTS)), write(annotated(TEXTS[:1]), "held_out")
    results = run_segment(stage(data, eval_data=held_out), StageRun(tmp_path / "run"))
    assert results["texts"] == 3 and "1 rows of data are texts of eval_data too" in caplog.text
    long = [*TEXTS, "bad " * 2000]
    results = run_segment(stage(write(annotated(long))), StageRun(tmp_path / "long"))
    assert results["texts"] == 4 and "1 texts are empty or longer than the 1024 tokens" in caplog.text
    with pytest.raises(RunError, match="none of the 1 texts can be read by the model, whose limit is 1024 tokens"):
        run_segment(stage(write(annotated(long[-1:]))), StageRun(tmp_path / "none"))


def test_a_label_that_no_training_span_has_is_refused_before_training(stage, write, tmp_path) -> None:
    data, held_out = write(annotated(TEXTS)), write(annotated(TEXTS[:1]), "held_out")
    said = r"no span of data has this label \(value 'bad'\); did you mean 'Bad'\? \(they have Bad\)"
    for labels in (["bad"], {"bad": ["Bad", "bad"]}):
        with pytest.raises(RunError, match=said):
            run_segment(stage(data, labels=labels), StageRun(tmp_path / "run"))
    with pytest.raises(RunError, match=r"label \(value 'Bad'\); they have none at all"):
        run_segment(stage(write(annotated(["good"]), "good")), StageRun(tmp_path / "run"))
    only = write(annotated([TEXTS[0], "good"]), "only")  # what marks anything is held out
    with pytest.raises(RunError, match="they have none at all"):
        run_segment(stage(only, eval_data=held_out), StageRun(tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("texts", "fields"),
    [
        (["good", "bad " * 2000], {}),
        (TEXTS, {"segments": {"by": "completion"}, "min_overlap": 0.5}),
    ],
)
def test_a_class_that_no_readable_segment_has_is_refused(stage, write, tmp_path, texts, fields) -> None:
    with pytest.raises(RunError, match="no segment of the texts that the model can read has the class bad"):
        run_segment(stage(write(annotated(texts)), **fields), StageRun(tmp_path / "run"))


def test_sentences_with_labels_are_learnt_as_spans_are(stage, write, talker, tmp_path) -> None:
    texts = ["I like it. the film was bad.", "the story was bad. bad", "it was good"]
    sentences = [
        [{"text": "I like it.", "label": None}, {"text": "the film was bad.", "label": "Bad"}],
        [{"text": "the story was bad.", "label": None}, {"text": "bad", "label": "Bad"}],
        [],
    ]
    spans = [[(11, 28)], [(19, 22)], []]
    marked = [[{"start": start, "end": end, "label": "Bad"} for start, end in row] for row in spans]
    by_sentence = write([{"text": t, "sentences": s} for t, s in zip(texts, sentences, strict=True)])
    by_span = write([{"text": t, "spans": s} for t, s in zip(texts, marked, strict=True)], "spans")
    tokenizer = AutoTokenizer.from_pretrained(talker)
    encoded = []
    for data in (by_sentence, by_span):
        given = stage(data, segments={"by": "sentence"}, min_overlap=0.5)
        encoded.append(encode_texts(given, read_texts(given, "data"), tokenizer, 1000).to_list())
    assert encoded[0] == encoded[1] and sum(row["labels"].count(1) for row in encoded[0]) == 2
    assert run_segment(stage(by_sentence), StageRun(tmp_path / "run"))["texts"] == 3


def test_what_cannot_be_read_of_a_held_out_text_is_missed(stage, write, talker) -> None:
    texts = ["it was bad", "bad " * 40]
    given = stage(write(annotated(texts)))
    rows = read_texts(given, "data")
    model = load_token_classifier(Pretrained(path=str(talker)), ("none", "bad"))
    head: Any = model
    torch.nn.init.zeros_(head.score.weight)
    head.score.bias.data = torch.tensor([0.0, 1.0])  # everything is bad
    tokenizer = AutoTokenizer.from_pretrained(talker)
    classifier = Classifier(head.eval(), tokenizer)
    classifier.longest = 20
    for by in ("token", "step"):
        cut = stage(write(annotated(texts)), segments={"by": by, **({"pattern": r"\s+"} if by == "step" else {})})
        found = judge(cut, classifier, rows, StageRun(Path()))
        assert [set(classes) for _, classes in found] == [{1}, {0}]
        short = sum(start < 10 and end > 7 for start, end in found[0][0])  # segments of the one "bad" that is read
        gold = short + sum(part[0] < part[1] and texts[1][slice(*part)].strip() != "" for part in found[1][0])
        scores = evaluate(cut, rows, found)
        assert scores["precision/bad"] == pytest.approx(short / len(found[0][0]))
        assert scores["recall/bad"] == pytest.approx(short / gold) and scores["recall/bad"] < 0.1


def test_a_segment_that_the_tokenizer_drops_is_judged_none(stage, write) -> None:
    class Dropping:
        """A classifier that leaves the second segment of every text out, and finds the others bad."""

        def __call__(self, prompts: Any, texts: Any, segments: Any, on_batch: Any) -> Any:
            kept = [[part for k, part in enumerate(parts) if k != 1] for parts in segments]
            return [(parts, torch.tensor([[0.0, 1.0]] * len(parts))) for parts in kept]

    given = stage(write(annotated(["bad bad it"])), segments={"by": "step", "pattern": r"\s+"})
    rows = read_texts(given, "data")
    found = judge(given, Dropping(), rows, StageRun(Path()))  # type: ignore[arg-type]
    assert found == [([(0, 3), (4, 7), (8, 10)], [1, 0, 1])]
    assert evaluate(given, rows, found)["recall/bad"] == 0.5


def test_data_without_spans_are_refused(stage, write, tmp_path) -> None:
    data = write([{"prompt": "a", "completion": "b"}])
    with pytest.raises(RunError, match="labels, and data has no text and no spans, only prompt, completion"):
        run_segment(stage(data), StageRun(tmp_path / "run"))


# --- loss ---


def test_balanced_weights_have_a_mean_of_1_over_segments_and_equal_sums_by_class(stage) -> None:
    labels = [[0, 0, 0, -100, 0, 1], [0, 0, -100, 0]]
    given = stage({"type": "jsonl", "path": "x"}, class_weights="balanced", labels=["bad"])
    weights = class_weights(given, labels)
    assert weights.tolist() == pytest.approx([8 / (2 * 7), 8 / 2])
    assert 7 * weights[0] + weights[1] == pytest.approx(8) and 7 * weights[0] == pytest.approx(weights[1].item())
    three = stage({"type": "jsonl", "path": "x"}, class_weights="balanced", labels=["bad", "unseen"])
    assert class_weights(three, labels)[2] == 1.0
    own = stage({"type": "jsonl", "path": "x"}, class_weights={"bad": 3.0})
    assert class_weights(own, labels).tolist() == [1.0, 3.0]


def test_the_loss_is_a_weighted_mean_over_the_segments_of_the_whole_update() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 2), torch.tensor([[0, -100, 1], [-100, -100, 1]])
    weights = torch.tensor([0.5, 2.0])
    log_probs = logits.log_softmax(dim=-1)
    expected = -(0.5 * log_probs[0, 0, 0] + 2 * log_probs[0, 2, 1] + 2 * log_probs[1, 2, 1])
    for count, divisor in ((None, 3), (6, 6), (torch.tensor(6), 6)):
        loss = segment_loss({"logits": logits}, labels, count, weights=weights)
        torch.testing.assert_close(loss, expected / divisor)


def test_accumulated_batches_train_as_one_does(stage, write, talker, tmp_path) -> None:
    data = write(annotated([*TEXTS, "it was bad", "good", "bad", "the bad and the good story"]))
    shutil.copytree(talker, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "classifier_dropout": 0.0}))
    start = load_token_classifier(Pretrained(path=str(tmp_path / "model")), ("none", "bad")).state_dict()
    moved = []
    for name, args in (("one", {"per_device_train_batch_size": 8}), ("two", {"gradient_accumulation_steps": 2})):
        given = stage(
            data,
            {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **args},
            model={"path": str(tmp_path / "model")},
            class_weights={"bad": 5.0},
        )
        run_segment(given, StageRun(tmp_path / name))
        after = AutoModelForTokenClassification.from_pretrained(tmp_path / name / "model").state_dict()
        moved.append({key: after[key] - value for key, value in start.items() if not key.startswith("score")})
    assert max(change.abs().max() for change in moved[0].values()) > 1e-3
    for key, change in moved[0].items():
        torch.testing.assert_close(change, moved[1][key], rtol=1e-3, atol=1e-5)
