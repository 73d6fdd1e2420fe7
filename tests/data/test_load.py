import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter, ValidationError

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import SampledCompletion, load_data

config = TypeAdapter(DataConfig).validate_python

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}", "answer": str(number)} for number in range(10)]


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, or text as it is, and gives the path."""

    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "\n".join(json.dumps(row) for row in content), "utf-8")
        return str(path)

    return write


def load(path, **fields):
    return load_data(config({"type": "jsonl", "path": path, **fields}))


def test_the_same_rows_from_every_kind_of_file(write, tmp_path):
    packed, table = tmp_path / "rows.jsonl.gz", tmp_path / "rows.parquet"
    packed.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    lines = load(write(ROWS)).to_list()
    assert lines == ROWS
    assert load(write(json.dumps(ROWS, indent=2), "rows.json")).to_list() == lines
    assert load(write("\n\n".join(json.dumps(row) for row in ROWS) + "\n", "gaps.jsonl")).to_list() == lines
    assert load(str(packed)).to_list() == lines
    assert load_data(config({"type": "parquet", "path": str(table)})).to_list() == lines


def test_a_hub_data_set_gets_the_same_treatment(write, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write([{"question": row["prompt"]} for row in ROWS], "folder.jsonl")
    data = load_data(config({"type": "hub", "path": str(tmp_path), "columns": {"prompt": "question"}, "skip": 8}))
    assert data.to_list() == [{"prompt": "p8"}, {"prompt": "p9"}]


def test_a_line_separator_inside_a_string_is_no_line_end(write):
    assert load(write('{"prompt": "one\u2028two"}\n'))["prompt"][0] == "one\u2028two"


def test_a_byte_order_mark_is_no_part_of_the_text(write):
    assert load(write('\ufeff{"prompt": "p"}')).to_list() == [{"prompt": "p"}]


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"rows.jsonl: it is no UTF-8 text from byte 12 on"):
        load(str(tmp_path / "rows.jsonl"))


def test_one_source_column_may_serve_several(write):
    path = write([{"question": "2 + 2?", "answer": "#### 4", "id": 1}])
    data = load(path, columns={"prompt": "question", "completion": "answer", "answer": "answer"})
    assert data.to_list() == [{"prompt": "2 + 2?", "completion": "#### 4", "answer": "#### 4", "id": 1}]


def test_columns_may_trade_names(write):
    data = load(write(ROWS[:1]), columns={"prompt": "completion", "completion": "prompt"})
    assert data.to_list() == [{"prompt": "c0", "completion": "p0", "answer": "0"}]


def test_skip_and_limit_cut_the_shuffled_rows(write):
    path = write(ROWS)
    shuffled = load(path, shuffle_seed=1)["prompt"][:]
    assert sorted(shuffled) == [row["prompt"] for row in ROWS]
    assert shuffled != [row["prompt"] for row in ROWS]
    assert shuffled != load(path, shuffle_seed=2)["prompt"][:]
    assert load(path, shuffle_seed=1, limit=4)["prompt"][:] == shuffled[:4]
    assert load(path, shuffle_seed=1, skip=4)["prompt"][:] == shuffled[4:]
    assert load(path, shuffle_seed=1, skip=4, limit=3)["prompt"][:] == shuffled[4:7]
    assert load(path, skip=2, limit=1)["prompt"][:] == ["p2"]


def test_the_template_wraps_the_prompt_and_leaves_other_braces(write):
    data = load(write(ROWS[:1]), prompt_template="Q: {prompt}\nUse \\boxed{}.\nA:")
    assert data[0]["prompt"] == "Q: p0\nUse \\boxed{}.\nA:"
    assert data[0]["completion"] == "c0"


def test_chat_turns_text_into_messages(write):
    rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No", "label": 1}]
    data = load(write(rows), chat=True, system="Be kind.", prompt_template="{prompt}!")
    assert data.to_list() == [
        {
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}],
            "chosen": [{"role": "assistant", "content": "Hello"}],
            "rejected": [{"role": "assistant", "content": "No"}],
            "label": True,
        }
    ]


def test_chat_leaves_conversations_as_they_are(write):
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}]
    assert load(write(rows), chat=True).to_list() == rows


@pytest.mark.parametrize(("given", "label"), [(True, True), (False, False), (1, True), (0, False), (1.0, True)])
def test_labels_become_booleans(write, given, label):
    data = load(write([{"prompt": "p", "completion": "c", "label": given}]))
    assert data["label"][0] is label


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


ANSWERS = [
    [call("f", a=1, deep={"x": [None, {"y": 2}]}), {"role": "tool", "name": "f", "content": "1"}],
    [call("g", b=True), {"role": "assistant", "content": [{"type": "text", "text": "ok"}]}],
]
TOOLS = [[{"type": "function", "function": {"name": name, "parameters": {name: {"type": "int"}}}}] for name in "fg"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_row_has_no_keys_of_other_rows(kind, write, tmp_path, monkeypatch):
    """A table gives all rows the same keys; a model must not read those that only other rows have."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers = [said[:1] for said in ANSWERS]
    rows = [
        {"question": [{"role": "user", "content": "q"}], "completion": said, "tools": tools, "answer": None}
        for said, tools in zip(answers, TOOLS, strict=True)
    ]
    path = tmp_path / f"rows.{kind}" if kind != "hub" else tmp_path
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(rows)
    data = load_data(config({"type": kind, "path": str(path), "columns": {"prompt": "question"}, "chat": True}))
    assert data["completion"][:] == answers
    assert data["tools"][:] == TOOLS
    assert data["answer"][:] == [None, None]  # of other columns a null is a value
    assert data.select([1]).to_list() == [data[1]]
    data.to_parquet(str(tmp_path / "written.parquet"))
    again = load_data(config({"type": "parquet", "path": str(tmp_path / "written.parquet")}))
    assert again.to_list() == data.to_list()


