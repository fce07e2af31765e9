"""Test that microbatches have constant shapes, and that an author's norm has the same bits whoever else is there."""

import datasets
import numpy as np
import pytest
import torch
from conftest import VOCABULARY, as_arrays, make_dataset, make_trainer, sample, tiny_gpt2, train, trainable
from families import make_engine, make_model
from mutation import catches

from author_dp.clipping.factor_store import total_norms
from author_dp.clipping.norms import SquaredNorm, squared_norms
from author_dp.data.splits import author_hashes
from author_dp.errors import UserError
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import MicrobatchShape, is_real, make_microbatch_shape, make_microbatches
from data_utils import AuthorDataset, collate, group_by_author

SHAPE = MicrobatchShape(authors=4, samples=1, lengths=(4, 8, 16))
NOT_FINITE = VOCABULARY - 1  # the token whose embedding is nan


def author(*lengths: int, seed: int = 0) -> list[dict]:
    """Return an author with samples of these numbers of random tokens."""
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(1, NOT_FINITE, length).astype(np.int32)} for length in lengths]


@pytest.mark.parametrize(
    ("options", "authors", "lengths"),
    [
        ((8, 32, 1, 128), 8, (16, 24, 32, 48, 64, 96, 128)),
        ((32, 2, 1, 128), 8, (16, 24, 32, 48, 64, 96, 128)),
        ((128, 8, 1, 100), 64, (13, 19, 25, 38, 50, 75, 100)),
        ((30, 5, 2, 7), 9, (1, 2, 3, 4, 6, 7)),
        ((1, 1, 1, 1), 1, (1,)),
        ((2**31, 4, 1, 8), 256, (1, 2, 3, 4, 6, 8)),
    ],
)
def test_make_microbatch_shape_follows_from_options(options, authors, lengths):
    assert make_microbatch_shape(*options) == (authors, options[2], lengths)


@catches("as many rows as authors", "mechanism.microbatches.make_microbatch", "shape.authors - len(authors)", "0", k=1)
@catches("as many rows as samples", "mechanism.microbatches.make_microbatch", "(shape.samples - len(samples))",
    "(1 - len(samples))", k=3)  # fmt: skip
@catches("as long as the longest sample", "mechanism.microbatches.make_microbatch",
    '(0, length - batch["input_ids"].shape[1])', "(0, 0)", k=1)  # fmt: skip
@catches("lengths that follow from the batch", "mechanism.microbatches.group_by_length", "longest = longest_length(samples)",
    "longest = max(map(longest_length, authors))", k=1)  # fmt: skip
@pytest.mark.parametrize("k", [1, 3])
def test_make_microbatches_fills_up_the_shape_and_keeps_every_sample(k):
    shape = SHAPE._replace(samples=k)
    rng = np.random.default_rng(0)
    authors = [author(*rng.integers(1, 17, rng.integers(1, k + 1)), seed=i) for i in range(23)]
    microbatches = make_microbatches(authors, 64, collate, shape)
    seen = []
    for batch in microbatches:
        assert batch["num_authors"] == shape.authors and len(batch["input_ids"]) == shape.authors * k
        assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[1] in shape.lengths
        real = as_arrays(batch)[: shape.authors - batch["num_dummies"]]
        assert is_real(batch).sum() == len(real) > 0
        longest = [max(len(ids) for ids in samples) for samples in real]
        assert all(next(t for t in shape.lengths if t >= n) == batch["input_ids"].shape[1] for n in longest)
        dummies = ~is_real(batch)[batch["author"]]
        assert (batch["labels"][dummies] == -100).all() and batch["author"].tolist() == np.arange(shape.authors).repeat(
            k
        ).tolist()
        seen += [[ids.tolist() for ids in samples if len(ids)] for samples in real]
    assert sorted(seen) == sorted([sample["input_ids"].tolist() for sample in samples] for samples in authors)


def test_make_microbatches_refuses_a_sample_beyond_the_longest_length():
    with pytest.raises(UserError, match="a sample has 17 tokens"):
        make_microbatches([author(17)], 4, collate, SHAPE)


def test_trainer_refuses_samples_beyond_its_sequence_len_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"a sample is longer than 16 tokens. Give sequence_len=\d\d"):
        make_trainer(tmp_path, dataset=make_dataset([1] * 9, longest=20))


