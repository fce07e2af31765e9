"""tokenization.py and AuthorDataset: tokens of texts, cut and padded."""

import json
import tempfile

import datasets
import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainingArguments

from author_dp.data.chat import resolve_bos_token
from author_dp.data.splits import format_data_summary
from author_dp.data.tokenization import tokenize
from author_dp.errors import UserError
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_author_datasets, load_train_and_eval

# --- tokens -------------------------------------------------------------------------------------------


def test_tokenize_cuts_adds_nothing_and_drops_what_predicts_nothing(caplog):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    texts = ["My dog got lazy after I walked it", "", "I", None, "Hello there, a long text " * 50]
    samples = datasets.Dataset.from_dict({"user": list("abcde"), "body": texts})
    tokens = tokenize(samples, tokenizer, text_column="body", sequence_len=20)
    assert tokens["user"][:] == ["a", "e"]
    assert tokens["input_ids"][:] == [tokenizer(text)["input_ids"][:20] for text in (texts[0], texts[4])]
    assert len(tokenizer(texts[4])["input_ids"]) > 20  # the tokenizer that is saved does not cut
    with pytest.raises(UserError, match="--text_column"):
        tokenize(samples.select([1, 2, 3]), tokenizer, text_column="body", sequence_len=20)


def small_tokenizer(start: bool) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c", "<", "/", "s", ">"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([Whitespace(), Split("", "isolated")])
    if start:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def ids_of(texts, tokenizer, **options) -> list[list[int]]:
    samples = Dataset.from_dict({"user": [str(i) for i in range(len(texts))], "body": texts})
    return tokenize(samples, tokenizer, text_column="body", sequence_len=4, **options)["input_ids"][:]


@pytest.mark.parametrize("more", [{}, {"append_eos": True}, {"append_eos": True, "long_samples": "split"}])
def test_a_text_begins_with_a_token_where_that_is_asked_for(more):
    texts = ["a b", "a b c a b", "a b c", "a"]
    plain, starting = small_tokenizer(start=False), small_tokenizer(start=True)
    asked = ids_of(texts, plain, prepend_bos=True, **more)
    assert asked == ids_of(texts, starting, **more) == ids_of(texts, starting, prepend_bos=True, **more)  # never two
    assert DataArguments(train_file=["a"], prepend_bos=True).summary(plain)["start_token"] == "<s>"


def test_the_start_token_is_the_tokenizers_own_and_the_end_is_asked_for():
    plain, starting = small_tokenizer(start=False), small_tokenizer(start=True)
    texts = ["a b", "a b c a b", "a b c"]
    assert ids_of(texts, plain) == [[3, 4], [3, 4, 5, 3], [3, 4, 5]]
    assert ids_of(texts, starting) == [[1, 3, 4], [1, 3, 4, 5], [1, 3, 4, 5]]
    assert ids_of(texts, starting, append_eos=True) == [[1, 3, 4, 2], [1, 3, 4, 5], [1, 3, 4, 5]]
    assert ids_of(texts, plain, append_eos=True) == [[3, 4, 2], [3, 4, 5, 3], [3, 4, 5, 2]]
    split = ids_of(texts[1:2], starting, append_eos=True, long_samples="split")
    assert split == [[1, 3, 4, 5], [1, 3, 4, 2]]
    split = ids_of(["a b c", "a b c a b c"], starting, append_eos=True, long_samples="split")  # no end stands alone
    assert split == [[1, 3, 4], [1, 5, 2], [1, 3, 4, 5], [1, 3, 4], [1, 5, 2]]
    assert ids_of(["a b c a b"], plain, long_samples="split") == [[3, 4, 5], [3, 4]]
    assert ids_of(["a"], starting) == [[1, 3]]  # one token is something to predict, after a start
    notes = DataArguments(train_file=["a"], append_eos=True).summary(starting)
    assert (notes["start_token"], notes["end_token"]) == ("<s>", "</s>") and len(format_data_summary(notes)) == 2


@pytest.mark.parametrize("start", [False, True])
def test_the_spelling_of_a_special_token_is_text(start):
    tokenizer = small_tokenizer(start)
    for options in ({}, {"long_samples": "split"}):
        (row,) = ids_of(["</s>"], tokenizer, **options)[:1]
        assert 2 not in row and row[-1] in (7, 8, 9)
    assert tokenizer("a </s>", add_special_tokens=False)["input_ids"] == [3, 2]  # the tokenizer is left as it was


