"""Planted bugs that several tests must notice: function, old and new line. What one test must notice stands at that test.

test_mutation.py checks that each bug stands once.
"""

CLIP = "clipping.author_groups.AuthorClipFactors.__init__"
ADD_NOISE = "mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide"
NOISE = "mechanism.noise.GaussianNoise"
SAMPLER = "mechanism.sampling.PoissonAuthorSampler"
MAKE_SAMPLER = "training.dataloading.make_sampler"
TRAINING_STEP = "dp_utils.DPTrainer.training_step"

# --- clipping -------------------------------------------------------------------------------------------

NO_CLIP = (CLIP, "(clip_norm / norms).clamp(max=1.0)", "torch.ones_like(norms)")
NO_CLIP_BY_GRAD_SAMPLE = (
    "clipping.grad_sample.GradSampleClipping.backward", "(self.clip_norm / norms).clamp(max=1.0)", "torch.ones_like(norms)",
)  # fmt: skip
TWICE_THE_CLIP_NORM = (CLIP, "(clip_norm / norms)", "(2 * clip_norm / norms)")
CLIP_PER_SAMPLE = (
    TRAINING_STEP, "non_blocking=True)", "non_blocking=True)\n            "
    "n = len(microbatch['author']); microbatch.update(author=torch.arange(n), num_authors=n, samples_each=1, "
    "is_real=torch.arange(n) < microbatch['num_real'])",
)  # fmt: skip
TIED_COUNTED_AS_TWO = ("clipping.grad_factors.tied_grad_factors_norm", "2 * rows.mul_", "0 * rows.mul_")
TIED_COUNTED_AS_TWO_FORMED = ("clipping.grad_factors.add_grad_factors", "grad.gradients.float()", "0 * grad.gradients")

# --- noise ----------------------------------------------------------------------------------------------

NO_NOISE = (ADD_NOISE, "if std > 0:", "if False:")
NOISE_ON_RANK_0_ALONE = (ADD_NOISE, "if std > 0:", "if std > 0 and torch.distributed.get_rank() == 0:")
HALF_THE_NOISE = (ADD_NOISE, "self.noise.add_(chunk, std)", "self.noise.add_(chunk, std / 2)")
NOISE_FROM_THE_SEED = (f"{NOISE}.__init__", "secrets.token_bytes(16)", "torch.initial_seed().to_bytes(16, 'big')")
THE_SAME_NOISE_IN_EVERY_RUN = (f"{NOISE}.__init__", "secrets.token_bytes(16)", "bytes(16)")
HALF_OF_THE_VARIANCE = (f"{NOISE}._add_pairs", "mul_(-2 * std * std)", "mul_(-std * std)")
NOISE_WITHOUT_CLIP_NORM = (ADD_NOISE, "self.noise_multiplier * self.max_grad_norm", "self.noise_multiplier")
NOISE_FOR_PARAMETERS_ALONE = (
    ADD_NOISE, "self.grad_buffer.sums.split(self.noise.chunk_size)",
    "self.grad_buffer.sums[:-len(self.grad_buffer.probe)].split(self.noise.chunk_size)",
)  # fmt: skip
NOISE_OF_EVERY_MICROBATCH = (
    TRAINING_STEP, "total += losses.detach()",
    "self.optimizer.optimizer.grad_buffer.sums.add_(torch.randn_like(self.optimizer.optimizer.grad_buffer.sums) "
    "* self.plan.noise_multiplier * self.plan.clip_norm); total += losses.detach()",
)  # fmt: skip
SEEDED_NOISE_IN_EACH_STEP = (
    ADD_NOISE, "self.noise.add_(chunk, std)",
    "chunk.add_(torch.randn(len(chunk), generator=torch.Generator().manual_seed(7)), alpha=std)",
)  # fmt: skip
DIVISION_BY_THE_REAL_BATCH_SIZE = (
    TRAINING_STEP, "model.train()",
    "model.train(); self.optimizer.optimizer.expected_batch_size = max(1, inputs.batch_size)",
)  # fmt: skip
A_BAND_DROPPED = (
    "mechanism.noise.BandMFNoise.add_", "zip(rows, lag_coefficients)", "zip(rows[1:], lag_coefficients[1:])",
)  # fmt: skip

# --- sampling -------------------------------------------------------------------------------------------

RATE_DOUBLED = (MAKE_SAMPLER, "sample_rate=plan.sample_rate", "sample_rate=min(1.0, 2 * plan.sample_rate)")
AN_AUTHOR_ALWAYS_IN = (
    f"{SAMPLER}.sample_indices", "return sampled[sampled < size]", "return np.union1d(sampled[sampled < size], 3)",
)  # fmt: skip
SAMPLING_FROM_THE_SEED = (MAKE_SAMPLER, "secrets.randbits(128)", "torch.initial_seed()")
GROUPS_FROM_THE_SEED = (MAKE_SAMPLER, "secrets.token_bytes(32)", "torch.initial_seed().to_bytes(32, 'big')")
A_SAMPLER_KEY_EACH = (MAKE_SAMPLER, "broadcast(secrets.randbits(128))", "secrets.randbits(128)")
A_GROUP_KEY_EACH = (MAKE_SAMPLER, "broadcast(secrets.token_bytes(32))", "secrets.token_bytes(32)")
ALL_OF_THE_BATCH_ON_EACH = (f"{SAMPLER}.sample_batch", "authors[self.rank :: self.world_size]", "authors")
THE_SAME_HALF_ON_EACH = (f"{SAMPLER}.sample_batch", "self.rank ::", "0 ::")

# --- outputs --------------------------------------------------------------------------------------------

WEIGHTS_NOT_CHECKED = ("outputs.privacy_statement.read_privacy_statement", "check_weights(folder, report)", "pass")
