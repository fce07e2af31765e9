"""What surrounds the optimizer's steps: data loading, checkpoints, evaluation, signals."""
