"""Generate synthetic text: the program of author_dp/outputs/generate.py."""

from author_dp.cli import run_program
from author_dp.outputs.generate import main

if __name__ == "__main__":
    run_program("author_dp.generate", main, interrupted="the same command resumes")
