"""Account for privacy loss: accountants, noise calibration, and the plan, ledger and budget of a run."""
