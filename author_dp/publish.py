"""Copy the files of an output folder that may be published: the program of author_dp/outputs/publish.py."""

from author_dp.cli import run_program
from author_dp.outputs.publish import main

if __name__ == "__main__":
    run_program("author_dp.publish", main)