def test_gpt2_adds_nothing_and_takes_no_text_for_its_end(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert resolve_bos_token(tokenizer) is None
    samples = Dataset.from_dict({"user": ["a"], "body": ["say <|endoftext|> now"]})
    (row,) = tokenize(samples, tokenizer, text_column="body", sequence_len=64)["input_ids"][:]
    assert tokenizer.eos_token_id not in row and tokenizer.decode(row) == "say <|endoftext|> now"


def test_short_evaluation_texts_blame_no_other_file(checkpoint):
    samples = Dataset.from_dict({"user": ["a"], "body": ["x"]})
    with pytest.raises(UserError, match=r"^--validation_file: no text"):
        tokenize(
            samples, AutoTokenizer.from_pretrained(checkpoint), text_column="body", sequence_len=8, option="--validation_file"
        )


def test_split_keeps_every_token_with_its_author():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    texts = ["one two three four five six seven", "", "eight nine", "ten " * 40]
    samples = datasets.Dataset.from_dict({"user": ["a", "b", "c", "a"], "body": texts})
    options = {"text_column": "body", "sequence_len": 4}
    pieces = tokenize(samples, tokenizer, **options, long_samples="split")
    assert max(map(len, pieces["input_ids"])) == 4 and min(map(len, pieces["input_ids"])) >= 2
    for author in "ac":
        ids = [i for user, row in zip(pieces["user"], pieces["input_ids"]) if user == author for i in row]
        whole = [i for user, text in zip("abca", texts) if user == author for i in tokenizer(text)["input_ids"]]
        assert ids == whole[: len(ids)] and len(whole) - len(ids) < 2  # a last piece of one token predicts nothing
    truncated = tokenize(samples, tokenizer, **options)
    assert truncated["user"][:] == ["a", "c", "a"] and set(pieces["user"]) == {"a", "c"}


@pytest.mark.integration
def test_several_processes_tokenize_as_one_does():
    texts = ["a b", "a", "a b c a b c a", "c c"] * 3
    one, three = (ids_of(texts, small_tokenizer(start=False), num_proc=n, long_samples="split") for n in (None, 3))
    assert one == three and len(one) == 12


def test_loaded_data_leave_their_tokens_on_disk_alone(tmp_path, monkeypatch):
    """One copy, of tokens: no text is kept, nor a second copy of a split or of a cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"author": f"u{i}", "content": f"sentence number {i}"}) + "\n" for i in range(300)))
    args, tokenizer = DataArguments(train_file=[str(path)], eval_fraction=0.2), AutoTokenizer.from_pretrained(ROOT / "demo/model")
    train, evaluation = load_author_datasets(args, TrainingArguments(str(tmp_path / "out"), use_cpu=True), tokenizer)
    (folder,) = tmp_path.glob("author-texts-*")
    assert {path.suffix for path in folder.iterdir()} == {"", ".arrow"} and len(list(folder.iterdir())) == 3
    assert all(b"sentence" not in path.read_bytes() for path in folder.iterdir())
    assert len(train) + len(evaluation) == 300 and folder.stat().st_mode & 0o077 == 0
    assert {*map(tokenizer.decode, train["input_ids"])} | {*map(tokenizer.decode, evaluation["input_ids"])} == {
        f"sentence number {i}" for i in range(300)
    }


def test_author_dataset_fetches_the_drawn_samples():
    tokens = [[i, i + 1] + [9] * (i % 3) for i in range(20)]
    dataset = AuthorDataset(datasets.Dataset.from_dict({"input_ids": tokens}), *group_by_author(list("ab" * 10)))
    assert len(dataset) == 2
    fetched = dataset.__getitems__([np.array([3, 17]), np.array([0]), np.array([4, 4, 19])])
    assert [[row["input_ids"].tolist() for row in rows] for rows in fetched] == [
        [tokens[3], tokens[17]], [tokens[0]], [tokens[4], tokens[4], tokens[19]]
    ]  # fmt: skip
    assert dataset.__getitems__([]) == []


def test_author_dataset_after_a_selection():
    samples = datasets.Dataset.from_dict({"input_ids": [[i, i] for i in range(10)]}).select([7, 2, 5])
    fetched = AuthorDataset(samples, *group_by_author([0, 0, 1])).__getitems__([np.array([2, 0])])
    assert [row["input_ids"].tolist() for row in fetched[0]] == [[5, 5], [7, 7]]


def test_padding_is_on_the_right_and_in_no_label():
    batch = collate([{"input_ids": [5, 6, 7], "user": "a"}, {"input_ids": np.array([8, 0])}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 0, -100]]


def test_a_row_limit_that_leaves_one_author_is_to_blame_for_it(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"author": f"a{i // 2}", "content": "some text"}) + "\n" for i in range(6)))
    options = {"train_file": [str(path)], "eval_fraction": 0.0}
    with pytest.raises(UserError, match="--max_train_samples 2: it leaves rows of one author"):
        load_train_and_eval(DataArguments(**options, max_train_samples=2), seed=1)
    assert len(load_train_and_eval(DataArguments(**options, max_train_samples=3), seed=1)[0]) == 3
