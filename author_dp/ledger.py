"""What the runs of a folder, or of several, have spent: the program of author_dp/accounting/ledger_report.py."""

from author_dp.accounting.ledger_report import main
from author_dp.cli import run_program

if __name__ == "__main__":
    run_program("author_dp.ledger", main)
