"""ledger.py and hash_chain.py: what is on disk when, and which changes are detected."""

import errno
import json
import os

import pytest
from mutation import catches

from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.hash_chain import HashChain, record_hash
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import UserError
from author_dp.files import write_json

HEADER = {"noise_multiplier": 0.7, "sample_rate": 0.1, "steps": 10, "num_authors": 1_000, "clip_norm": 1.0,
          "target_epsilon": 8.0, "delta": 1e-3}  # fmt: skip


def make_ledger(folder, num_steps=3, **header) -> PrivacyLedger:
    ledger = PrivacyLedger(folder / "privacy_ledger.jsonl")
    ledger.start_run({**HEADER, **header})
    for _ in range(num_steps):
        ledger.record_step()
    return ledger


@catches("earlier runs forgotten", "accounting.ledger.PrivacyLedger._apply", "self.steps_per_run.append(0)",
    "self.steps_per_run.clear(); self.runs.clear(); self.steps_per_run.append(0)")  # fmt: skip
def test_ledger_counts_runs_and_steps(tmp_path):
    make_ledger(tmp_path)
    again = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    again.start_run({"noise_multiplier": 1.5, "sample_rate": 0.2})
    again.record_step()
    expected = [MechanismEvent(0.7, 0.1, 3), MechanismEvent(1.5, 0.2, 1)]
    assert again.events == PrivacyLedger(again.path).events == expected and again.steps == 4
    records = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [record["record"] for record in records] == ["run", "step", "step", "step", "run", "step"]
    assert [record.get("step") for record in records] == [None, 1, 2, 3, None, 4]
    assert again.record_hashes == PrivacyLedger(again.path).record_hashes and len(set(again.record_hashes)) == 7


@catches("a record that is not on disk", "accounting.hash_chain.HashChain.append", "os.fsync(descriptor)", "pass")
def test_record_step_returns_after_fsync(tmp_path, monkeypatch):
    ledger, synced = make_ledger(tmp_path, num_steps=0), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    for steps in (1, 2, 3):
        ledger.record_step()
        assert PrivacyLedger(ledger.path).steps == steps
        assert len(synced) == steps and synced[-1] == ledger.path.stat().st_size


@catches("a torn record forgotten", "accounting.ledger.PrivacyLedger.read", "if self._chain.truncated and self.runs:",
    "if False:", cut=5)  # fmt: skip
@pytest.mark.parametrize("cut", [1, 5, 60])
def test_ledger_counts_truncated_record_as_step(tmp_path, cut):
    ledger = make_ledger(tmp_path, num_steps=3)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    truncated = PrivacyLedger(ledger.path)
    assert truncated.steps == 3
    truncated.start_run(HEADER)
    truncated.record_step()
    assert (
        PrivacyLedger(ledger.path).steps == truncated.steps == 4
        and PrivacyLedger(ledger.path).record_hashes == truncated.record_hashes
    )


def test_ledger_ignores_truncated_header(tmp_path):
    ledger = make_ledger(tmp_path, num_steps=0)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
    truncated = PrivacyLedger(ledger.path)
    assert truncated.steps == 0 and truncated.runs == []
    truncated.start_run(HEADER)
    assert len(PrivacyLedger(ledger.path).runs) == 1


def edited(text: bytes, how: str) -> bytes:
    lines = text.splitlines(keepends=True)
    record = json.loads(lines[0])
    return b"".join(
        {
            "less noise counted": [json.dumps({**record, "noise_multiplier": 9.0}).encode() + b"\n", *lines[1:]],
            "a removed step": [lines[0], *lines[2:]],
            "an inserted step": [*lines[:2], lines[1], *lines[2:]],
            "order": [lines[0], lines[2], lines[1], *lines[3:]],
            "nonsense": [lines[0], b"nonsense\n", *lines[2:]],
            "an empty line": [lines[0], b"\n", *lines[2:]],
            "a list": [lines[0], b"[]\n", *lines[2:]],
            "a step number": [lines[0], lines[1].replace(b'"step": 1', b'"step": 2'), *lines[2:]],
            "another run's records": [*lines, *lines],
        }[how]
    )


@catches("an edited record believed", "accounting.hash_chain.HashChain._verify",
    '(found := record.pop("link")) != record_hash(self.record_hashes[-1], record)', 'not (found := record.pop("link"))',
    how="less noise counted")  # fmt: skip
