"""Author-level differential privacy as a library. It needs no other file of this repository.

Packages, each of which imports only those below it (docs/architecture.md):

    outputs      reports, model cards, synthetic texts and their privacy statements
    training     the Trainer around the mechanism: setup, checkpoints, evaluation, the released loss
    guards       what is refused, and how a run monitors its own sampling, clipping and noise
    mechanism    one step: sampling, microbatches, noise, optimizer, sharding
    clipping     per-author gradient norms and clipped sums
    data         files, authors, tokens, splits
    models       base models, adapters, quantization, certified weights
    accounting   epsilon, the plan of a run, its ledger and its budget

Read `mechanism` first, then `clipping` and `accounting`. Programs: `python -m author_dp.X FOLDER`, where X is ledger, report,
generate, publish, plan, tune or synthetic_report.
"""

import logging

# On some CPUs it warns in every run, even without 4-bit weights, that it cannot fetch a faster kernel from the Hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
