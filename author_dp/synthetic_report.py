"""Compare synthetic text with the training data: the program of author_dp/outputs/synthetic_report.py."""

from author_dp.cli import run_program
from author_dp.outputs.synthetic_report import main

if __name__ == "__main__":
    run_program("author_dp.synthetic_report", main)