@pytest.mark.parametrize(
    "how",
    ["less noise counted", "a removed step", "an inserted step", "order", "nonsense", "an empty line", "a list",
     "a step number", "another run's records"],
)  # fmt: skip
def test_ledger_refuses_edits(tmp_path, how):
    ledger = make_ledger(tmp_path, num_steps=4)
    ledger.path.write_bytes(edited(ledger.path.read_bytes(), how))
    with pytest.raises(UserError, match=r"line \d+ was changed"):
        PrivacyLedger(ledger.path)


def test_ledger_refuses_skipped_step_number(tmp_path):
    ledger = make_ledger(tmp_path, num_steps=1)
    ledger._chain.append({"record": "step", "step": 3})
    with pytest.raises(UserError, match="line 3"):
        PrivacyLedger(ledger.path)


def test_check_report_refuses_ledger_that_lost_records(tmp_path):
    ledger = make_ledger(tmp_path, num_steps=4)
    write_json(tmp_path / "privacy.json", {"disable_dp": False, "ledger_link": ledger.record_hashes[-1]})
    ledger.check_report(tmp_path / "privacy.json")
    ledger.record_step()
    PrivacyLedger(ledger.path).check_report(tmp_path / "privacy.json")
    ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(UserError, match=r"lacks records that .*privacy\.json"):
        PrivacyLedger(ledger.path).check_report(tmp_path / "privacy.json")


@catches("a ledger that was taken away begins anew", "accounting.hash_chain.HashChain.append",
    "0 if self._size else os.O_CREAT", "os.O_CREAT", fault="deleted")  # fmt: skip
@pytest.mark.parametrize("fault", ["deleted", "a folder", "written to", "full"])
def test_record_step_counts_nothing_if_unwritable(tmp_path, fault, monkeypatch):
    ledger = make_ledger(tmp_path)
    content = ledger.path.read_bytes()
    if fault == "written to":
        ledger.path.write_bytes(content + b"{}\n")
    elif fault == "full":
        write, left = os.write, [40, 0]

        def write_little(descriptor, data):
            size = left.pop(0)
            if not size:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[:size])

        monkeypatch.setattr(os, "write", write_little)
    else:
        ledger.path.unlink()
        if fault == "a folder":
            ledger.path.mkdir()
    with pytest.raises(UserError, match=r"privacy_ledger\.jsonl: cannot be written .*--output_dir"):
        ledger.record_step()
    assert ledger.steps == 3 and (fault != "deleted" or not ledger.path.exists())


def test_locked_keeps_second_run_out(tmp_path, monkeypatch):
    monkeypatch.setattr("author_dp.accounting.hash_chain.LOCK_SECONDS", 0)
    first, second = PrivacyLedger(tmp_path / "privacy_ledger.jsonl"), PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    with first.locked():
        first.start_run(HEADER)
        first.record_step()
        with pytest.raises(UserError, match="in use by another run"):
            with second.locked():
                pass
    with second.locked():
        assert second.steps == 1  # it was read again: the steps of the first run are known


def test_ledger_counts_truncated_failure_as_failure(tmp_path):
    ledger = make_ledger(tmp_path)
    ledger.record_failure("noise")
    ledger.path.write_bytes(ledger.path.read_bytes()[:-70])
    truncated = PrivacyLedger(ledger.path)
    with pytest.raises(UserError, match="its models have no guarantee"):
        truncated.check_no_failure()


@pytest.mark.parametrize(("replacement", "expected"), [({"n": 3}, [1, 3, 4]), (None, [1, 4])])
def test_hash_chain_replaces_truncated_record(tmp_path, replacement, expected):
    chain = HashChain(tmp_path / "records.jsonl")
    for n in (1, 2):
        chain.append({"n": n})
    chain.path.write_bytes(chain.path.read_bytes()[:-5])
    again = HashChain(chain.path)
    assert list(again.read()) == [{"n": 1}] and again.truncated.startswith(b'{"n": 2')
    again.repair_tail(replacement)
    again.append({"n": 4})
    assert [record["n"] for record in HashChain(chain.path).read()] == expected


def test_record_hash_depends_on_previous_hash_and_record():
    first = record_hash("a", {"record": "step", "step": 1})
    assert first != record_hash("b", {"record": "step", "step": 1}) and first != record_hash("a", {"record": "step", "step": 2})