def test_calls_may_have_arguments_of_several_types(write):
    values = [(1, None), ("x", TOOLS[0])]
    rows = [{"prompt": "p", "completion": [call("f", a=value)], "tools": tools} for value, tools in values]
    data = load(write(rows), templates={"text": "{prompt}"}, columns={"copy": "completion", "completion": "completion"})
    assert data["completion"][:] == data["copy"][:] == [row["completion"] for row in rows]
    assert data["tools"][:] == [None, TOOLS[0]]


@pytest.mark.parametrize("fields", [{}, {"chat": True, "templates": {"x": "{prompt}"}}])
def test_other_columns_keep_their_types(fields, tmp_path):
    """Those that nothing here reads are as the file has them, also where a row's messages are not."""
    types = {"n": pyarrow.int8(), "at": pyarrow.timestamp("ms"), "vector": pyarrow.list_(pyarrow.float32())}
    values = {"n": [1, None], "at": [0, 1], "vector": [[0.5], []], "label": [1.0, 0.0], "completion": ANSWERS}
    arrays = {name: pyarrow.array(of, types.get(name)) for name, of in values.items() if name != "completion"}
    said = pyarrow.array([answer[:1] for answer in ANSWERS])
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], **arrays, "completion": said}), path)
    data = load_data(config({"type": "parquet", "path": path, "shuffle_seed": 1, **fields}))
    written = data.with_format("arrow")[:].schema
    assert {name: written.field(name).type for name in types} == types
    assert data.column_names == ["prompt", "n", "at", "vector", "label", "completion", *fields.get("templates", {})]
    assert sorted(data["completion"][:], key=str) == sorted((answer[:1] for answer in ANSWERS), key=str)
    assert data["label"][:] == [{1: True, None: False}[n] for n in data["n"]]


def test_every_message_has_a_content_though_it_be_null(write):
    said = [
        {"role": "assistant", "name": None},
        {"role": "tool", "content": [{"type": "text", "text": "1", "at": None}]},
    ]
    assert load(write([{"prompt": "p", "completion": said}]))["completion"][0] == [
        {"role": "assistant", "content": None},
        {"role": "tool", "content": [{"type": "text", "text": "1"}]},
    ]


