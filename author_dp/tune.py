"""Search hyperparameters with one guarantee for the search: the program of author_dp/outputs/tune.py."""

from author_dp.cli import run_program
from author_dp.outputs.tune import main

if __name__ == "__main__":
    run_program("author_dp.tune", main)
