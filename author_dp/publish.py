"""Copy what may be published of an output folder: `python -m author_dp.publish`, the program of author_dp/outputs/publish.py."""

from author_dp.cli import run_program
from author_dp.outputs.publish import main

if __name__ == "__main__":
    run_program("author_dp.publish", main)
