"""Author-level differential privacy as a library, in eight packages; it needs nothing beside this folder.

Read `mechanism` first (a step, in order), then `clipping` (per-author gradients), `accounting` (epsilon, noise, the ledger) and
`guards` (checks before and during training). `data` and `models` are what a step works on, `training` surrounds the steps,
`outputs` what comes out. Imports run in one direction (docs/architecture.md).

Programs: `python -m author_dp.ledger | report | publish | generate | synthetic_report`.
"""

import logging

# It would warn in each run on some CPUs, with 4 bits or without, that it could not fetch a faster kernel from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
