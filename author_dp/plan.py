"""Plan a run before it reads any data: the program of author_dp/outputs/planner.py."""

from author_dp.cli import run_program
from author_dp.outputs.planner import main

if __name__ == "__main__":
    run_program("author_dp.plan", main)
