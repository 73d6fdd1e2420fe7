"""The `segment` stage: a segment reward model from annotated spans, a token classification model in every respect."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from rlhf_kit.data.annotations import labels_of, ranges_of, segment_labels
from rlhf_kit.data.load import load_data
from rlhf_kit.data.messages import completion_text, prompt_text
from rlhf_kit.errors import RunError
from rlhf_kit.evals.spans import agreement, lexicon, lexicon_spans, marked, mean_char_f1
from rlhf_kit.models.classifiers import Classifier, check_tokenizer, encode, load_token_classifier, longest_input, pad
from rlhf_kit.models.loading import load_tokenizer
from rlhf_kit.rewards.segment_model import SEGMENT_RECORD
from rlhf_kit.rollout import CharRange
from rlhf_kit.trainers.config import Segment
from rlhf_kit.trainers.export import upload, write_model
from rlhf_kit.trainers.setup import StageRun, build_args, train

logger = logging.getLogger(__name__)

NONE = "none"
IGNORED = -100


@dataclass(frozen=True)
class Annotated:
    """One annotated text: what stands before it, and its spans."""

    prompt: str
    text: str
    spans: Sequence[Mapping[str, Any]]


def run_segment(stage: Segment, run: StageRun) -> dict[str, Any]:
    """Train the model, write `model/` with `segments.json`, and return the stage's results.

    Raises:
        RunError: the data have no annotated texts, none that the model can read, or none with a label or a class that
            is to be learnt.
    """
    args = build_args(TrainingArguments, run, stage.trainer.args, remove_unused_columns=False, label_names=["labels"])
    set_seed(args.seed)
    tokenizer = load_tokenizer(stage.model)
    check_tokenizer(tokenizer)
    held_out = read_texts(stage, "eval_data") if stage.eval_data is not None else []
    rows = without(read_texts(stage, "data"), held_out)
    unknown = [str(problem) for problem in stage.unknown_labels(labels_of(row.spans for row in rows))]
    if unknown:
        raise RunError("\n".join(unknown))
    model = load_token_classifier(stage.model, (NONE, *stage.classes), stage.layers)
    longest = longest_input(cast(nn.Module, model), tokenizer)
    encoded = encode_texts(stage, rows, tokenizer, longest)
    check_classes(stage, encoded["labels"][:])
    evaluates = bool(held_out) and args.eval_strategy != "no"
    weights = class_weights(stage, encoded["labels"][:])
    trainer = Trainer(
        model=cast(nn.Module, model),
        args=args,
        train_dataset=cast(Any, encoded),
        eval_dataset=cast(Any, encode_texts(stage, held_out, tokenizer, longest)) if evaluates else None,
        processing_class=tokenizer,
        data_collator=partial(_collate, tokenizer=tokenizer),
        compute_loss_func=partial(segment_loss, weights=weights),
        callbacks=list(run.callbacks),
    )
    train(trainer, run)
    export_classifier(stage, trainer, tokenizer, run.folder / "model")
    results: dict[str, Any] = {"updates": trainer.state.global_step, "texts": len(encoded)}
    if held_out:
        network = cast(nn.Module, trainer.accelerator.unwrap_model(trainer.model)).eval()
        size = args.per_device_eval_batch_size
        classifier = Classifier(network, tokenizer, size, lambda: trainer.accelerator.autocast())
        found = judge(stage, classifier, held_out, run)
        scores = evaluate(stage, held_out, found)
        results |= {f"eval_{name}": value for name, value in scores.items()}
        trainer.log({f"eval_{name}": value for name, value in scores.items()})
        results["baselines"] = baselines(stage, rows, held_out, [parts for parts, _ in found])
    return results


# --- data ---


def read_texts(stage: Segment, field: str) -> list[Annotated]:
    """The annotated texts of `data` or `eval_data`, each behind its prompt if the stage reads it.

    Raises:
        RunError: there is no column of texts, or none of spans.
    """
    data = load_data(getattr(stage, field))
    missing = [name for name in ("text", "spans") if name not in data.column_names]
    if missing:
        raise RunError(
            f"segment learns from texts with spans, or with sentences that have labels, and {field} has no "
            f"{' and no '.join(missing)}, only {', '.join(data.column_names)}: name them in {field}.columns, as in "
            "{text: completion}"
        )
    template = stage.prompt_template
    return [
        Annotated(
            template.replace("{prompt}", prompt_text(row["prompt"])) if template and row["prompt"] else "",
            completion_text(row["text"]),
            row["spans"],
        )
        for row in data.to_list()
    ]


def without(rows: Sequence[Annotated], held_out: Sequence[Annotated]) -> list[Annotated]:
    """The rows whose text is not that of a held-out row, so that none is judged that was learnt."""
    judged = {(row.prompt, row.text) for row in held_out}
    kept = [row for row in rows if (row.prompt, row.text) not in judged]
    if len(kept) < len(rows):
        logger.warning("%d rows of data are texts of eval_data too, and are left out", len(rows) - len(kept))
    return kept


def encode_texts(
    stage: Segment, rows: Sequence[Annotated], tokenizer: PreTrainedTokenizerBase, longest: int
) -> Dataset:
    """Inputs of each text, with the class of each segment at its last token and -100 elsewhere, and its `length`.

    Raises:
        RunError: no text is left that the model can read.
    """
    encoded: list[dict[str, Any]] = []
    for row in rows:
        found = encode(tokenizer, row.prompt, row.text)
        if not found.tokens or len(found) > longest:
            continue
        labels = [IGNORED] * len(found)
        if stage.segments.by == "token":
            ends = found.parts
        else:
            ends = [(part, found.last_token(part)) for part in stage.segments.within(row.text)]
        classes = segment_labels([part for part, _ in ends], row.spans, stage.marks, stage.min_overlap)
        for (_, token), label in zip(ends, classes, strict=True):
            if token is not None:
                labels[token] = label
        encoded.append({**found.inputs, "labels": labels, "length": len(found)})
    if len(encoded) < len(rows):
        left_out = len(rows) - len(encoded)
        logger.warning("%d texts are empty or longer than the %d tokens that the model reads", left_out, longest)
    if not encoded:
        raise RunError(f"none of the {len(rows)} texts can be read by the model, whose limit is {longest} tokens")
    return Dataset.from_list(encoded)


def check_classes(stage: Segment, labels: Sequence[Sequence[int]]) -> None:
    """Refuse a class that no segment has to learn from.

    Raises:
        RunError: with these classes.
    """
    given = {label for row in labels for label in row}
    missing = [name for k, name in enumerate(stage.classes, start=1) if k not in given]
    if missing:
        raise RunError(
            f"no segment of the texts that the model can read has the class {' or '.join(missing)}: its spans are in "
            "texts that are too long, or cover too little of the segments (min_overlap), or others cover more"
        )


def _collate(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    return pad([{name: value for name, value in row.items() if name != "length"} for row in rows], tokenizer)


# --- loss ---


def class_weights(stage: Segment, labels: Sequence[Sequence[int]]) -> Float[Tensor, "K"]:
    """Weight of each class: 1, the recipe's, or (`balanced`) `N / (K * n_k)`, whose mean over segments is 1.

    A class that does not occur weighs 1.
    """
    names = (NONE, *stage.classes)
    if isinstance(stage.class_weights, dict):
        return torch.tensor([stage.class_weights.get(name, 1.0) for name in names])
    if stage.class_weights == "none":
        return torch.ones(len(names))
    given = torch.tensor([label for row in labels for label in row if label != IGNORED])
    counts = torch.bincount(given, minlength=len(names)).float()
    return torch.where(counts > 0, len(given) / (len(names) * counts.clamp(min=1)), 1.0)


def segment_loss(
    outputs: Any,
    labels: Int[Tensor, "B T"],
    num_items_in_batch: Tensor | int | None = None,
    *,
    weights: Float[Tensor, "K"],
) -> Float[Tensor, ""]:
    """Weighted cross-entropy at the segments' last tokens, a mean over those of the whole update."""
    logits = outputs["logits"].float().flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels.flatten(), weights.to(logits), reduction="sum")
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


