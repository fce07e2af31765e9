"""What a run may spend, and what it has spent: accountants, noise calibration, the ledger."""