GOOD = {"prompt": "p", "completion": "c", "label": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n" * 16 + '{"prompt": "p"', r"rows.jsonl, line 17, column \d+: broken JSON"),
        ('{"prompt": "p"}\n{"prompt": }', r"rows.jsonl, line 2, column 12: broken JSON"),
        ('[\n{"prompt": "p"},\n{"prompt": }]', r"rows.jsonl, line 3, column 12: broken JSON"),
        ('{"prompt": "p"}\n7', r"rows.jsonl, row 2: it is not an object with fields but 7"),
        ("", r"rows.jsonl: there are no rows"),
        ("[]", r"rows.jsonl: there are no rows"),
        (
            [{"question": "p", "answer": "a"}],
            r"rows.jsonl: there is no column 'prompt', only question, answer; .* columns: {prompt: question}",
        ),
        ([{"id": 1, "a": "b"}], r"there is no column 'prompt', only id, a; if another .* columns: {prompt: \.\.\.}"),
        ([GOOD, {"completion": "c"}], r"rows.jsonl, row 2: 'prompt' is neither text nor .* but None"),
        ([{"prompt": 7}], r"rows.jsonl, row 1: 'prompt' is neither text nor .* but 7"),
        ([{"prompt": []}], r"rows.jsonl, row 1: 'prompt' is neither text nor"),
        (
            [{"prompt": [{"role": "user", "content": "p"}]}, {"prompt": [{"role": "user", "content": 5}]}],
            r"rows.jsonl, row 2: 'prompt' has a message whose content is neither .* but 5",
        ),
        ([{**GOOD, "completion_ids": [1]}, {**GOOD, "completion_ids": []}], r"row 2: 'completion_ids' is empty, where"),
        ([{**GOOD, "chosen_ids": None}, {**GOOD, "chosen_ids": ["a"]}], r"row 2: 'chosen_ids' is \['a'\], where"),
        ([{**GOOD, "rejected_ids": 3}], r"row 1: 'rejected_ids' is 3, where"),
        ([{"prompt": [{"text": "p"}]}], r"rows.jsonl, row 1: 'prompt' is neither text nor"),
        ([GOOD, {**GOOD, "completion": None}], r"rows.jsonl, row 2: 'completion' is neither text nor"),
        ([{**GOOD, "label": 1}, {**GOOD, "label": 2}], r"rows.jsonl, row 2: 'label' .* not 2"),
        ([{**GOOD, "label": "true"}], r"rows.jsonl, row 1: 'label' .* not 'true'"),
        ([{**GOOD, "label": None}], r"rows.jsonl, row 1: 'label' .* not None"),
        (
            [GOOD, GOOD, {**GOOD, "prompt": 7}, GOOD],
            r"rows.jsonl, row 3: field 'prompt' is 7, .* another type",
        ),
        ([GOOD, {**GOOD, "completion": ["c"]}], r"rows.jsonl, row 2: field 'completion' is \['c'\]"),
    ],
)
def test_errors_name_the_file_the_row_and_the_field(write, content, message):
    with pytest.raises(ValueError, match=message):
        load(write(content))


def test_errors_count_rows_in_the_file_not_in_the_selection(write):
    path = write([*ROWS, {"prompt": None}])
    with pytest.raises(ValueError, match="row 11: 'prompt'"):
        load(path, shuffle_seed=3)
    with pytest.raises(ValueError, match="row 11: 'prompt'"):
        load(path, skip=9)
    assert len(load(path, limit=10)) == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"columns": {"prompt": "question"}},
            "maps 'prompt' to 'question', and there is only prompt, completion",
        ),
        ({"columns": {"prompt": "answer"}}, "there is a column 'prompt' already"),
        ({"skip": 10}, "no row is left of 10 after skip: 10"),
    ],
)
def test_selections_that_cannot_be_are_refused(write, fields, message):
    with pytest.raises(ValueError, match=message):
        load(write(ROWS), **fields)