# --- evaluation ---

Verdicts = list[tuple[list[CharRange], list[int]]]


def judge(stage: Segment, classifier: Classifier, rows: Sequence[Annotated], run: StageRun) -> Verdicts:
    """Each text's segments and the likeliest class of each: none where the model could not read it.

    It reads no text that is too long, and no segment of which its tokenizer leaves nothing.
    """
    segments = [None if stage.segments.by == "token" else stage.segments.within(row.text) for row in rows]
    prompts, texts = [row.prompt for row in rows], [row.text for row in rows]
    found = classifier(prompts, texts, segments, run.on_batch("evaluation"))
    verdicts: Verdicts = []
    for row, parts, verdict in zip(rows, segments, found, strict=True):
        classes = [] if verdict is None else verdict[1].argmax(dim=-1).tolist()
        if parts is None and verdict is not None:
            verdicts.append((verdict[0], classes))
            continue
        read = {} if verdict is None else dict(zip(verdict[0], classes, strict=True))
        parts = _own_tokens(classifier, row) if parts is None else parts
        verdicts.append((parts, [read.get(part, 0) for part in parts]))
    return verdicts


def _own_tokens(classifier: Classifier, row: Annotated) -> list[CharRange]:
    return [part for part, _ in encode(classifier.tokenizer, row.prompt, row.text).parts]


