"""From prompts to rows to train on: preference pairs, single completions with labels, or answers to imitate.

A `pairs` stage has a `builder`, which says how rows are made; everything else is the same for all of them (`stage`):
prompts are worked off in chunks; each finished chunk is a file of its own, so that a kill loses at most one; chunks are
shared out among the processes; the seed of a chunk follows from the recipe's seed, the round and the chunk's number
alone, so that neither kills nor the number of processes change a row; at the end the main process puts the chunks
together, lets the builder choose, and writes `paired`, `unpaired`, `sft` or `completions` as Parquet or JSON lines.

To add a builder, write one file `pairs/<type>.py` and name its configuration in `pairs/builders.py`. The file holds

- its configuration, a `BuilderBase` with `type: Literal["..."]`. It says which fields of the stage it `needs` and which
  it `may_use` (`model`, `rewards`, `select`, `length_debias`; `data` and `generation` are there always), which
  `columns` of the data it reads, which `outputs` it writes, what cannot work (`problems`) and which `files` it reads.
  It imports without torch; `build(context)` imports what it needs.
- its class, a `Builder` with `build_rows(prompts, first)`, which gives the rows of a chunk of prompts, and, where what
  is written is a choice among all rows, `finish(rows)`. Without `finish` the rows are the `paired` rows as they are.

A builder that asks which of two completions is better derives both from `compared`, and defines `compare` alone.

What a builder can count on and must keep:

- `prompts` are rows of the data, whole (`prompt` and all other columns); `first` is the number of the first of them.
  Every row that it gives has `prompt_index`, the number of its prompt: a row of another chunk is an error. A prompt may
  give any number of rows, also none.
- Rows are made of what Parquet and JSON know: numbers, text, lists, messages. They come back from a file before
  `finish` sees them. Columns named `prompt, chosen, rejected` or `prompt, completion, label` are
  TRL's; trainers ignore further ones.
- Python's, numpy's and torch's random numbers are seeded before each chunk. Nothing else may make a row depend on what
  was done before: no state from chunk to chunk.
- `context` (`context.PairsContext`) gives the model, its tokenizer, the scorer of `rewards`, samples and judges. All of
  them are loaded when they are first asked for; a builder asks for none when it is built, for `finish` runs also where
  nothing is left to do but to choose.
- `finish` runs in the main process alone, so that it must not talk to the others. `rows.with_lineage` adds where rows
  come from; `rows.unpaired_rows` makes KTO's rows of paired ones.
"""
