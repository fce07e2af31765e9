"""Merge an adapter into its base, with its guarantee: the program of author_dp/outputs/merge.py."""

from author_dp.cli import run_program
from author_dp.outputs.merge import main

if __name__ == "__main__":
    run_program("author_dp.merge", main)