def evaluate(stage: Segment, rows: Sequence[Annotated], found: Verdicts) -> dict[str, float]:
    """Character F1 of all spans (SemEval-2021 task 5), and precision, recall and F1 of each class over segments."""
    predicted = [label for _, labels in found for label in labels]
    gold = _gold(stage, rows, [parts for parts, _ in found])
    scores: dict[str, float] = {}
    anything = [[int(label > 0) for label in labels] for _, labels in found]
    ours = [marked(row.text, parts, labels, 1) for row, (parts, _), labels in zip(rows, found, anything, strict=True)]
    scores["char_f1"] = mean_char_f1(ours, annotated_ranges(stage, rows))
    for k, name in enumerate(stage.classes, start=1):
        of_class = agreement(predicted, gold, k)
        scores |= {
            f"precision/{name}": of_class.precision,
            f"recall/{name}": of_class.recall,
            f"f1/{name}": of_class.f1,
        }
    return scores


def baselines(
    stage: Segment, rows: Sequence[Annotated], held_out: Sequence[Annotated], segments: Sequence[list[CharRange]]
) -> dict[str, dict[str, float]]:
    """What needs no model: to mark nothing, each class everywhere, and the words of a lexicon of the training texts.

    The lexicon's character F1 is that of its words themselves, wherever the segments end.
    """
    found: dict[str, dict[str, float]] = {}
    for k, name in enumerate((NONE, *stage.classes)):
        everywhere = [(parts, [k] * len(parts)) for parts in segments]
        found["nothing" if k == 0 else f"all {name}"] = evaluate(stage, held_out, everywhere)
    texts = [row.text for row in rows]
    words = [lexicon(texts, [ranges_of(row.spans, labels) for row in rows]) for labels in stage.marks]
    by_words: Verdicts = []
    its_own = []
    for row, parts in zip(held_out, segments, strict=True):
        spans = [
            {"start": start, "end": end, "label": name}
            for name, own in zip(stage.classes, words, strict=True)
            for start, end in lexicon_spans(row.text, own)
        ]
        by_words.append((parts, segment_labels(parts, spans, [(name,) for name in stage.classes], stage.min_overlap)))
        words_found = ranges_of(spans, stage.classes)
        its_own.append(marked(row.text, words_found, [1] * len(words_found), 1))
    found["lexicon"] = evaluate(stage, held_out, by_words)
    found["lexicon"]["char_f1"] = mean_char_f1(its_own, annotated_ranges(stage, held_out))
    return found


def annotated_ranges(stage: Segment, rows: Sequence[Annotated]) -> list[list[CharRange]]:
    """The characters of each text that have one of the classes."""
    marks = [label for labels in stage.marks for label in labels]
    return [ranges_of(row.spans, marks) for row in rows]


def _gold(stage: Segment, rows: Sequence[Annotated], segments: Sequence[list[CharRange]]) -> list[int]:
    pairs = zip(rows, segments, strict=True)
    return [k for row, parts in pairs for k in segment_labels(parts, row.spans, stage.marks, stage.min_overlap)]


# --- export ---


def export_classifier(stage: Segment, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model whole: `AutoModelForTokenClassification.from_pretrained` loads it; an adapter is merged in.

    Beside it stands how it cuts texts, and the form in which it reads prompts.
    """
    accelerator = trainer.accelerator
    state = cast(dict[str, Tensor], accelerator.get_state_dict(trainer.model_wrapped))
    if accelerator.is_main_process:
        model = cast(Any, accelerator.unwrap_model(trainer.model))
        if isinstance(model, PeftModel):
            from rlhf_kit.models.zero3 import load_undivided

            classes = (NONE, *stage.classes)
            loaded: Any = load_undivided(
                lambda: cast(nn.Module, load_token_classifier(stage.model, classes, stage.layers))
            )
            loaded.load_state_dict(state)
            model = loaded.merge_and_unload()
            state = dict(model.state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        record = {"segments": stage.segments.model_dump(mode="json"), "prompt_template": stage.prompt_template}
        (folder / SEGMENT_RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        write_model(model, folder, tokenizer, state)
        upload(trainer, folder)
    accelerator.wait_for_everyone()
