"""Write the report of a folder: the program of author_dp/outputs/report.py."""

from author_dp.cli import run_program
from author_dp.outputs.report import main, write_report

__all__ = ["main", "write_report"]

if __name__ == "__main__":
    run_program("author_dp.report", main)
