"""Privacy bugs of one line, planted one at a time: each must make a check of this suite fail.

A new bug is a row here: where, what stands there, what a careless colleague would write, and the check that must notice. The
checks are the suite's own tests, called as they are; they pass without the bug, which the rest of the suite shows.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import test_accounting
import test_adam
import test_agreement
import test_audit
import test_bands
import test_budget
import test_callbacks
import test_checkpoints
import test_checks
import test_clipping
import test_clipping_contributions
import test_clipping_ghost
import test_clipping_two_pass
import test_conversations
import test_data_utils
import test_dp_utils
import test_frozen
import test_generate
import test_guards
import test_hidden_counts
import test_ledger
import test_loggers
import test_mechanism
import test_microbatches
import test_noise
import test_one_epsilon
import test_pld
import test_precision
import test_processes
import test_proof
import test_publish
import test_random_ops
import test_readers
import test_release
import test_report
import test_secret_generators
import test_selfcheck
import test_sharding
import test_specimens
import test_synthetic_report
import test_weights
import torch
from planting import find, with_edit

from author_dp.clipping import GhostClipping, TwoPassClipping
from author_dp.errors import MechanismError, UserError

pytestmark = pytest.mark.slow

STEP = "author_dp.mechanism.optimizer.AuthorDPOptimizer.pre_step"
TRAINING_STEP = "dp_utils.DPTrainer.training_step"
LOADER = "author_dp.training.dataloading.make_sampler"
GHOST = "author_dp.clipping.ghost.GhostClipping._clip"
PLAIN = "author_dp.clipping.grad_sample.GradSampleClipping.backward"
TWO_PASS = "author_dp.clipping.two_pass.TwoPassClipping"
LOSSES = "author_dp.mechanism.optimizer.author_losses"
LEDGER = "author_dp.accounting.ledger.PrivacyLedger"
CERTIFIED = "author_dp.models.weights.certified"
CHECK = "author_dp.models.weights.check_weights"
CONTRIBUTIONS = "author_dp.clipping.grad_factors"
NOISE = "author_dp.mechanism.noise.NoiseSource"
DRAW = "author_dp.mechanism.optimizer.PoissonAuthorSampler"
BANDS = "author_dp.accounting.banded_mf"
FROZEN = "author_dp.models.quantization"
SECRET = "author_dp.mechanism.secret_generators"
MICROBATCHES = "author_dp.mechanism.microbatches"
RANDOM_OPS = "author_dp.guards.random_ops"
SHARED_STEP = "author_dp.mechanism.fsdp.ShardedOptimizer.pre_step"
LOGGERS = "author_dp.guards.loggers"
PUBLISH = "author_dp.publish"
SHARED_SUMS = "author_dp.mechanism.fsdp.ShardedClipping._add_up"


class Bug(NamedTuple):
    name: str
    function: str
    old: str
    new: str
    check: Callable  # called with the fixtures tmp_path and monkeypatch
    spawned: bool = False  # whether it is planted in the processes that the check starts


def cancelling(case: str, engine_class: type, bf16: bool) -> Callable:
    test = test_clipping_ghost.test_where_tokens_cancel_rounding_carries_no_sum_above_the_clip_norm
    return lambda *_: test(case, engine_class, bf16)


def a_result(path) -> tuple[str, Path]:
    """What a full run left in its folder; path / "new" is an empty one."""
    (path / "new").mkdir()
    test_publish.run(path / "result")
    return "full", path / "result"


def update(k: int = 1, per_device: int = 4, clipping: str = "ghost", kind: str = "tied") -> Callable:
    """The update of a step against a naive loop over authors."""
    return lambda path, _: test_dp_utils.test_the_update_of_a_step_equals_a_naive_loop_over_authors(
        path, clipping, kind, k, per_device, 1
    )


def disagree(bug: str, bands: str = "1") -> Callable:
    """Two processes train, with a bug of test_agreement.py if it is named, and say nothing."""
    work = functools.partial(test_agreement.run_with_bug, bug=bug, bands=bands, canaries=0, full_shard=False, workers=0)
    return lambda path, _: test_agreement.in_processes(path, 2, functools.partial(test_agreement.says_nothing, work, path))


def noticed_by_all(bug: str) -> Callable:
    return lambda path, _: test_agreement.test_every_process_raises_what_one_of_them_does_otherwise(path, bug)


BUGS = [
    # The noise.
    Bug("no noise", STEP, "if std > 0:", "if False:",
        lambda *_: test_mechanism.test_noise_is_gaussian_of_the_promised_scale_over_the_constant_batch_size()),
    Bug("noise for the first part of the parameters only", STEP, "self.sums.split(self.noise.elements)",
        "self.sums.split(self.noise.elements)[:1]",
        lambda *_: test_mechanism.test_each_parameter_has_its_place_in_the_sums_whatever_is_noised_at_once()),
    Bug("all of the noise on every rank", STEP, " / math.sqrt(self.world_size)", "",
        lambda path, _: test_processes.test_two_processes_add_the_noise_of_one(path), spawned=True),
    Bug("the noise of one rank alone, short of its share", STEP, "if std > 0:", "if std > 0 and dist.get_rank() == 0:",
        lambda path, _: test_processes.test_two_processes_add_the_noise_of_one(path), spawned=True),
    Bug("noise per microbatch", TRAINING_STEP, "self.norms.add(norms, real)",
        "self.norms.add(norms, real); self.optimizer.optimizer.sums.add_("
        "torch.randn_like(self.optimizer.optimizer.sums) * self.plan.noise_multiplier * self.plan.clip_norm)",
        lambda path, _: test_dp_utils.test_noise_is_drawn_once_per_step_whatever_the_microbatches(path)),
    Bug("noise that does not scale with the clip norm", STEP, "self.noise_multiplier * self.max_grad_norm",
        "self.noise_multiplier",
        lambda *_: test_mechanism.test_noise_is_gaussian_of_the_promised_scale_over_the_constant_batch_size()),
    Bug("noise of half the variance", f"{NOISE}._add_pairs", "mul_(-2 * std * std)", "mul_(-std * std)",
        lambda *_: test_noise.test_draws_are_normal_in_the_middle_and_in_the_tails()),
    Bug("the same noise for two parameters", f"{NOISE}._add_pairs", "second.addcmul_(radius[: len(second)], self._sine",
        "second.addcmul_(radius[: len(second)], self._cosine", lambda *_: test_noise.test_draws_are_independent_of_each_other()),
    Bug("noise from --seed", f"{NOISE}.__init__", "secrets.token_bytes(16)", "torch.initial_seed().to_bytes(16, 'big')",
        lambda path, patch: test_noise.test_noise_does_not_follow_any_seed_and_comes_from_the_operating_system(patch)),
    Bug("the same noise in every run, and on resume", f"{NOISE}.__init__", "secrets.token_bytes(16)", "bytes(16)",
        lambda path, _: test_dp_utils.test_one_seed_shares_neither_noise_nor_batches(path)),
    Bug("hardened noise that is not", f"{NOISE}.__init__", "4 if secure else 1", "1",
        lambda *_: test_noise.test_secure_noise_sums_four_independent_draws(None)),
    # Random numbers inside the model.
    Bug("dropout masks from --seed", "dp_utils.DPTrainer._secret_generators", "if self.privacy.disable_dp:", "if True:",
        lambda path, _: test_secret_generators.test_train_draws_masks_that_do_not_follow_the_seed(path, "ghost")),
    Bug("masks from a public state", f"{SECRET}.randomize", "generator.set_state(state)", "generator.manual_seed(7)",
        lambda path, _: test_secret_generators.test_train_draws_masks_that_do_not_follow_the_seed(path, "ghost")),
    Bug("masks from 32 bits", f"{SECRET}.randomize", "generator.set_state(state)",
        "generator.manual_seed(secrets.randbits(32))",
        lambda _, patch: test_secret_generators.test_secret_generators_fill_the_whole_state(patch)),
    Bug("a device's masks from a public key", f"{SECRET}.randomize", "secrets.randbits(64)", "0",
        lambda *_: test_secret_generators.test_randomize_gives_a_device_a_secret_key_of_64_bits()),
    Bug("masks of a device not secret", f"{SECRET}.default_generators", 'device.type != "cpu"', "False",
        lambda _, patch: test_secret_generators.test_default_generators_are_those_of_the_cpu_and_each_device(patch)),
    Bug("Python's random from 32 bits", f"{SECRET}.SecretGenerators.__enter__",
        "random.seed(secrets.token_bytes(4 * TWISTER_WORDS))", "random.seed(secrets.randbits(32))",
        lambda _, patch: test_secret_generators.test_secret_generators_take_whole_states_from_the_system(patch)),
    Bug("one generator looked at", f"{SECRET}.SecretGenerators.check", "for generator in self.generators] != self._seeds",
        "for generator in self.generators[:1]] != self._seeds[:1]",
        lambda *_: test_secret_generators.test_check_looks_at_every_generator()),
    Bug("the same masks in every step", "dp_utils.DPTrainer.training_step", "model.train()",
        "model.train(); self._state = getattr(self, '_state', torch.get_rng_state()); torch.set_rng_state(self._state)",
        lambda path, _: test_secret_generators.test_train_draws_other_masks_in_every_step(path)),
    Bug("the states of masks saved", "dp_utils.DPTrainer._save_rng_state", "if self.generators is None:", "if True:",
        lambda path, _: test_secret_generators.test_train_resumed_twice_from_one_checkpoint_draws_other_masks(path)),
    Bug("somebody seeds the masks' generator", f"{SECRET}.SecretGenerators.check", "if [", "if False and [",
        lambda path, _: test_secret_generators.test_train_ends_where_a_callback_seeds_the_generators(path)),
    Bug("the same masks on every process", f"{SECRET}.randomize", "secrets.token_bytes(4 * TWISTER_WORDS)",
        "bytes(4 * TWISTER_WORDS - 1) + b'1'",
        lambda path, _: test_secret_generators.test_processes_draw_different_numbers(path)),
    Bug("a coin for all samples", f"{RANDOM_OPS}.check_shared_ops", "if not all(close(", "if False and not all(close(",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("a rare coin")),
    Bug("a coin that is never tossed", f"{RANDOM_OPS}.RandomOps.__torch_dispatch__", "main.fill_(", "main.mul_(1) if True else (",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("a rare coin")),
    Bug("a permutation of samples", f"{RANDOM_OPS}.check_independence", "if not all(close(", "if False and not all(close(",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("a permutation by sorting")),
    Bug("others keep their texts and numbers", f"{RANDOM_OPS}.check_independence", "RandomOps(dims, others=round_)",
        "RandomOps(dims)",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("a choice by ranks")),
    Bug("a choice across samples", f"{RANDOM_OPS}.check_same_ops", "one.scalars != two.scalars", "False",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("a choice of samples")),
    Bug("operations of more samples not compared", f"{RANDOM_OPS}.check_independence", "check_same_ops(few, mode.ops)", "pass",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("one mask for several samples")),
    Bug("a mask for long samples", f"{RANDOM_OPS}.check_random_ops", "None in sample_dims(*long) + dims", "None in dims",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("one mask for long samples")),
    Bug("random numbers of the backward pass", f"{RANDOM_OPS}.check_random_ops", "record(call, ids[:1].expand(count, -1))",
        "record(call, ids[:1].expand(count, -1), backward=False)",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("a coin in the backward pass")),
    Bug("layers dropped by Python", f"{RANDOM_OPS}.record", "if other_states() != before:", "if False:",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("Python's random")),
    Bug("layers dropped by a generator of the model's", f"{RANDOM_OPS}.record", "if op.has_generator", "if False",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("a generator of its own")),
    Bug("masks that the model seeds", f"{RANDOM_OPS}.record", "if op.is_seeded", "if False",
        lambda *_: test_random_ops.test_check_random_ops_refuses_what_samples_share("seeded masks")),
    Bug("random operations looked at without dropout", f"{RANDOM_OPS}.training_mode", "model.train()", "pass",
        lambda *_: test_random_ops.test_check_model_refuses_layerdrop_unless_it_is_off(0.05, True)),
    Bug("random operations not looked at", "author_dp.guards.model_check.check_apart", "check_random_ops(Call", "str(Call",
        lambda *_: test_random_ops.test_check_model_refuses_layerdrop_unless_it_is_off(0.05, False)),
    Bug("a rope that remembers", "author_dp.guards.model_check.check_apart", "check_memory(model, longest)", "pass",
        lambda *_: test_proof.test_check_apart_refuses_a_rope_that_remembers_the_longest_sample()),
    # Shapes.
    Bug("microbatches as large as the batch", "dp_utils.DPTrainer.get_train_dataloader", "if not self.privacy.disable_dp:",
        "if False:",
        lambda path, _: test_microbatches.test_train_others_do_not_move_when_authors_join(path, True)),
    Bug("an author's norm follows from the row", "author_dp.clipping.ghost.norms_of", ".sum(1).sqrt()",
        ".T.contiguous().sum(0).sqrt()",
        lambda *_: test_microbatches.test_norms_of_equal_authors_are_equal_bits(5)),
    Bug("as many rows as authors", f"{MICROBATCHES}.make_microbatch", "shape.authors - len(authors)", "0",
        lambda *_: test_microbatches.test_cut_into_microbatches_fills_up_to_the_shape_and_keeps_every_sample(1)),
    Bug("as many rows as samples", f"{MICROBATCHES}.make_microbatch", "(shape.samples - len(samples))",
        "(1 - len(samples))",
        lambda *_: test_microbatches.test_cut_into_microbatches_fills_up_to_the_shape_and_keeps_every_sample(3)),
    Bug("as long as the longest sample", f"{MICROBATCHES}.make_microbatch",
        '(0, length - batch["input_ids"].shape[1])', "(0, 0)",
        lambda *_: test_microbatches.test_cut_into_microbatches_fills_up_to_the_shape_and_keeps_every_sample(1)),
    Bug("lengths that follow from the batch", f"{MICROBATCHES}.by_length", "longest = num_tokens(samples)",
        "longest = max(map(num_tokens, authors))",
        lambda *_: test_microbatches.test_cut_into_microbatches_fills_up_to_the_shape_and_keeps_every_sample(1)),
    Bug("dummies counted as authors", f"{MICROBATCHES}.is_real", '- batch["num_dummies"]', "",
        lambda path, _: test_microbatches.test_train_has_microbatches_of_one_shape_and_counts_real_authors_only(
            path, "ghost", True)),
    # The clipping.
    Bug("half the clip: a bound of twice C", GHOST, "(self.clip_norm / norms)", "(2 * self.clip_norm / norms)",
        lambda *_: test_clipping.test_clipped_sum_equals_the_naive_one("ghost", "tied", 0.5)),
    Bug("no clip", GHOST, "(self.clip_norm / norms).clamp(max=1.0)", "torch.ones_like(norms)",
        lambda *_: test_clipping.test_many_samples_of_one_author_move_the_sum_by_the_clip_norm_at_most("ghost")),
    Bug("scaled up to C, not only down", GHOST, "(self.clip_norm / norms).clamp(max=1.0)", "self.clip_norm / norms",
        lambda *_: test_clipping.test_clipped_sum_equals_the_naive_one("ghost", "tied", 50.0)),
    Bug("no clip by the other engine", PLAIN,
        "(self.clip_norm / norms).clamp(max=1.0)", "torch.ones_like(norms)", update(clipping="grad_sample")),
    Bug("a clip for each sample", TRAINING_STEP, "non_blocking=True)", "non_blocking=True)\n        "
        "microbatch.update(author=torch.arange(len(microbatch['author'])), num_authors=len(microbatch['author']));"
        "real = torch.arange(len(microbatch['author'])) < real.sum()",
        update(k=3, per_device=64)),
    Bug("tied weights counted as two", f"{CONTRIBUTIONS}.tied_cross_terms", "return 2 * (hidden", "return 0 * (hidden",
        lambda *_: test_clipping_ghost.test_clipped_sum_equals_the_naive_one_and_that_of_grad_sample("gpt2", "tied", "short")),
    Bug("tied weights counted as two where they are formed", f"{CONTRIBUTIONS}.plus", "part.gradients.float()",
        "0 * part.gradients", lambda *_: test_clipping.test_clipped_sum_equals_the_naive_one("ghost", "tied", 0.5)),
    Bug("a pair of tokens counted once for two", f"{CONTRIBUTIONS}.ghost_squared_norms", "+ 2 * products", "+ products",
        lambda _, monkeypatch: test_clipping_contributions.test_norm_of_a_product_in_blocks(11, torch.float32, monkeypatch)),
    Bug("what cancels not rounded up", f"{CONTRIBUTIONS}.Squared.rounded_up", "self.found + ROUNDING * most", "self.found",
        lambda *_: test_clipping_contributions.test_a_norm_where_tokens_cancel(1024, 0, "two kinds")),
    Bug("as if rounding errors were independent", f"{CONTRIBUTIONS}.ghost_squared_norms",
        "most + products.diagonal(dim1=1, dim2=2).sqrt().sum(1)",
        "(most**2 + products.diagonal(dim1=1, dim2=2).sum(1)).sqrt()",
        lambda *_: test_clipping_contributions.test_a_norm_where_tokens_cancel(1024, 0, "two kinds")),
    Bug("what cancels of a lookup not rounded up", f"{CONTRIBUTIONS}.lookup_squared_norms", "sqrt().sum(1)", "sqrt().sum(1) * 0",
        lambda *_: test_clipping_contributions.test_a_norm_of_a_lookup_where_tokens_cancel(512, "two kinds")),
    Bug("what cancels of tied weights not rounded up", f"{CONTRIBUTIONS}.together", "lookup.most + product.most", "cross * 0",
        lambda *_: test_clipping_contributions.test_a_norm_of_a_tied_matrix_whose_two_uses_cancel(50, 64)),
    Bug("a square below zero takes from the others", "author_dp.clipping.ghost.norms_of", "every.clamp(min=0)", "every",
        lambda *_: test_clipping_contributions.test_no_parameter_takes_norm_away_from_others()),
    Bug("authors in any order taken", f"{CONTRIBUTIONS}.Authors.__init__", "if not (len(author)", "if False and not (len(author)",
        lambda *_: test_clipping_contributions.test_authors_in_another_order_are_refused([0, 1, 0, 1])),
    Bug("each layer clipped by itself", PLAIN, "1).norm(dim=1)", "1).amax(dim=1)",
        update(clipping="grad_sample", per_device=64)),
    Bug("a gradient that is not finite is let in", PLAIN,
        "if not finite.all():", "if False:",
        lambda *_: test_clipping.test_an_author_whose_gradient_is_not_finite_contributes_zero("grad_sample", float("nan"))),
    Bug("no room for what bfloat16 rounds", f"{CONTRIBUTIONS}.Product.squared", "BFLOAT16_ROUNDING * squared.most", "None",
        cancelling("formed norm", GhostClipping, True)),
    Bug("no room for what bfloat16 rounds, of tied weights", f"{CONTRIBUTIONS}.together", "product.room", "None",
        lambda *_: test_clipping_contributions.test_a_tied_head_whose_tokens_cancel_is_given_room_for_bfloat16()),
    Bug("what cancels not rounded up where it is formed", f"{CONTRIBUTIONS}.product_squared_norms",
        "(left.float().norm(dim=2) * right.float().norm(dim=2)).sum(1)", "torch.zeros_like(found)",
        cancelling("formed norm, almost nothing", TwoPassClipping, False)),
    Bug("norms of what is formed, sums of what is scaled", f"{TWO_PASS}._most_explicit",
        "min(EXPLICIT_ELEMENTS, (self.may_keep - self._kept) // 4)", "EXPLICIT_ELEMENTS",
        cancelling("formed gradient", TwoPassClipping, True)),
    # The clipping in two passes.
    Bug("a second pass of other gradients that nobody notices", f"{TWO_PASS}._add",
        "len(self._same) < len(self._seen) or not torch.stack(self._same).all()", "False",
        lambda *_: test_clipping_two_pass.test_other_dropout_in_the_second_pass_ends_the_run("tied")),
    Bug("masks that are not replayed", "author_dp.guards.options.check_checkpointing", 'if not options.get("preserve_rng_state", True)',
        "if False",
        lambda path, _: test_guards.test_checkpointing_is_refused_where_layers_cannot_be_told_apart(
            path, "ghost", {"gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}, "preserve")),
    Bug("a second pass of other losses", f"{TWO_PASS}._visit", "(losses, ", "(losses * (1 if retain_graph else 2), ",
        lambda *_: test_clipping_two_pass.test_with_dropout_both_passes_drop_the_same("gpt2", "tied")),
    Bug("no clip in two passes", f"{TWO_PASS}._clip", "(self.clip_norm / norms).clamp(max=1.0)", "torch.ones_like(norms)",
        lambda *_: test_clipping_two_pass.test_clipped_sum_equals_the_naive_one("gpt2", "tied")),
    Bug("no factor in the second pass", f"{TWO_PASS}._take", "self._adding.factors,", "torch.ones_like(self._adding.factors),",
        lambda *_: test_clipping_two_pass.test_clipped_sum_equals_the_naive_one("gpt2", "untied")),
    Bug("tied weights counted as two in two passes", f"{TWO_PASS}._take_second", ", 2 * both)", ", 0 * both)",
        lambda *_: test_clipping_two_pass.test_clipped_sum_equals_the_naive_one("gpt2", "tied")),
    Bug("the rows of other ids", f"{TWO_PASS}._take_second", "or not torch.equal(of_head[0].ids, part.ids)", "",
        lambda *_: test_clipping_two_pass.test_what_is_used_twice_in_another_way_is_kept_whole(test_clipping_two_pass.shifted)),
    Bug("the first of two calls alone", f"{TWO_PASS}._take_second", "self._whole.add(parameter)", "pass",
        lambda *_: test_clipping_two_pass.test_what_is_used_twice_in_another_way_is_kept_whole(
            test_clipping_two_pass.shared_block)),
    Bug("a norm without what is kept", f"{TWO_PASS}._clip", "norms_of([*squares.values(), *together], losses)",
        "norms_of([square for p, square in squares.items() if p not in kept], losses)",
        lambda *_: test_clipping_two_pass.test_clipped_sum_equals_the_naive_one("gpt2", "untied")),
    Bug("zero times infinity in two passes", f"{TWO_PASS}._clip", "None if norms.isfinite().all() else ~norms.isfinite()",
        "None",
        lambda *_: test_clipping_two_pass.test_an_author_whose_activations_are_not_finite_contributes_zero()),
    # The loss and the sum.
    Bug("a mean over the tokens of the batch", LOSSES, "counts.clamp(min=1)", "counts.sum().clamp(min=1)",
        lambda *_: test_mechanism.test_author_loss_is_the_mean_over_the_authors_own_tokens()),
    Bug("one author's gradient depends on the others", LOSSES, "counts.clamp(min=1)",
        "counts.mean().clamp(min=1)", lambda *_: test_clipping.test_clipped_sum_equals_the_naive_one("ghost", "tied", 50.0)),
    Bug("division by the real batch size", TRAINING_STEP, "model.train()",
        "model.train(); self.optimizer.optimizer.expected_batch_size = max(1, inputs.batch_size)", update(per_device=64)),
    Bug("a gradient used twice", "author_dp.mechanism.optimizer.AuthorDPOptimizer.zero_grad", "self.sums.zero_()", "pass",
        lambda *_: test_mechanism.test_the_sum_is_divided_by_the_constant_and_used_once()),
    Bug("what a broken step left is used", TRAINING_STEP, "self.optimizer.zero_grad()", "pass",
        lambda path, _: test_dp_utils.test_a_step_that_was_broken_off_leaves_nothing_for_the_next(path)),
    # The sampling.
    Bug("shuffled, of a fixed size", f"{DRAW}.draw_places",
        "places[places < number]",
        "np.sort(self._authors_generator.permutation(number)[: round(self.rate * number)])",
        lambda *_: test_mechanism.test_batch_sizes_are_binomial()),
    Bug("an author who is always in", f"{DRAW}.draw_places", "places[places < number]",
        "np.unique(np.append(places[places < number], 0))",
        lambda *_: test_mechanism.test_every_author_is_drawn_with_probability_q()),
    Bug("authors drawn two by two", f"{DRAW}.draw_places", "places[places < number]",
        "np.union1d(places[places < number] // 2 * 2, places[places < number] // 2 * 2 + 1)",
        lambda *_: test_mechanism.test_authors_and_steps_are_independent()),
    Bug("a gap one too long", f"{DRAW}.draw_places", "places = last + np.cumsum", "places = last + 1 + np.cumsum",
        lambda *_: test_mechanism.test_every_author_is_drawn_with_probability_q()),
    Bug("draws cut off where more gaps are needed", f"{DRAW}.draw_places", "while last < number:", "while not drawn:",
        lambda *_: test_mechanism.test_a_draw_goes_on_to_the_last_author()),
    Bug("k + 1 samples", f"{DRAW}.draw_samples", "place < self.samples_per_author", "place <= self.samples_per_author",
        lambda *_: test_mechanism.test_up_to_k_samples_of_each_author_without_replacement_uniformly(3)),
    Bug("an empty draw skipped", f"{DRAW}.__iter__", "yield self.draw()",
        "yield next(draw for draw in iter(self.draw, None) if draw.batch_size)",
        lambda *_: test_mechanism.test_everybody_is_drawn_at_rate_one_and_empty_draws_stay()),
    Bug("q miscounted: sampled at twice the rate", LOADER, "sample_rate=plan.sample_rate",
        "sample_rate=min(1.0, 2 * plan.sample_rate)",
        lambda path, _: test_dp_utils.test_the_trainer_samples_as_the_ledger_says(path)),
    Bug("sampling from --seed", LOADER, "secrets.randbits(128)", "args.seed",
        lambda path, _: test_dp_utils.test_one_seed_shares_neither_noise_nor_batches(path)),
    # The accounting and the ledger.
    Bug("the lower bound for epsilon", "author_dp.accounting.accountant.PrivacyLoss._on_grid", "_, _, upper =", "upper, _, _ =",
        lambda _, patch: test_accounting.test_the_error_of_a_coarse_grid_is_added_not_hidden(patch)),
    Bug("steps of equal mechanisms forgotten", "author_dp.accounting.accountant.compose", "steps.get((sigma, rate), 0) + count", "count",
        lambda *_: test_accounting.test_different_mechanisms_compose()),
    Bug("Renyi divergences as if everybody else were drawn", "author_dp.accounting.accountant.rdp_of_step",
        " + (order - i) * math.log1p(-sample_rate)", " + order * math.log1p(-sample_rate)",
        lambda *_: test_accounting.test_renyi_divergences_are_rounded_up_and_close(0.4715, 1024 / test_accounting.N)),
    Bug("rounding forgotten in Renyi divergences", "author_dp.accounting.accountant.rdp_of_step", " + 16 * ULP * largest", "",
        lambda *_: test_accounting.test_renyi_divergences_are_rounded_up_and_close(20.0, 1e-4)),
    Bug("a grid that ends too early", "author_dp.accounting.accountant.PrivacyLoss._largest_loss", "self.delta_error / 4", "self.delta",
        lambda *_: test_accounting.test_the_grid_reaches_as_far_as_the_accountants_own()),
    Bug("the ledger after the update", STEP, "self.before_release()",
        "self.original_optimizer.register_step_post_hook(lambda *_: self.before_release())",
        lambda path, _: test_budget.test_the_ledger_is_ahead_of_every_update(path)),
    Bug("a record that is not on disk", f"{LEDGER}._write", "os.fsync(descriptor)", "pass",
        lambda path, patch: test_ledger.test_a_step_is_on_disk_when_record_step_returns(path, patch)),
    Bug("earlier runs forgotten", f"{LEDGER}._count", "self.taken.append(0)",
        "self.taken.clear(); self.runs.clear(); self.taken.append(0)",
        lambda path, _: test_ledger.test_ledger_counts_runs_and_steps(path)),
    Bug("a torn record forgotten", f"{LEDGER}.read", "if self._torn and self.runs:", "if False:",
        lambda path, _: test_ledger.test_a_torn_last_record_counts_as_a_step_now_and_later(path, 5)),
    Bug("an edited record believed", f"{LEDGER}.read", '(found := record.pop("link")) != link(self.links[-1], record)',
        'not (found := record.pop("link"))',
        lambda path, _: test_ledger.test_an_edited_ledger_is_refused(path, "less noise counted")),
    Bug("a ledger that was taken away begins anew", f"{LEDGER}._write", "0 if self._size else os.O_CREAT",
        "os.O_CREAT",
        lambda path, patch: test_ledger.test_a_ledger_that_cannot_be_written_raises_and_counts_nothing(path, "deleted", patch)),
    Bug("steps lost in a crash not counted on resume", "author_dp.accounting.budget.Budget.epsilon",
        "[*self.ledger.spendings, self.plan.spending(more_steps)]", "[self.plan.spending(self.steps + more_steps)]",
        lambda path, _: test_budget.test_resuming_counts_lost_steps_stops_in_time_and_draws_afresh(path)),
    Bug("the budget passed", "author_dp.accounting.budget.Budget.record_step", "if self.steps >= self.allowed_steps:", "if False:",
        lambda path, _: test_budget.test_no_step_beyond_the_budget_even_if_nobody_stops_the_loop(path)),
    Bug("spent at the delta of a run that took no step", "author_dp.accounting.ledger.account", "last = ledger.last_run",
        "last = ledger.runs[-1]", lambda path, _: test_one_epsilon.test_a_run_that_took_no_step_changes_no_number(path)),
    Bug("a finished run called again reports the options of now", "dp_utils.DPTrainer._look_for_end",
        "plan_of(self.budget.ledger.last_run)", "self.plan",
        lambda path, _: test_one_epsilon.test_a_finished_run_reports_its_own_options_when_it_is_called_again(path, "options")),
    Bug("settings of now in the report of a finished run", "dp_utils.DPTrainer.privacy_report",
        "if self.ended is not None and", "if False and",
        lambda path, _: test_one_epsilon.test_a_finished_run_reports_its_own_options_when_it_is_called_again(path, "options")),
    Bug("the page's delta of a run that took no step", "author_dp.outputs.report.report_of_ledger", "ledger.last_run",
        "ledger.runs[-1]", lambda path, _: test_one_epsilon.test_after_more_steps_with_another_delta_there_is_one_delta(path)),
    Bug("epsilon cut off at the target", "author_dp.accounting.budget.Budget.epsilon", "return epsilon_of(",
        "return (lambda *spent: min(self.plan.target_epsilon or math.inf, epsilon_of(*spent)))(",
        lambda path, _: test_one_epsilon.test_the_steps_that_are_allowed_are_the_most_that_the_target_allows(path, None)),
    Bug("a report of the plan, not of what was spent", "author_dp.accounting.budget.Budget.report", "self.plan.report(self.epsilon(), ",
        "self.plan.report(self.epsilon(self.plan.steps - self.steps), ",
        lambda path, _: test_one_epsilon.test_report_page_and_sidecar_hold_what_the_run_reports(path)),
    Bug("a page and a sidecar that compute on their own", "author_dp.outputs.report.report_anew", "epsilon_of(*accounted)",
        "epsilon_of([spending._replace(steps=spending.steps + 1) for spending in accounted[0]], accounted[1])",
        lambda path, _: test_one_epsilon.test_report_page_and_sidecar_hold_what_the_run_reports(path)),
    Bug("a summary that adds all planned steps to those taken", "dp_utils.DPTrainer.summary", "self.plan.steps - taken",
        "self.plan.steps",
        lambda path, _: test_one_epsilon.test_the_summary_of_a_resumed_run_says_where_it_ends(path, 4, 6, 30.0)),
    Bug("a summary that knows of no target", "author_dp.accounting.budget.Budget.summary", "min(steps, self.affordable(steps))", "steps",
        lambda path, _: test_one_epsilon.test_the_summary_of_a_resumed_run_says_where_it_ends(path, 3, 6, 3.0)),
    Bug("a step more than the target allows", "author_dp.accounting.budget.largest", "return low", "return high",
        lambda path, _: test_one_epsilon.test_the_steps_that_are_allowed_are_the_most_that_the_target_allows(path, None)),
    Bug("epsilon depends on the order of runs", "author_dp.accounting.accountant.compose", "return sorted(", "return list(",
        lambda *_: test_one_epsilon.test_epsilon_depends_neither_on_the_order_nor_on_how_runs_were_cut(
            *test_one_epsilon.CASES[1])),
    Bug("epsilon rounded to the nearest", "author_dp.accounting.accountant.rounded_up", "FOUR_DIGITS.", "decimal.Context(prec=4).",
        lambda *_: test_one_epsilon.test_rounding_goes_up_and_stays(7.9951, 7.996, "7.996")),
    Bug("calibrated for another number than is shown", "author_dp.accounting.accountant.find_noise_multiplier",
        "epsilon = compute_epsilon(sigma, sample_rate, steps, target_delta)",
        "epsilon = PrivacyLoss([Spending(sigma, sample_rate, steps)], target_delta).epsilon",
        lambda *_: test_one_epsilon.test_a_planned_run_ends_at_its_target_by_the_number_that_is_shown(0.05, 100, 2.34567)),
    Bug("a checkpoint without its ledger", "author_dp.training.checkpointing.find_checkpoint",
        "check_history(checkpoint, ledger, is_first_process=args.process_index == 0)", "pass",
        lambda path, _: test_checkpoints.test_a_checkpoint_is_not_resumed_away_from_its_ledger(path)),
    Bug("a half-written checkpoint taken", "author_dp.training.checkpointing.newest_whole", "if damage is None:", "if True:",
        lambda path, _: test_checkpoints.test_a_damaged_checkpoint_is_passed_over(path, "unsealed")),
    Bug("no tilt: rounding drowns delta", "author_dp.accounting.pld.Composed.__init__", "min(sketch.best_tilt(delta)[0], 30 / cell)", "1e-3",
        lambda *_: test_pld.test_many_steps_of_everybody_are_bounded_closely(10.0, 100, 1.0, 1e-15)),
    Bug("masses rounded down", "author_dp.accounting.pld.on_grid", "(gap + slack) / width", "0.9 * (gap + slack) / width",
        lambda *_: test_pld.test_many_steps_of_everybody_are_bounded_closely(10.0, 100, 1.0, 1e-9)),
    Bug("the closed form without its second term's care", "author_dp.accounting.accountant.gaussian_delta", "ratio - further + error",
        "ratio - 2 * further + error",
        lambda *_: test_accounting.test_at_rate_one_epsilon_is_exact_where_the_prv_accountant_was_below()),
    Bug("a folder counted twice", "author_dp.accounting.ledger.account_together", "check_disjoint(ledgers)", "pass",
        lambda path, _: test_ledger.test_no_step_is_counted_twice(path)),
    # The check of the run's own noise.
    Bug("a check that is never asked", "dp_utils.DPTrainer._check", "self.checks.test(whole)", "pass",
        lambda path, patch: test_selfcheck.test_wrong_noise_ends_a_real_run(path, patch, "half the noise")),
    Bug("an alarm that is not written down", "author_dp.accounting.budget.Budget.raise_alarm", "self.ledger.record_alarm(found)", "pass",
        lambda path, _: test_selfcheck.test_after_an_alarm_nothing_is_saved_or_resumed_and_no_report_promises_anything(path)),
    Bug("a run with an alarm that is resumed", "author_dp.training.checkpointing.find_checkpoint", "ledger.check_alarm()", "pass",
        lambda path, _: test_selfcheck.test_after_an_alarm_nothing_is_saved_or_resumed_and_no_report_promises_anything(path)),
    # Processes that differ, and what the run counts.
    Bug("another sampler key on each process", LOADER, "broadcast(secrets.randbits(128))", "secrets.randbits(128)",
        disagree("")),
    Bug("another group key on each process", LOADER, "broadcast(secrets.token_bytes(32))", "secrets.token_bytes(32)",
        disagree("", "3")),
    Bug("the whole draw on each process", f"{DRAW}.draw", "authors[self.rank :: self.world_size]", "authors", disagree("")),
    Bug("the same half of the draw on each process", f"{DRAW}.draw", "self.rank ::", "0 ::", disagree("")),
    Bug("draws that nobody compares", "author_dp.guards.agreement.compare", '"batches": "sampled authors"', "",
        noticed_by_all("another sampler key on each")),
    Bug("groups that nobody compares", "author_dp.guards.agreement.RankCheck.__init__", 'b"" if sampler.groups is None', 'b"" if True',
        noticed_by_all("another group key on each")),
    Bug("shares that nobody adds up", "author_dp.guards.agreement.compare", "!= first.whole", "is None",
        noticed_by_all("the same half on each")),
    Bug("authors clipped that nobody counts", "author_dp.guards.agreement.compare", "!= first.drawn", "is None",
        lambda path, patch: test_agreement.test_one_process_notices_too(path, patch, "microbatches taken twice")),
    Bug("data that nobody compares", "author_dp.guards.agreement.check_same_start", 'one["data"] != every[0]["data"]', "False",
        lambda path, _: test_agreement.test_processes_that_were_given_other_data_or_options_do_not_start(
            path, "texts", "training data")),
    Bug("an alarm that one process keeps to itself", "author_dp.guards.monitors.RunChecks.test", "gather(", "(lambda one: [one])(",
        noticed_by_all("another sampler key on each")),
    Bug("updates that nobody counts", "author_dp.guards.monitors.UpdateCheck.test", "self.updates != self.budget.steps", "False",
        lambda path, _: test_checks.test_an_update_that_no_ledger_holds_ends_the_run(path)),
    Bug("a ledger that is not read again", "author_dp.accounting.budget.Budget.lacking", "PrivacyLedger(self.ledger.path).steps",
        "self.ledger.steps", lambda path, patch: test_checks.test_a_step_that_is_not_on_the_disk_ends_the_run(path, patch)),
    Bug("noise on frozen weights", TRAINING_STEP, "self.norms.end_step()",
        "self.norms.end_step(); [p.data.add_(torch.randn_like(p), alpha=1e-3) for p in self.model.parameters()]",
        lambda path, _: test_checks.run(path, test_checks.half_frozen())),
    Bug("frozen weights that nobody looks at", "author_dp.guards.monitors.FixedWeights._sums", "if not p.requires_grad", "if False",
        lambda path, _: test_checks.test_weights_that_are_not_trained_stay_as_they_are(path, test_checks.half_frozen)),
    # The precision.
    Bug("no look at the precision when training starts", "dp_utils.DPTrainer._record_step", "if not self.budget.steps:",
        "if False:", lambda path, _: test_precision.test_a_run_with_rounded_products_does_not_start(path, "TF32")),
    Bug("no look at the precision at log lines", "author_dp.guards.monitors.RunChecks.start", "(self._precision, ", "(",
        lambda path, _: test_precision.test_products_that_become_rounded_end_the_run(path, "no")),
    Bug("no look at the settings of each step", "author_dp.guards.monitors.RunChecks.taken", "self._precision.look()", "pass",
        lambda path, _: test_precision.test_a_setting_of_one_step_is_noticed(path, None)),
    Bug("products whose factors bfloat16 holds exactly", "author_dp.guards.precision.find_rounding",
        "(TF32_BITS, FLOAT32_BITS, *([HALF_BITS] if bf16 else []))", "(HALF_BITS,)",
        lambda *_: test_precision.test_find_rounding_sees_each_lower_precision("TF32")),
    Bug("sums of bfloat16 factors not looked at", "author_dp.guards.precision.find_rounding", "*([HALF_BITS] if bf16 else [])", "",
        lambda path, patch: test_precision.test_products_of_bfloat16_factors_are_summed_in_float32_under_bf16(path, patch)),
    Bug("sums in bfloat16 allowed on a GPU", "author_dp.guards.precision.full_precision_sums",
        "flags.allow_fp16_reduced_precision_reduction = False", "flags.allow_fp16_reduced_precision_reduction",
        lambda path, _: test_precision.test_bfloat16_sums_are_not_reduced_in_bfloat16_while_training(path, True)),
    Bug("a compiler that switches TF32 on", "author_dp.guards.options.check_options", '.lower() != "no"', '.lower() == "none"',
        lambda path, patch: test_precision.test_accelerates_dynamo_is_refused(path, patch, "inductor")),
    # The ranges of options.
    Bug("a clip norm whose noise float32 does not hold", "dp_utils.PrivacyArguments.__post_init__",
        "if value is not None and not lowest <= value <= highest", "if not (value is None or value > 0)",
        lambda *_: test_dp_utils.test_privacy_options_are_checked(
            {"noise_multiplier": 1.0, "per_sample_max_grad_norm": 1e-22}, "--per_sample_max_grad_norm")),
    # Around it.
    Bug("the Trainer's clipping on top", "author_dp.guards.options.check_options",
        "if args.max_grad_norm and not privacy.disable_dp:", "if False:",
        lambda path, _: test_guards.test_options_that_would_change_the_mechanism_are_refused_by_name(
            path, {"max_grad_norm": 1.0}, "--max_grad_norm")),
    Bug("authors move when another one leaves", "author_dp.data.authors.digests", '{prefix}{author}".encode()',
        '{len(authors)}:{author}".encode()', lambda *_: test_data_utils.test_split_depends_on_seed_and_author_alone()),
    Bug("authors without their blanks", "data_utils.encode_authors", "values.dictionary_encode()",
        "(pc.utf8_trim_whitespace(values) if pa.types.is_string(values.type) else values).dictionary_encode()",
        lambda *_: test_data_utils.test_blanks_and_case_make_another_author()),
    Bug("who is trained depends on who else is there", "data_utils.split_by_author", "draws < eval_fraction + train_fraction",
        "np.argsort(np.argsort(draws)) / len(draws) < eval_fraction + train_fraction",
        lambda *_: test_data_utils.test_a_fraction_of_the_authors_depends_on_each_alone()),
    Bug("prompts are learned", "data_utils.collate", 'sample.get("labels", row)', "row",
        lambda *_: test_conversations.test_what_stands_as_a_prompts_target_changes_no_loss()),
    Bug("labels of another sample", "data_utils.AuthorDataset.__getitems__", "zip(*rows.values())",
        "zip(*(row[::-1] if name == 'labels' else row for name, row in rows.items()))",
        lambda *_: test_conversations.test_rows_of_labels_stay_beside_their_ids()),
    Bug("targets found where none are", "author_dp.data.chat.Format.prefix", "not text.startswith(beginning)", "False",
        lambda *_: test_conversations.test_what_is_no_beginning_is_refused()),
    Bug("a quote that swallows other authors", "author_dp.data.readers.read_csv", "strict=True", "strict=False",
        lambda path, _: test_readers.test_a_quote_that_does_not_close_is_refused_with_its_line(path)),
    Bug("1 and '1' are one author", "author_dp.data.readers.note_kind", "in kinds.items():", "in []:",
        lambda path, _: test_readers.test_authors_of_two_kinds_are_refused(path)),
    Bug("a public loss that is not clipped", "author_dp.training.public_loss.on_grid", "min(max(loss, 0.0), upper)", "loss",
        lambda *_: test_release.test_an_author_moves_the_sums_by_the_grid_whatever_the_loss(-3.0)),
    Bug("a public loss with half the noise", "author_dp.training.public_loss.release_loss", "Fraction(sensitivity) / ",
        "Fraction(sensitivity, 2) / ",
        lambda path, patch: test_release.test_noise_has_the_scale_of_what_one_author_can_change(path, patch, False, 1)),
    Bug("a place that another author takes is free", "author_dp.training.public_loss.release_loss", "GRID * (2 if limited else 1)", "GRID",
        lambda path, patch: test_release.test_noise_has_the_scale_of_what_one_author_can_change(path, patch, True, 2)),
    Bug("noise that is zero twice as often", "author_dp.training.public_loss.discrete_laplace", "if size or not negative:", "if True:",
        lambda *_: test_release.test_noise_is_discrete_laplace(test_release.Fraction(1))),
    Bug("a public loss that no ledger holds", "author_dp.training.public_loss.release_loss", "trainer.budget.record_release(record)", "pass",
        lambda path, patch: test_release.test_what_was_released_is_in_the_ledger_before_it_is_told(path, patch)),
    Bug("held-out authors of two splits", "author_dp.accounting.ledger.PrivacyLedger.epsilon_with_releases", "len(splits) == 1 and", "",
        lambda path, _: test_release.test_epsilon_of_models_and_losses_together(path, ["s", "t"], ["s"], 10.0)),
    Bug("held-out authors who may be trained on", "author_dp.accounting.ledger.PrivacyLedger.epsilon_with_releases",
        "and None not in splits", "",
        lambda path, _: test_release.test_epsilon_of_models_and_losses_together(path, [None], [None], 10.0)),
    Bug("held-out rows that others move up into", "data_utils.load_samples", "if released:", "if False:",
        lambda path, _: test_release.test_max_eval_samples_takes_authors(path)),
    Bug("a hidden number of authors in the ledger", "author_dp.accounting.plan.PrivacyPlan.public", "if self.hide_counts else {}",
        "if False else {}",
        lambda path, _: test_hidden_counts.test_public_files_are_the_same_for_any_number_of_authors(path)),
    Bug("a divisor that follows the number of authors", "author_dp.accounting.plan.make_plan", "expected_batch_size=batch_size",
        "expected_batch_size=round(sample_rate * num_authors)",
        lambda *_: test_hidden_counts.test_steps_follow_from_options_alone()),
    Bug("steps that follow the number of authors", "author_dp.accounting.plan.make_plan", "math.ceil(args.num_train_epochs / sample_rate)",
        "math.ceil(args.num_train_epochs * num_authors / batch_size)",
        lambda *_: test_hidden_counts.test_steps_follow_from_options_alone()),
    Bug("a rate other than the one accounted for", LOADER, "sample_rate=plan.sample_rate",
        "sample_rate=plan.expected_batch_size / plan.num_authors",
        lambda path, _: test_hidden_counts.test_authors_are_drawn_at_the_rate_and_divided_by_a_constant(path)),
    Bug("a group drawn twice in b steps", f"{DRAW}.draw_authors", "self.draws % len(self.members)",
        "self.draws // 2 % len(self.members)", lambda *_: test_bands.test_sensitivity_of_what_the_sampler_can_draw(4)),
    Bug("a band dropped", f"{BANDS}.BandedNoise.add_", "zip(places, self.rest)", "zip(places[1:], self.rest[1:])",
        lambda *_: test_bands.test_the_covariance_of_released_noise_is_that_of_the_inverse(3)),
    Bug("band coefficients in reverse", f"{BANDS}.BandedNoise.add_", "zip(places, self.rest)", "zip(places, self.rest[::-1])",
        lambda *_: test_bands.test_the_covariance_of_released_noise_is_that_of_the_inverse(3)),
    Bug("columns not of norm 1", f"{BANDS}.band_coefficients", "np.linalg.norm(coefficients) * (1 + 1e-12)", "coefficients[0]",
        lambda *_: test_bands.test_columns_have_norm_one_and_as_many_bands_as_asked_for()),
    Bug("q instead of b q accounted", "author_dp.accounting.accountant.cyclic_spending", "cyclic_rate(sample_rate, bands)", "sample_rate",
        lambda *_: test_bands.test_epsilon_is_that_of_an_independent_accountant()),
    Bug("a cycle that is not whole accounted as none", "author_dp.accounting.accountant.cyclic_spending", "-(-steps // bands)",
        "steps // bands", lambda *_: test_bands.test_bands_are_accounted_as_fewer_steps_at_a_higher_rate()),
    Bug("bands forgotten by the ledger", "author_dp.accounting.ledger.spending_under", 'header.get("noise_bands", 1)', "1",
        lambda path, _: test_bands.test_the_ledger_reads_bands_and_refuses_none(path)),
    Bug("noises kept over a resume", "dp_utils.DPTrainer.create_optimizer", "noisy.begin(self.plan.coefficients())",
        "noisy.bands or noisy.begin(self.plan.coefficients())",
        lambda path, _: test_bands.test_a_second_training_begins_a_new_mechanism(path)),
    Bug("draws thrown away", "author_dp.mechanism.optimizer.AuthorDPOptimizer.check_sums", "self.draw != self.bands.steps", "False",
        lambda path, _: test_bands.test_draws_thrown_away_end_the_run(path)),
    Bug("a share of the noise in a slice that has it alone", STEP, "std * math.sqrt(self.world_size)", "std",
        lambda path, _: test_bands.test_two_processes_add_the_noise_of_one_in_slices(path), spawned=True),
    Bug("groups from --seed", LOADER, "secrets.token_bytes(32)", "torch.initial_seed().to_bytes(32, 'big')",
        lambda path, _: test_bands.test_one_seed_deals_no_groups(path)),
    Bug("groups that move when an author leaves", f"{BANDS}.deal", "for one in hashes", "for one in range(len(hashes))",
        lambda *_: test_bands.test_a_group_follows_from_the_author_and_the_key_alone()),
    Bug("an audit that forgets delta", "author_dp.guards.text_canaries.p_value", "+ 2 * canaries * delta * alpha", "",
        lambda *_: test_audit.test_delta_costs_what_the_theorem_says()),
    Bug("an audit that picks its best guess for free", "author_dp.guards.text_canaries.lower_bound", "1 - (1 - CONFIDENCE) / len(SHARES)", "0.8",
        lambda path, patch: test_audit.test_the_bound_covers_the_true_epsilon_of_randomized_response(0.5, patch)),
    Bug("the noise of a public loss from --seed", "author_dp.training.public_loss.discrete_laplace",
        "t, s = scale.numerator, scale.denominator",
        "t, s = scale.numerator, scale.denominator\n    return round(np.random.laplace(scale=t / s))",
        lambda *_: test_release.test_noise_follows_no_seed()),
    Bug("a torn release is taken for a step", "author_dp.accounting.ledger.PrivacyLedger._torn_record",
        "if found := TORN_RELEASE.match(self._torn):", "if found := None:",
        lambda path, _: test_release.test_a_torn_release_is_paid_for_and_leaves_the_ledger_whole(path, "run")),
    Bug("a record that sticks to a torn one", "author_dp.accounting.ledger.PrivacyLedger._append", "self._mend()", "pass",
        lambda path, _: test_release.test_a_torn_release_is_paid_for_and_leaves_the_ledger_whole(path, "release")),
    Bug("the loss of another checkpoint's model", "author_dp.training.public_loss.release_loss", ', "step": trainer.state.global_step',
        ', "step": 4',
        lambda path, _: test_release.test_a_loss_is_published_for_the_model_of_its_step_only(path)),
    Bug("a scheduler of a later version taken for harmless", "author_dp.guards.options.by_metrics", "if value not in known:",
        'if value in ("best", "reduce_lr_on_plateau"):',
        lambda path, _: test_callbacks.test_a_scheduler_depends_on_step_numbers_alone_or_counts(path, "greedy")),
    Bug("the best checkpoint spared, and nobody told", "author_dp.guards.options.by_metrics",
        "if args.metric_for_best_model is not None:", "if False:",
        lambda path, _: test_callbacks.test_options_by_which_metrics_choose_are_named(
            path, {"metric_for_best_model": "loss", "save_total_limit": 1}, "--metric_for_best_model loss")),
    Bug("callbacks that nobody watches", "dp_utils.DPTrainer.__init__", "self.callback_handler = WatchedCallbacks(self)", "pass",
        lambda path, _: test_callbacks.test_a_callback_that_has_declared_nothing_changes_nothing(path, "stop", "step_end")),
    Bug("a callback that sets the learning rate", "author_dp.guards.callbacks.WatchedCallbacks.snapshot",
        "compared(trainer.optimizer),", "id(trainer.optimizer),",
        lambda path, _: test_callbacks.test_a_callback_that_has_declared_nothing_changes_nothing(
            path, "learning rate", "evaluate")),
    Bug("a hook that sets the learning rate", "author_dp.guards.callbacks.contents", "vars(thing).items()",
        'vars(thing).items() if name != "_optimizer_step_pre_hooks"',
        lambda path, _: test_callbacks.test_other_ways_to_change_the_training_are_noticed(path, "inner hook", "train_begin")),
    Bug("a scheduler known by its state_dict alone", "author_dp.guards.callbacks.WatchedCallbacks.snapshot",
        ", compared(held)", "",
        lambda path, _: test_callbacks.test_other_ways_to_change_the_training_are_noticed(path, "options of the lambda", "log")),
    Bug("options that a callback changes", "author_dp.guards.callbacks.WatchedCallbacks.snapshot",
        "vars(trainer.args).items()", "{}.items()",
        lambda path, _: test_callbacks.test_other_ways_to_change_the_training_are_noticed(path, "save_strategy", "log")),
    Bug("a callback that brings another", "author_dp.guards.callbacks.WatchedCallbacks.snapshot", "for other in self.callbacks",
        "for other in []",
        lambda path, _: test_callbacks.test_other_ways_to_change_the_training_are_noticed(path, "adds", "log")),
    Bug("a callback that changes dropout", "author_dp.guards.callbacks.of_module", "type(value) in SCALARS", "type(value) is bool",
        lambda path, _: test_callbacks.test_other_ways_to_change_the_training_are_noticed(path, "dropout", "log")),
    Bug("a method set on a callback", "author_dp.guards.callbacks.WatchedCallbacks.is_watched",
        'getattr(getattr(callback, event), "__func__", None)', "getattr(type(callback), event)",
        lambda path, _: test_callbacks.test_a_method_set_on_the_object_is_watched_too(path, test_callbacks.TrainerCallback)),
    Bug("a given scheduler that reads training losses", "author_dp.guards.callbacks.by_scheduler",
        "kind not in (STEPS, EVALUATION)", "False",
        lambda path, _: test_callbacks.test_a_given_scheduler_declares_what_it_follows_or_is_refused(path, {})),
    Bug("an author in common overlooked beside others", "author_dp.guards.options.shares_authors", ".any()", ".all()",
        lambda *_: test_guards.test_one_author_in_common_is_enough_to_share_authors()),
    Bug("a callback that takes back a step", "author_dp.guards.callbacks.writes", "tensor._version", "0",
        lambda path, _: test_callbacks.test_a_callback_that_has_declared_nothing_changes_nothing(path, "weights", "step_end")),
    Bug("a declaration that subclasses inherit", "author_dp.guards.callbacks.follows", 'vars(kind).get("follows")',
        'getattr(kind, "follows", None)', lambda path, _: test_callbacks.test_a_declaration_is_kept_to(path)),
    Bug("a callback that follows metrics not in the header", "author_dp.guards.callbacks.by_callback", "== EVALUATION", "== 0",
        lambda path, _: test_callbacks.test_where_nothing_pays_no_metrics_choose(path, "callback", "shared authors")),
    Bug("a scheduler that was given taken for harmless", "author_dp.guards.callbacks.by_scheduler",
        "if scheduler is None or", "if True or",
        lambda path, _: test_callbacks.test_after_metrics_have_chosen_nothing_is_released(path, "scheduler")),
    Bug("a loss released of a model that it chose", "author_dp.training.public_loss.release_loss",
        "check_not_chosen(broadcast(trainer.budget.ledger.by_metrics))", "pass",
        lambda path, _: test_callbacks.test_after_metrics_have_chosen_nothing_is_released(path, "callback")),
    Bug("training data that evaluate", "dp_utils.DPTrainer._check_choices",
        "self.shared_authors or shares_authors(self.train_dataset, self.eval_dataset)", "self.shared_authors",
        lambda path, _: test_callbacks.test_where_nothing_pays_no_metrics_choose(path, "option", "same hashes")),
    Bug("a callback chooses after a release", "dp_utils.DPTrainer._check_choices",
        "check_not_released(self.budget.ledger, option)", "pass",
        lambda path, _: test_callbacks.test_where_nothing_pays_no_metrics_choose(path, "callback", "an earlier release")),
    Bug("nobody knows that metrics chose a model", "author_dp.accounting.budget.Budget.start", '"by_metrics": self.by_metrics, ', "",
        lambda path, patch: test_release.test_the_ledger_says_by_which_metrics_a_model_was_chosen(path, patch)),
    Bug("a number that a run without steps has told", "author_dp.training.checkpointing.check_untold", "if not spending.steps", "if False",
        lambda path, _: test_hidden_counts.test_a_run_that_took_no_step_has_told_the_number_too(path)),
    Bug("private states that all may read", "author_dp.accounting.ledger.keep_private", "path.chmod(0o600)", "pass",
        lambda path, _: test_loggers.test_a_sealed_checkpoint_is_its_owners(path)),
    Bug("a split that forgets by which column", "author_dp.data.authors.split_name", ":{author_column}", "",
        lambda *_: test_release.test_a_split_has_another_name_with_another_rule()),
    # What is claimed for synthetic text.
    Bug("text of private prompts is covered", "author_dp.outputs.privacy_statement.claim", "prompts == PRIVATE:", "False:",
        lambda *_: test_generate.test_the_word_on_prompts_decides()),
    Bug("nobody is asked where prompts come from", "author_dp.outputs.generate.check",
        "if args.prompts and not (args.public_prompts or args.private_prompts):", "if False:",
        lambda path, _: test_generate.test_prompts_need_a_word_on_where_they_come_from(path, path)),
    Bug("text of a model with infinite epsilon is covered", "author_dp.outputs.privacy_statement.why_not_covered",
        'if guarantee["epsilon"] is None:', "if False:",
        lambda *_: test_generate.test_nothing_is_claimed_where_there_is_no_guarantee(
            {"epsilon": None, "delta": 1e-5, "disable_dp": False}, "infinite")),
    Bug("text of a model whose mechanism failed is covered", "author_dp.outputs.privacy_statement.why_not_covered",
        'if guarantee.get("alarm"):', "if False:",
        lambda *_: test_generate.test_nothing_is_claimed_where_there_is_no_guarantee(
            {"epsilon": 2.0, "delta": 1e-5, "disable_dp": False, "alarm": "half the noise"}, "half the noise")),
    Bug("an edited epsilon travels with the text", "author_dp.outputs.privacy_statement.read_guarantee", "report = report_anew(path, ledger)",
        "report = read_json(path)",
        lambda path, _: test_generate.test_epsilon_is_that_of_the_ledger_not_of_an_edited_report(test_generate.made(path))),
    Bug("a private count travels with the text", "author_dp.outputs.privacy_statement.read_guarantee",
        "{key: report[key] for key in PUBLIC_KEYS if key in report}", "report",
        lambda path, _: test_generate.test_a_sidecar_tells_public_values_only(test_generate.made(path), path)),
    Bug("a sidecar of another text believed", "author_dp.outputs.privacy_statement.check_sidecar",
        'sidecar.get("sha256") != sha256_of(text)', "False",
        lambda path, _: test_generate.test_a_text_that_was_changed_is_not_the_sidecars(test_generate.made(path), path)),
    Bug("text that nothing covers is for everybody", "author_dp.outputs.generate.generate", 'else 0o600', "else 0o666",
        lambda path, _: test_generate.test_private_prompts_are_covered_by_nothing(test_generate.made(path), path)),
    # Which weights privacy.json is about.
    Bug("privacy.json written before the weights", CERTIFIED, "    yield\n",
        "    write_json(folder / REPORT_NAME, {**make_report(), 'weights': hash_weights(folder)})\n    yield\n",
        lambda path, _: test_weights.test_wherever_a_save_is_cut_nothing_false_is_certified(path, "Ctrl-C", "model")),
    Bug("privacy.json of before left while weights are written", CERTIFIED, "remove_report(folder)", "pass",
        lambda path, _: test_weights.test_wherever_a_save_is_cut_nothing_false_is_certified(path, "killed", "model")),
    Bug("an adapter in a folder named like a checkpoint", "author_dp.models.weights.weight_files",
        "in_checkpoint or not is_checkpoint(path.parent)", 'not path.parent.name.startswith("checkpoint-")',
        lambda path, _: test_weights.test_an_adapter_in_a_subfolder_that_is_no_checkpoint_is_found(path, "checkpoint-x")),
    Bug("an adapter in a checkpoint's checkpoint", "author_dp.models.weights.weight_files", "in_checkpoint or not", "not",
        lambda path, _: test_weights.test_an_adapter_in_a_subfolder_that_is_no_checkpoint_is_found(
            path, "checkpoint-2/checkpoint-3")),
    Bug("weights without privacy that pass for a base model", CERTIFIED, "if disable_dp:", "if False:",
        lambda path, _: test_weights.test_wherever_a_run_without_privacy_is_killed_its_weights_are_not_a_base_model(
            path, "model")),
    Bug("a file beside the adapter's base", "author_dp.models.weights.check_base", "files.keys() | present.keys()", "files",
        lambda path, _: test_weights.test_a_file_beside_the_base_of_before_is_another_base(path)),
    Bug("an optimizer's state without a hash", "author_dp.training.checkpointing.check_history",
        "[OPTIMIZER_NAME] if (checkpoint / OPTIMIZER_NAME).exists() else []", "[]",
        lambda path, _: test_weights.test_an_optimizers_state_without_a_hash_is_not_resumed(path)),
    Bug("a link is published", f"{PUBLISH}.publish", " and not path.is_symlink()", "",
        lambda path, _: test_publish.test_a_file_that_is_a_link_is_left_out(a_result(path)[1], path / "new")),
    Bug("a published model within the run", f"{PUBLISH}.publish", "if out.resolve().is_relative_to(place.resolve())", "if False",
        lambda path, _: test_publish.test_an_out_within_the_folder_is_refused(a_result(path)[1], path / "new", "", "a/b")),
    Bug("logs that a group can read", "author_dp.guards.loggers.check_variable", "& 0o077", "& 0o007",
        lambda path, patch: test_loggers.test_a_folder_that_anybody_else_can_open_is_refused(path, patch, 0o750)),
    Bug("comet_ml follows into the current folder", "author_dp.guards.loggers.redirect_loggers", '{*used, "comet_ml"}', "{*used}",
        lambda path, patch: test_loggers.test_a_logger_that_follows_others_is_redirected_too(path, patch)),
    Bug("a target that is nearly kept", "author_dp.accounting.budget.Budget.affordable", "<= target)", "<= target * 1.001)",
        lambda path, _: test_one_epsilon.test_a_target_just_below_what_steps_spend_does_not_allow_the_last_of_them(path)),
    Bug("hashes of another folder", CERTIFIED, "hash_weights(folder)", "hash_weights(folder.parent)",
        lambda path, _: test_weights.test_a_run_certifies_its_own_weights_and_those_of_its_checkpoints(path, False)),
    Bug("weights of another run certified with ours", CERTIFIED, "if not own.fullmatch(Path(name).name)]", "if False]",
        lambda path, _: test_weights.test_what_somebody_puts_there_during_the_run_is_not_certified(path)),
    Bug("shards of before certified with the weights", CERTIFIED, "path.unlink()", "pass",
        lambda path, _: test_weights.test_sharded_weights_are_certified_and_replaced_by_others(path)),
    Bug("the folder's privacy.json written with each checkpoint", "dp_utils.DPTrainer._save", "with certified(",
        "with certified(self.folder, self.adapter, self.privacy_report), certified(",
        lambda path, _: test_weights.test_an_interrupted_run_has_certified_checkpoints_and_none_of_its_own(path)),
    Bug("a weight file beside the weights", CHECK, "if extra := sorted(found - named.keys()):", "if extra := []:",
        lambda path, _: test_weights.test_other_weights_are_refused_by_all_that_read_a_guarantee(path, "adapter beside")),
    Bug("other weights of the same name", CHECK, "sha256_of(folder / name) != named[name]", "False",
        lambda path, _: test_weights.test_other_weights_are_refused_by_all_that_read_a_guarantee(path, "one byte")),
    Bug("a report that names no weights", CHECK, "    if not isinstance",
        "    if named is None:\n        return\n    if not isinstance",
        lambda path, _: test_weights.test_other_weights_are_refused_by_all_that_read_a_guarantee(path, "no key")),
    Bug("a configuration that is not hashed", "author_dp.models.weights.is_weight_file", "name in CONFIGS or", "",
        lambda path, _: test_weights.test_other_weights_are_refused_by_all_that_read_a_guarantee(path, "configuration")),
    Bug("another base under the adapter", CHECK, "check_base(folder, report)", "pass",
        lambda path, _: test_weights.test_another_adapter_or_base_is_refused(path, "base")),
    Bug("a local folder for a base of the hub", "author_dp.models.weights.check_base", "if files is None:", "if files is None:\n        "
        "return\n    if False:",
        lambda path, _: test_weights.test_a_folder_that_is_named_like_a_base_of_the_hub_is_not_that_base(path)),
    Bug("text written by other weights", "author_dp.outputs.privacy_statement.read_guarantee", "check_weights(folder, report)", "pass",
        lambda path, _: test_weights.test_other_weights_are_refused_by_all_that_read_a_guarantee(path, "one byte")),
    Bug("a page on other weights", "author_dp.outputs.report.main", "check_weights(folder, report)", "pass",
        lambda path, _: test_weights.test_other_weights_are_refused_by_all_that_read_a_guarantee(path, "one byte")),
    Bug("a sidecar that names no weights", "author_dp.outputs.privacy_statement.check_sidecar", 'sidecar.get("covered") and', "False and",
        lambda path, _: test_weights.test_a_text_whose_sidecar_names_no_weights_is_not_covered(path)),
    Bug("other weights resumed", "author_dp.training.checkpointing.check_history", "check_weights(checkpoint, report, base=False)", "pass",
        lambda path, _: test_weights.test_another_checkpoint_under_the_same_certificate_is_not_resumed(path)),
    Bug("moments of another run resumed", "author_dp.training.checkpointing.check_history", "sha256_of(checkpoint / name) != known.get(name)",
        "False",
        lambda path, _: test_weights.test_another_optimizers_state_is_not_resumed(path)),
    Bug("an adapter resumed on another base", "dp_utils.DPTrainer._identify_base", "check_same_base(self.adapter_base, ",
        "print(self.adapter_base, ", lambda path, _: test_weights.test_an_adapter_is_not_resumed_on_another_base(path)),
    Bug("the best checkpoint of another run", "dp_utils.DPTrainer._load_best_model", "not self.privacy.disable_dp", "False",
        lambda path, _: test_weights.test_the_best_checkpoint_is_one_of_this_run(path)),
    Bug("a private run among results without privacy", "author_dp.training.checkpointing.find_checkpoint", "check_empty(folder)", "pass",
        lambda path, _: test_weights.test_a_private_run_does_not_begin_among_results_without_privacy(path, True, False)),
    Bug("results of another kind beside those resumed", "author_dp.training.checkpointing.check_own_results",
        "    if foreign:", "    if False:",
        lambda path, _: test_weights.test_a_run_goes_on_among_results_of_its_own_kind_only(path, True)),
    Bug("a starting model without privacy not named", "dp_utils.DPTrainer.privacy_report", '"base_model": self.base_model',
        '"base_model": None',
        lambda path, _: test_weights.test_the_model_that_training_started_from_is_named_with_its_guarantee(path)),
    Bug("text of a model that started from one without privacy is covered", "author_dp.outputs.privacy_statement.why_not_covered",
        'if not guarantee.get("base_model", {"covered": True})["covered"]:', "if False:",
        lambda path, _: test_weights.test_the_model_that_training_started_from_is_named_with_its_guarantee(path)),
    Bug("a ledger rolled back behind its checkpoints", "author_dp.accounting.ledger.main", "in reports_in(folder)", "in []",
        lambda path, _: test_weights.test_checkpoints_know_of_records_that_a_ledger_has_lost(path)),
    Bug("rows twice after an interruption", "author_dp.outputs.partial_file.Draft._go_on",
        'os.truncate(self.part, min(int(known["bytes"]), self.part.stat().st_size))',
        'known["sha256"] = hashlib.sha256(self.part.read_bytes()).hexdigest()',
        lambda path, patch: test_generate.test_an_interrupted_run_goes_on_to_the_same_rows(
            test_generate.made(path), path, patch)),
    Bug("other rows after an interruption", "author_dp.outputs.generate.write_batch", "torch.manual_seed(seed)", "pass",
        lambda path, patch: test_generate.test_an_interrupted_run_goes_on_to_the_same_rows(
            test_generate.made(path), path, patch)),
    Bug("free texts as long as private prompts allow", "author_dp.outputs.samples.Specimens.write", "max(map(len, rows))",
        "max(len(row) for rows in self.begun.values() for row in rows)",
        lambda *_: test_specimens.test_free_texts_hang_on_nothing_private()),
    Bug("texts for the report move the run's random numbers", "author_dp.outputs.samples.continue_rows",
        "with at_rest(model), torch.no_grad():", "with torch.no_grad():",
        lambda *_: test_specimens.test_the_run_is_the_same_with_them()),
    Bug("what held-out authors wrote called covered", "author_dp.outputs.page.specimens_in_html",
        'f"Held-out texts, continued: {PRIVATE}"', 'f"Held-out texts, continued: {COVERED if covered else PRIVATE}"',
        lambda *_: test_specimens.test_only_free_texts_of_a_model_with_a_guarantee_are_called_covered(True)),
    Bug("text of a model without a guarantee called covered", "author_dp.outputs.page.specimens_in_html",
        "{COVERED if covered else PRIVATE}", "{COVERED}",
        lambda *_: test_specimens.test_only_free_texts_of_a_model_with_a_guarantee_are_called_covered(False)),
    Bug("evaluation on another scale than training", "author_dp.outputs.figures.loss_points", "row[AUTHOR_LOSS]",
        'row["eval_loss"]', lambda path, _: test_report.test_losses_of_training_and_evaluation_are_on_one_scale(path)),
    Bug("statistics for everybody", "author_dp.outputs.report.Statistics.add", "private=True", "private=False",
        lambda path, _: test_report.test_what_was_found_before_training_outlives_an_interruption(path)),
    Bug("a report on private text for everybody", "author_dp.outputs.synthetic_report.make_report", "private=True", "private=False",
        lambda path, patch: test_synthetic_report.test_the_report_is_for_its_owner(
            test_synthetic_report.make_files(path, patch))),
    Bug("authors of the training taken for strangers", "author_dp.outputs.synthetic_report.split",
        "rule is not None and rule != split_name(args.split_seed, args.eval_fraction, args.author_column)", "False",
        lambda *_: test_synthetic_report.test_other_held_out_authors_than_the_runs_are_refused()),
    Bug("a passage that several wrote taken for one author's", "author_dp.outputs.overlap.shared_passages",
        "alone &= ~((mine == best) & (far == best))", "pass",
        lambda *_: test_synthetic_report.test_passages_are_those_of_a_plain_search()),
    Bug("shares: a part of the noise for each process", SHARED_STEP, "self.noise_multiplier * self.max_grad_norm",
        "self.noise_multiplier * self.max_grad_norm / self.world_size**0.5",
        lambda path, _: test_sharding.test_noise_is_of_the_promised_scale_once_and_independent_between_shares(path)),
    Bug("shares: noise on the first process alone", SHARED_STEP, "if std > 0:", "if std > 0 and dist.get_rank() == 0:",
        lambda path, _: test_sharding.test_noise_is_of_the_promised_scale_once_and_independent_between_shares(path)),
    Bug("shares: the same noise for each", SHARED_STEP, "self.noise.add_(part, std)",
        "part.add_(torch.randn(len(part), generator=torch.Generator().manual_seed(7)), alpha=std)",
        lambda path, _: test_sharding.test_noise_is_of_the_promised_scale_once_and_independent_between_shares(path)),
    Bug("shares: the pad noised twice", SHARED_STEP, "self._own_pad.add_(self._behind[self._place])",
        "self.noise.add_(self._own_pad.add_(self._behind[self._place]), self.noise_multiplier * self.max_grad_norm)",
        lambda path, _: test_sharding.test_every_process_sees_the_noise_of_all_in_the_pad_and_canaries_once(path)),
    Bug("shares: canaries of one process alone", SHARED_STEP, "dist.all_reduce(self._behind)", "pass",
        lambda path, _: test_sharding.test_every_process_sees_the_noise_of_all_in_the_pad_and_canaries_once(path)),
    Bug("shares: canaries used twice", "author_dp.mechanism.fsdp.ShardedOptimizer.zero_grad", "self._behind.zero_()", "pass",
        lambda path, _: test_sharding.test_every_process_sees_the_noise_of_all_in_the_pad_and_canaries_once(path)),
    Bug("shares: noise with bands that reaches no sum", SHARED_STEP, "self.bands.add_(self._slice,",
        "self.bands.add_(torch.zeros_like(self._slice),",
        lambda path, _: test_sharding.test_bands_of_noise_are_correlated_over_steps_in_every_share(path)),
    Bug("shares: bands for a part of the share", "author_dp.mechanism.fsdp.ShardedOptimizer.own_slice", "return self.sums",
        "return self.sums.tensor_split(self.world_size)[dist.get_rank()]",
        lambda path, _: test_sharding.test_bands_of_noise_are_correlated_over_steps_in_every_share(path)),
    Bug("shares: a step that no ledger holds", SHARED_STEP, "self.before_release()", "pass",
        lambda path, _: test_sharding.test_nothing_is_updated_when_the_step_cannot_be_recorded(path)),
    Bug("shares: the mean of the processes' sums", SHARED_SUMS, "view_as(mine))", "view_as(mine), alpha=1 / world_size)",
        lambda path, _: test_sharding.test_the_update_in_shares_is_the_naive_one(path, "tied", test_sharding.UNEQUAL[:2])),
    Bug("shares: an idle round counts", SHARED_SUMS, "if not self._counts:", "if False:",
        lambda path, _: test_sharding.test_the_update_in_shares_is_the_naive_one(path, "tied", test_sharding.UNEQUAL[:2])),
    Bug("shares: the sums of one process alone", SHARED_SUMS, "reduce_scatter(share, whole.view(-1),",
        "share.copy_(whole[dist.get_rank()]) if True else reduce_scatter(share, whole.view(-1),",
        lambda path, _: test_sharding.test_the_update_in_shares_is_the_naive_one(path, "tied", test_sharding.UNEQUAL[:2])),
    Bug("every model's text called covered", "author_dp.outputs.page.page", '"specimens", {}), has_guarantee(report))',
        '"specimens", {}), True)',
        lambda path, _: test_report.test_the_page_calls_text_covered_where_there_is_a_guarantee_alone(path, True)),
    Bug("texts of the run before, perhaps without privacy", "author_dp.outputs.report.Statistics.on_train_begin",
        "unlink(missing_ok=True)", "exists()",
        lambda path, _: test_report.test_nothing_of_an_earlier_run_is_in_the_statistics(path)),
    Bug("a report for everybody", "author_dp.outputs.report.write_report", "keep_private(path)", "path.touch(mode=0o644)",
        lambda path, _: test_report.test_the_page_calls_text_covered_where_there_is_a_guarantee_alone(path, True)),
    Bug("bfloat16: what an adapter trains in full is rounded", "author_dp.models.loading.load_trained",
        "set_peft_model_state_dict(model, ", "(lambda *_: None)(model, ",
        lambda path, _: test_frozen.test_what_an_adapter_trains_in_full_is_loaded_exactly(test_frozen.make_folders(path), path)),
    Bug("Adam corrected as if noise had no bands", "author_dp.mechanism.optimizer.AuthorDPOptimizer.released_variance",
        "1.0 if self.bands is None else self.bands.variance", "1.0",
        lambda path, _: test_adam.test_a_run_tells_it_the_variance_of_what_it_releases(path, "4")),
    Bug("Adam corrected by noise that was not divided", "author_dp.mechanism.optimizer.AuthorDPOptimizer.released_variance",
        " / self.expected_batch_size", "",
        lambda path, _: test_adam.test_a_run_tells_it_the_variance_of_what_it_releases(path, "1")),
    Bug("Adam's mean of noise not that of the squares", "author_dp.mechanism.adam_bc.NoiseCorrectedAdamW._update",
        'state["noise_variance"] += (1 - beta2)', 'state["noise_variance"] += (1 - beta1)',
        lambda *_: test_adam.test_updates_are_those_of_the_paper_also_where_noise_changes()),
    Bug("4 bits: an evaluation cuts the gradients off", f"{FROZEN}.compute_in", "layer.support_avx512bf16_for_cpu = False",
        "pass", lambda path, _: test_frozen.test_an_evaluation_leaves_the_gradients_as_they_are(
            test_frozen.make_folders(path), "4 bits")),
    Bug("4 bits: the backward pass of other weights", f"{FROZEN}.compute_in", "layer.weight.quant_state.dtype = dtype", "pass",
        lambda path, _: test_frozen.test_it_computes_what_a_float32_model_with_the_rounded_weights_does(
            test_frozen.make_folders(path), "4 bits")),
    Bug("4 bits: biases that the layer rounds are trained", f"{FROZEN}.check_trained",
        "any(parameter.requires_grad for parameter in layer.parameters(recurse=False))", "False",
        lambda path, _: test_frozen.test_what_is_in_4_bits_is_not_trained(test_frozen.make_folders(path), path)),
    Bug("bfloat16: what is trained stays in it", f"{FROZEN}.settle", "not parameter.is_floating_point()",
        "not parameter.is_floating_point() or parameter.requires_grad",
        lambda path, _: test_frozen.test_trained_biases_of_a_base_in_bfloat16_are_float32_and_have_a_rule(
            test_frozen.make_folders(path))),
    Bug("bfloat16: a copy in float32 waits for the backward pass", f"{FROZEN}.Widened.forward", "save_for_backward(weight)",
        "save_for_backward(weight.float())",
        lambda path, _: test_frozen.test_no_float32_copy_of_a_frozen_matrix_waits_for_the_backward_pass(
            test_frozen.make_folders(path))),
    Bug("bfloat16: another product than that of the weights", f"{FROZEN}.Widened.backward", "weight.to(gradient.dtype)",
        "weight.to(gradient.dtype).round(decimals=2)",
        lambda path, _: test_frozen.test_it_computes_what_a_float32_model_with_the_rounded_weights_does(
            test_frozen.make_folders(path), "bfloat16")),
    # What others can read.
    Bug("losses in the current folder", f"{LOGGERS}.redirect_loggers", "if (chosen := users_choice(variable)) is None:",
        "if (chosen := users_choice(variable)) is None and args.push_to_hub:",
        lambda path, patch: test_loggers.test_loggers_keep_losses_in_the_output_folder(path, patch, "tensorboard")),
    Bug("logs that others can read", "author_dp.permissions.owner_only", "os.umask(0o077)", "os.umask(0o022)",
        lambda path, patch: test_loggers.test_loggers_keep_losses_in_the_output_folder(path, patch, "tensorboard")),
    Bug("log folders that others can enter", f"{LOGGERS}.make_private_folder", "mode=0o700", "mode=0o755",
        lambda path, patch: test_loggers.test_loggers_keep_losses_in_the_output_folder(path, patch, "tensorboard")),
    Bug("a log folder of the user's that others can read", f"{LOGGERS}.check_variable", "& 0o077", "& 0",
        lambda path, patch: test_loggers.test_a_folder_of_the_users_choice_must_be_private(path, patch)),
    Bug("a logger that nobody looked at", f"{LOGGERS}.check_loggers", "if name not in VARIABLES:",
        "if name not in VARIABLES:\n            continue\n        if False:",
        lambda *_: test_loggers.test_other_loggers_are_refused("one_that_comes_next")),
    Bug("a logger that uploads checkpoints", f"{LOGGERS}.check_variable", "if value == OFF:", "if value == OFF and False:",
        lambda _, patch: test_loggers.test_loggers_upload_no_checkpoints(patch, "wandb", "WANDB_LOG_MODEL")),
    Bug("training_args.bin and the like for everybody", "dp_utils.DPTrainer._save", "with owner_only():", "if True:",
        lambda path, patch: test_loggers.test_others_read_nothing_but_the_guarantee(path, patch)),
    Bug("all_results.json for everybody", "dp_utils.DPTrainer.save_metrics", "with owner_only():", "if True:",
        lambda path, _: test_loggers.test_metrics_that_a_program_saves_are_its_owners(path)),
    Bug("an older checkpoint's files stay everybody's", "author_dp.training.checkpointing.seal", "keep_private(path)", "pass",
        lambda path, _: test_loggers.test_a_sealed_checkpoint_is_its_owners(path)),
    Bug("the number of samples is published", f"{PUBLISH}.publish", "write_json(temporary / REPORT_NAME, report)",
        "shutil.copyfile(folder / REPORT_NAME, temporary / REPORT_NAME)",
        lambda path, _: test_publish.test_nothing_private_is_in_what_is_published(a_result(path), path)),
    Bug("a list of what is private instead", f"{PUBLISH}.publish", "for pattern in COPIED for path in folder.glob(pattern)",
        "for path in folder.iterdir() if path.name not in ('trainer_state.json', 'training_args.bin', REPORT_NAME)",
        lambda path, _: test_publish.test_exactly_the_listed_files_are_copied(a_result(path), path, "")),
    Bug("publish without a look at the weights", "author_dp.outputs.privacy_statement.read_guarantee", "check_weights(folder, report)", "pass",
        lambda path, _: test_publish.test_other_weights_are_not_published(a_result(path)[1], path / "new")),
    Bug("weights that changed meanwhile", f"{PUBLISH}.publish", 'if hash_weights(temporary) != report["weights"]:', "if False:",
        lambda path, patch: test_publish.test_weights_that_change_while_they_are_copied_are_not_published(
            a_result(path)[1], path / "new", patch)),
    Bug("whatever privacy.json calls weights", f"{PUBLISH}.publishable_report", "if not names.fullmatch(name)", "if not name",
        lambda path, _: test_publish.test_only_names_that_a_run_saves_can_be_weights(a_result(path)[1], path / "new")),
    Bug("a model without a guarantee is published", f"{PUBLISH}.publishable_report", "if reason := why_not_covered(guarantee):",
        "if reason := None:", lambda path, _: test_publish.test_a_result_without_a_guarantee_is_not_published(
            a_result(path)[1], path / "new", {"epsilon": None}, "infinite")),
    Bug("times that tell how long steps took", f"{PUBLISH}.make_public", "os.utime(path, (TIME, TIME))", "pass",
        lambda path, _: test_publish.test_all_may_read_it_and_times_tell_nothing(a_result(path)[1], path / "new")),
    Bug("the time of day in the ledger", "author_dp.accounting.budget.Budget.start", ".date().isoformat()", ".isoformat()",
        lambda path, _: test_publish.test_all_may_read_it_and_times_tell_nothing(a_result(path)[1], path / "new")),
    Bug("the folder itself is uploaded", f"{PUBLISH}.upload", 'publish(folder, place / "model", repo)',
        'shutil.copytree(folder, place / "model")',
        lambda path, patch: test_publish.test_the_hub_gets_what_publish_copies(path, patch, "full")),
    Bug("the Trainer's own upload of checkpoints", "dp_utils.DPTrainer._push_from_checkpoint",
        "if not self.is_world_process_zero()", "return Trainer._push_from_checkpoint(self, checkpoint_folder)\n"
        "    if not self.is_world_process_zero()",
        lambda path, patch: test_publish.test_the_hub_gets_what_publish_copies(path, patch, "full")),
    Bug("checkpoints with losses are uploaded", "author_dp.guards.options.check_uploads",
        "not in (HubStrategy.END, HubStrategy.EVERY_SAVE)",
        "in (HubStrategy.ALL_CHECKPOINTS,)",
        lambda path, patch: test_publish.test_uploads_of_more_or_without_a_guarantee_are_refused(
            path, patch, {"hub_strategy": "checkpoint"}, "--hub_strategy checkpoint")),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_the_suite_notices(bug, tmp_path, monkeypatch):
    function = find(bug.function)
    if bug.spawned:
        plant = [bug.function, bug.old, bug.new]  # one_step.py is told
        monkeypatch.setattr(test_processes, "run_processes", functools.partial(test_processes.run_processes, plant=plant))
    else:
        monkeypatch.setattr(function, "__code__", with_edit(function, bug.old, bug.new))
    np.random.seed(0)
    with pytest.raises(
        (AssertionError, pytest.fail.Exception, UserError, MechanismError)
    ) as noticed:  # or the run itself notices
        bug.check(tmp_path, monkeypatch)
    if noticed.errisinstance(UserError):  # the proof at the start may be the first to notice, or the second pass of a step
        assert any(words in str(noticed.value) for words in ("does not clip this model rightly", "when they ran again"))
