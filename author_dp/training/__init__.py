"""Run the training around the optimizer's steps: setup, data loading, checkpoints, evaluation, signals."""
