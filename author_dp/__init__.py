"""Author-level differential privacy as a library, one promise a module; it needs nothing beside this folder.

Read `mechanism` first (a step, in order), then `clipping` (per-author clipping), `noise`, `accounting`, `plan`, `ledger` and
`budget`; the rest when you need it: `readers` and `authors` (files as they are written), `hub`, `model_folders`, `evaluation`,
`dry_run`, `pld` (where the accountant rounds), `selfcheck` (a run checks its own noise), `guards` (what is refused),
`checkpoints` (how a run ends early and goes on), `audit`, `report`, `processes` and `errors`.

As programs: `python -m author_dp.ledger FOLDER`, `python -m author_dp.report FOLDER`.
"""

import logging

# It would warn each run on some CPUs, with 4 bits or without, that it could not fetch a faster kernel from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
