"""samples.py: what the model writes for the report, what of it is covered, and that the run is the same with it."""

import copy
import re

import datasets
import pytest
import torch
from conftest import ROOT, make_dataset, tiny_gpt2
from mutation import catches
from transformers import AutoTokenizer, GenerationConfig

from author_dp.outputs.html_page import html_text_sections, make_html_page
from author_dp.outputs.samples import NUM_TEXTS, SEED, TextSamples, heldout_prompts, sample_rows
from author_dp.types import IGNORE_INDEX
from data_utils import AuthorDataset, group_by_author


class Tokenizer:
    """Each token is a word of its own."""

    bos_token_id, eos_token_id = None, 0

    def batch_decode(self, rows, **options):
        return [" ".join(f"w{token}" for token in row) for row in rows]


def made(held_out=None, **options) -> TextSamples:
    return TextSamples(Tokenizer(), held_out, sequence_len=16, **options)


def conversations(prompts: list[int]) -> AuthorDataset:
    """One sample of each author: so many tokens of a prompt, then three of an answer."""
    ids = [list(range(1, length + 4)) for length in prompts]
    labels = [[IGNORE_INDEX] * length + row[length:] for length, row in zip(prompts, ids)]
    return AuthorDataset(datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}), *group_by_author(range(len(ids))))


@catches("free texts as long as private prompts allow", "outputs.samples.TextSamples.write", "max(map(len, rows))",
    "max(len(row) for rows in self.prompts.values() for row in rows)")  # fmt: skip
def test_free_texts_hang_on_nothing_private():
    model, found = tiny_gpt2(), []
    for held_out in (None, make_dataset([2] * 9, seed=1), conversations([13, 2, 3, 4, 5]), make_dataset([1], longest=16)):
        samples = made(held_out)
        samples.write(model, "after")
        found.append(samples.found["free"]["after"])
    assert all(texts == found[0] for texts in found) and len(found[0]) == NUM_TEXTS and len(set(found[0])) > 1


@catches("texts for the report move the run's random numbers", "outputs.samples.sample_rows",
    "with own_config, deterministic_eval(model), torch.no_grad():", "with own_config, torch.no_grad():")  # fmt: skip
def test_the_run_is_the_same_with_them():
    model = tiny_gpt2()
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    config = model.generation_config.to_dict()
    samples = made(make_dataset([2] * 9))
    samples.write(model, "before")
    assert torch.equal(torch.get_rng_state(), random) and model.training and model.generation_config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # nothing was left that cannot be trained
    assert len(samples.found["continued"]["before"]) == NUM_TEXTS


def test_held_out_texts_go_on_where_they_begin():
    dataset = make_dataset([2] * 9)
    drawn = dataset.__getitems__([dataset.indices[start : start + 1] for start in dataset.offsets[:NUM_TEXTS]])
    first = [sample["input_ids"].tolist() for (sample,) in drawn]
    assert all(
        row[: len(begun)] == begun and 0 < len(begun) <= len(row) / 2 for row, begun in zip(first, heldout_prompts(dataset, 16))
    )
    prompts = heldout_prompts(conversations([15, 40, 3, 4, 5]), 16)  # the second leaves no room for an answer
    assert prompts == [list(range(1, length + 1)) for length in (15, 3, 4, 5)]


def test_a_model_of_answers_writes_no_free_texts():
    samples = made(conversations([3, 4]), answers=True)
    samples.write(tiny_gpt2(), "after")
    assert samples.found.keys() == {"continued"} and len(samples.found["continued"]["after"]) == 2


def test_texts_end_where_the_model_ends_them():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(1e5 * model.lm_head.weight[0])  # token 0 always: the end
    samples = made()
    samples.write(model, "after")
    assert samples.found["free"]["after"] == [""] * NUM_TEXTS


def test_they_are_what_the_model_has_likely_not_what_its_folder_asks_for():
    """Token by token, from its probabilities, whatever its generation_config says, and without dropout."""
    model, rows = tiny_gpt2(dropout=0.5), [[1, 2], [3, 4]]
    own = GenerationConfig(num_beams=3, num_return_sequences=2, temperature=0.1, suppress_tokens=[5, 6], min_p=0.5)
    model.generation_config = own
    written = sample_rows(model.train(), rows, 6, None)
    assert model.generation_config is own
    begun = torch.tensor(rows)
    torch.manual_seed(SEED)
    for _ in range(6):
        with torch.no_grad():
            likely = model.eval()(begun).logits[:, -1].float().softmax(-1)
        begun = torch.cat([begun, torch.multinomial(likely, 1)], 1)
    assert written == begun[:, 2:].tolist()


def test_a_model_that_cannot_write_ends_no_run():
    model = tiny_gpt2()
    model.generate = lambda **_: 1 / 0
    samples = made(make_dataset([2] * 9))
    samples.write(model, "after")
    assert html_text_sections(samples.found, covered=True) == [] and model.training is tiny_gpt2().training


FOUND = {
    "free": {"before": ["a"], "after": ["<script>"]},
    "continued": {"prompts": ["they & wrote"], "before": ["b"], "after": ["c"]},
}


@catches("what held-out authors wrote called covered", "outputs.html_page.html_text_sections", '"kind": PRIVATE',
    '"kind": COVERED if covered else PRIVATE', covered=True)  # fmt: skip
@catches("text of a model without a guarantee called covered", "outputs.html_page.html_text_sections",
    "COVERED if covered else PRIVATE",
    "COVERED", covered=False)  # fmt: skip
@pytest.mark.parametrize("covered", [True, False])
def test_only_free_texts_of_a_model_with_a_guarantee_are_called_covered(covered):
    kinds = [section["kind"] for section in html_text_sections(FOUND, covered)]
    assert kinds == ["covered" if covered else "private", "private"]


def html_page(title: str = "run", alarm: str = "") -> str:
    report = {"epsilon": None, "disable_dp": not alarm, "alarm": alarm}
    return make_html_page(title, report, {}, {"specimens": FOUND})


def test_marks_stand_on_the_page():
    assert ["private: do not publish" in fold for fold in re.findall(r"<summary>(.*?)</summary>", html_page(), re.S)] == [
        True
    ] * 2


def test_what_is_written_is_no_html():
    for html in (html_page(), html_page(title="<script>"), html_page(alarm="<script>")):
        assert "<script>" not in html and "&lt;script&gt;" in html and "they &amp; wrote" in html


def test_texts_begin_with_the_start_token_or_else_the_end_of_text():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model", local_files_only=True)
    samples = TextSamples(tokenizer, None, 64)
    assert samples.prompts["free"] == [[tokenizer.eos_token_id]] * NUM_TEXTS
    tokenizer.bos_token = tokenizer.decode([5])
    assert TextSamples(tokenizer, None, 64).prompts["free"] == [[5]] * NUM_TEXTS