def test_a_template_does_not_wrap_messages(write):
    path = write([{"prompt": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(ValueError, match="row 1: prompt_template wraps text, not messages"):
        load(path, prompt_template="Q: {prompt}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "gsm8k_solutions"])
def test_a_file_that_is_not_there_is_named(kind):
    with pytest.raises(ValueError, match=r"nowhere/rows: there is no such file"):
        load_data(config({"type": kind, "path": "nowhere/rows"}))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_template": "Q: {question}"},
        {"system": "Be kind."},
        {"limit": 0},
        {"unknown": 1},
    ],
)
def test_configurations_that_cannot_be_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        config({"type": "jsonl", "path": "rows.jsonl", **fields})


def solutions(number):
    keys = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    found = {key: {"is_correct": key[0] == "1", "solution": f"{key} on {number}"} for key in keys}
    return {"question": f"q{number}", "ground_truth": f"A: {number}", **found}


def test_gsm8k_splits_between_problems_never_inside_one(write):
    path = write([solutions(number) for number in range(20)])
    shared = {"type": "gsm8k_solutions", "path": path, "shuffle_seed": 0}
    held_out = load_data(config({**shared, "limit": 5}))
    training = load_data(config({**shared, "skip": 5}))
    assert len(held_out) == 20
    assert len(training) == 60
    assert len(set(held_out["prompt"])) == 5
    assert set(held_out["prompt"]) | set(training["prompt"]) == {f"q{number}" for number in range(20)}
    assert not set(held_out["prompt"]) & set(training["prompt"])


def test_gsm8k_pairs_have_the_columns_of_preference_data(write):
    path = write([solutions(7)])
    data = load_data(config({"type": "gsm8k_solutions", "path": path, "paired": True}))
    assert len(data) == 4
    assert data[0]["prompt"] == "q7"
    assert data[0]["chosen"] == "175b_finetuning on 7"
    assert data[0]["rejected"] == "6b_finetuning on 7"


def test_gsm8k_errors_name_the_row(write):
    broken = solutions(2)
    del broken["175b_finetuning"]
    with pytest.raises(ValueError, match="row 2: it lacks 175b_finetuning"):
        load_data(config({"type": "gsm8k_solutions", "path": write([solutions(1), broken])}))


def test_generated_tasks_load_with_their_columns():
    sums = load_data(config({"type": "running_sums", "size": 5, "terms": 3}))
    assert set(sums.column_names) == {"prompt", "completion", "answer", "steps"}
    assert [len(steps) for steps in sums["steps"]] == [3] * 5
    letters = load_data(config({"type": "reasoning_gym", "task": "letter_counting", "size": 5}))
    assert {"prompt", "completion", "answer", "reasoning_gym_entry"} <= set(letters.column_names)


SUMS = {"type": "running_sums", "size": 4, "terms": 2, "modulus": 11}
SAMPLED = {"type": "sampled", "model": "any", "prompts": SUMS, "verifier": "exact", "num_generations": 3}


def answers_and_mistakes(config, prompts):
    """For each prompt: its answer, a mistake, and its answer again."""
    texts = [[answer, f"{answer}0", f"so {answer}"] for answer in prompts["answer"]]
    return [[SampledCompletion(text, [7, len(text)]) for text in group] for group in texts]


def test_sampled_completions_are_labelled_by_the_verifier():
    data = load_data(config(SAMPLED), answers_and_mistakes)
    prompts = load_data(config(SUMS))
    assert data["prompt"][:] == [prompt for prompt in prompts["prompt"] for _ in range(3)]
    assert data["completion"][1] == f"{prompts['answer'][0]}0"
    for label, completion, answer in zip(data["label"], data["completion"], data["answer"], strict=True):
        assert label == (completion.split()[-1] == answer)
    assert data["steps"][:3] == [prompts["steps"][0]] * 3
    assert data["completion_ids"][:] == [[7, len(text)] for text in data["completion"]]


def test_sampled_completions_of_conversations_are_messages():
    chat = {**SAMPLED, "prompts": {**SUMS, "chat": True}}
    data = load_data(config(chat), answers_and_mistakes)
    assert data["prompt"][0][0]["role"] == "user"
    assert data["completion"][0] == [{"role": "assistant", "content": data["answer"][0]}]


def test_sampling_needs_a_sampler_that_keeps_its_word():
    with pytest.raises(ValueError, match="pass load_data a sampler"):
        load_data(config(SAMPLED))
    with pytest.raises(ValueError, match=r"gave \[2, 2, 2, 2\].* for 4 prompts, where 3 each"):
        load_data(config(SAMPLED), lambda config, prompts: [[SampledCompletion("a", [1])] * 2] * len(prompts))


def test_a_row_that_the_verifier_cannot_judge_is_an_error():
    wrong = {**SAMPLED, "verifier": "reasoning_gym"}
    with pytest.raises(ValueError, match="row 1: verifier 'reasoning_gym' cannot judge it"):
        load_data(config(wrong), answers_and_mistakes)
