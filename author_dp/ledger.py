"""Report what the runs of one output directory, or of several, have spent: see author_dp/accounting/ledger_report.py."""

from author_dp.accounting.ledger_report import main
from author_dp.cli import run_program

if __name__ == "__main__":
    run_program("author_dp.ledger", main)