def seen_of(model, engine, authors: list, row: int, shape: MicrobatchShape, bf16: bool) -> tuple[float, float]:
    """Return loss and norm of one author of a batch in which all have the same length."""
    batch = make_microbatches(authors, shape.authors, collate, shape)[row // shape.authors]
    for parameter in trainable(model).values():
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = author_losses(engine.module, batch)
    norms = engine.backward(losses, batch["author"])
    assert bool(torch.stack([p.summed_grad.isfinite().all() for p in trainable(model).values()]).all())
    return float(losses[row % shape.authors]), float(norms[row % shape.authors])


CASES = [
    (engine, kind, bf16, k)
    for engine in ("ghost", "two_pass_unkept", "two_pass", "grad_sample")
    for kind in ("full", "lora", "llama")
    for bf16 in (True, False)
    for k in (1, 3)
]


@catches("one number of samples for authors with several", "mechanism.microbatches.make_microbatch",
    "numbers.pop() if len(numbers) == 1 else None", "max(numbers)")  # fmt: skip
def test_make_microbatch_says_what_the_device_need_not_be_asked():
    uneven = make_microbatches([author(3), author(2, 4)], 4, collate)[0]
    assert uneven["samples_each"] is None and uneven["num_real"] == 2
    full = make_microbatches([author(3), author(2, 4)], 4, collate, SHAPE._replace(samples=2))[0]
    assert full["samples_each"] == 2 and full["num_real"] == 2 and full["is_real"].tolist() == [True, True, False, False]


@catches("an author's norm follows from the row", "clipping.factor_store.total_norms", ".sum(1).sqrt()",
    ".T.contiguous().sum(0).sqrt()", count=5)  # fmt: skip
@pytest.mark.parametrize("count", [5, 6, 7, 20])
def test_total_norms_of_equal_authors_are_equal_bits(count):
    """A sum over parameters is vectorized along authors, unless the numbers of each author lie in a row."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        squares = [SquaredNorm(torch.rand(1, generator=generator).repeat(count)) for _ in range(20)]
        assert len(total_norms(squares, torch.zeros(count)).unique()) == 1
        assert len(squared_norms(torch.rand(1, 2**18, generator=generator).repeat(count, 1)).unique()) == 1


@pytest.mark.parametrize(("engine", "kind", "bf16", "k"), sample(CASES))
def test_engines_compute_the_same_norm_whoever_else_is_there(engine, kind, bf16, k):
    """In every row, beside random, identical, non-finite and no others, and in a further microbatch."""
    model = make_model("llama" if kind == "llama" else "gpt2", "lora" if kind == "lora" else "untied").train()
    with torch.no_grad():
        model.get_input_embeddings().weight[NOT_FINITE] = torch.nan
    shape, clipping = SHAPE._replace(samples=k), make_engine(engine, model, 1.0)
    target = author(*(6, 3, 5)[: min(k, 2)])
    random = [author(*[5 + i] * k, seed=1 + i) for i in range(shape.authors - 1)]
    broken = [[{"input_ids": np.full(7, NOT_FINITE, np.int32)}] for _ in random]
    found = set()
    for others in (random, [target] * len(random), broken, [], random[:1]):
        for row in range(len(others) + 1):
            found.add(seen_of(model, clipping, [*others[:row], target, *others[row:]], row, shape, bf16))
    more = [author(8, seed=9 + i) for i in range(shape.authors)]
    found.add(seen_of(model, clipping, [*more, target], len(more), shape, bf16))
    clipping.close()
    assert len(found) == 1, found


@catches("dummies counted as authors", "mechanism.microbatches.is_real", '- batch["num_dummies"]', "", clipping="ghost",
    bf16=True)  # fmt: skip
@catches("microbatches as large as the batch", "dp_utils.DPTrainer.get_train_dataloader", "if self.model_check is not None:",
    "if False:", clipping="ghost", bf16=True)  # fmt: skip
@pytest.mark.parametrize(("clipping", "bf16"), [("ghost", True), ("ghost", False), ("grad_sample", True)])
def test_trainer_has_one_shape_and_counts_real_authors_only(tmp_path, clipping, bf16):
    privacy = {"clipping": clipping, "samples_per_author": 2, "noise_multiplier": 0.0}
    options = {"bf16": bf16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 3}
    batches, recorder = train(make_trainer(tmp_path, dataset=make_dataset([1, 2, 3] * 10), privacy=privacy, **options))
    shapes = {tuple(batch["input_ids"].shape) for step in batches for batch in step.microbatches}
    assert shapes <= {(8, length) for length in (2, 3, 4, 6, 8, 12, 16)} and len(shapes) > 1  # 4 authors of 2 samples
    dummies = sum(batch["num_dummies"] for step in batches for batch in step.microbatches)
    assert dummies > 0
    counted = sum(log["authors_per_step"] for log in recorder.logs if "authors_per_step" in log)
    assert counted == sum(step.batch_size for step in batches)


def released_sum(folder, rows: list, bf16: bool) -> torch.Tensor:
    """Return the clipped sum over C that a step releases without noise, one author a row."""
    names = list(range(len(rows)))
    dataset = AuthorDataset(datasets.Dataset.from_dict({"input_ids": rows}), *group_by_author(names), author_hashes(names))
    options = {"bf16": bf16, "per_device_train_batch_size": 130, "learning_rate": 0.0}
    privacy = {"noise_multiplier": 0.0, "per_sample_max_grad_norm": 0.1}
    _, recorder = train(make_trainer(folder, tiny_gpt2(), dataset, privacy=privacy, **options))
    return recorder.gradients[0].double() * (130 / 0.1)


@pytest.mark.integration
@pytest.mark.parametrize("bf16", [True, False])
def test_trainer_moves_no_author_when_others_join(tmp_path, bf16):
    """Were a microbatch as large as the batch, 128 authors of one text would be rounded otherwise, and all alike."""
    text, joining = np.random.default_rng(3).integers(0, VOCABULARY, 9).tolist(), [list(range(16)), list(range(15))]
    others = [text] * 128
    alone, joined, all_of_them = (
        released_sum(tmp_path / name, rows, bf16) for name, rows in (("a", others), ("b", joining), ("c", others + joining))
    )
    assert (all_of_them - alone - joined).norm() < 1e-4
