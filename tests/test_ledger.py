"""ledger.py: what is on disk when, what is noticed, and what the program says."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_trainer
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
from test_accounting import exact_epsilon

from author_dp.accounting.accountant import EpsilonAccountant, MechanismEvent, find_noise_multiplier
from author_dp.accounting.hash_chain import record_hash
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import main
from author_dp.errors import UserError
from author_dp.files import write_json

HEADER = {"noise_multiplier": 0.7, "sample_rate": 0.1, "steps": 10, "num_authors": 1_000, "clip_norm": 1.0,
          "target_epsilon": 8.0, "delta": 1e-3}  # fmt: skip


def make_ledger(folder, taken=3, **header) -> PrivacyLedger:
    ledger = PrivacyLedger(folder / "privacy_ledger.jsonl")
    ledger.start_run({**HEADER, **header})
    for _ in range(taken):
        ledger.record_step()
    return ledger


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


def test_a_step_is_on_disk_when_record_step_returns(tmp_path, monkeypatch):
    ledger, synced = make_ledger(tmp_path, taken=0), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    for steps in (1, 2, 3):
        ledger.record_step()
        assert PrivacyLedger(ledger.path).steps == steps
        assert len(synced) == steps and synced[-1] == ledger.path.stat().st_size


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_record_counts_as_a_step_now_and_later(tmp_path, cut):
    ledger = make_ledger(tmp_path, taken=3)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    torn = PrivacyLedger(ledger.path)
    assert torn.steps == 3
    torn.start_run(HEADER)
    torn.record_step()
    assert PrivacyLedger(ledger.path).steps == torn.steps == 4 and PrivacyLedger(ledger.path).record_hashes == torn.record_hashes


def test_a_torn_header_is_no_run(tmp_path):
    ledger = make_ledger(tmp_path, taken=0)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
    torn = PrivacyLedger(ledger.path)
    assert torn.steps == 0 and torn.runs == []
    torn.start_run(HEADER)
    assert len(PrivacyLedger(ledger.path).runs) == 1


def edited(text: bytes, how: str) -> bytes:
    lines = text.splitlines(keepends=True)
    record = json.loads(lines[0])
    return b"".join(
        {
            "less noise counted": [json.dumps({**record, "noise_multiplier": 9.0}).encode() + b"\n", *lines[1:]],
            "a step taken out": [lines[0], *lines[2:]],
            "a step put in": [*lines[:2], lines[1], *lines[2:]],
            "order": [lines[0], lines[2], lines[1], *lines[3:]],
            "nonsense": [lines[0], b"nonsense\n", *lines[2:]],
            "an empty line": [lines[0], b"\n", *lines[2:]],
            "another kind": [lines[0], b"[]\n", *lines[2:]],
            "a step number": [lines[0], lines[1].replace(b'"step": 1', b'"step": 2'), *lines[2:]],
            "another run's records": [*lines, *lines],
        }[how]
    )


@pytest.mark.parametrize(
    "how",
    ["less noise counted", "a step taken out", "a step put in", "order", "nonsense", "an empty line", "another kind",
     "a step number", "another run's records"],
)  # fmt: skip
def test_an_edited_ledger_is_refused(tmp_path, how):
    ledger = make_ledger(tmp_path, taken=4)
    ledger.path.write_bytes(edited(ledger.path.read_bytes(), how))
    with pytest.raises(UserError, match=r"line \d+ was changed"):
        PrivacyLedger(ledger.path)


def test_a_step_left_out_of_the_numbers_is_refused_even_with_a_chain(tmp_path):
    ledger = make_ledger(tmp_path, taken=1)
    ledger._chain.append({"record": "step", "step": 3})
    with pytest.raises(UserError, match="line 3"):
        PrivacyLedger(ledger.path)


def test_a_missing_end_that_a_report_knows_of_is_refused(tmp_path):
    ledger = make_ledger(tmp_path, taken=4)
    write_json(tmp_path / "privacy.json", {"disable_dp": False, "ledger_link": ledger.record_hashes[-1]})
    ledger.check_report(tmp_path / "privacy.json")
    ledger.record_step()
    PrivacyLedger(ledger.path).check_report(tmp_path / "privacy.json")
    ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(UserError, match=r"lacks records that .*privacy\.json"):
        PrivacyLedger(ledger.path).check_report(tmp_path / "privacy.json")


@pytest.mark.parametrize("fault", ["deleted", "a folder", "written to", "full"])
def test_a_ledger_that_cannot_be_written_raises_and_counts_nothing(tmp_path, fault, monkeypatch):
    ledger = make_ledger(tmp_path)
    content = ledger.path.read_bytes()
    if fault == "written to":
        ledger.path.write_bytes(content + b"{}\n")
    elif fault == "full":
        write, left = os.write, [40, 0]

        def write_little(descriptor, data):
            room = left.pop(0)
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[:room])

        monkeypatch.setattr(os, "write", write_little)
    else:
        ledger.path.unlink()
        if fault == "a folder":
            ledger.path.mkdir()
    with pytest.raises(UserError, match=r"privacy_ledger\.jsonl: cannot be written .*--output_dir"):
        ledger.record_step()
    assert ledger.steps == 3 and (fault != "deleted" or not ledger.path.exists())


def test_a_second_run_is_kept_out_until_the_first_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("author_dp.accounting.hash_chain.LOCK_SECONDS", 0)
    first, second = PrivacyLedger(tmp_path / "privacy_ledger.jsonl"), PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    with first.locked():
        first.start_run(HEADER)
        first.record_step()
        with pytest.raises(UserError, match="in use by another run"):
            with second.locked():
                pass
    with second.locked():
        assert second.steps == 1  # read anew: what the first one wrote is known


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "privacy.json"
    write_json(path, {"epsilon": 1.0})

    def crash(*args):
        assert json.loads(path.read_text()) == {"epsilon": 1.0}
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"epsilon": 2.0})
    assert json.loads(path.read_text()) == {"epsilon": 1.0}
    monkeypatch.undo()
    write_json(path, {"epsilon": 2.0})
    assert json.loads(path.read_text()) == {"epsilon": 2.0}


# --- the program ----------------------------------------------------------------------------------------


def ledger_program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "author_dp.ledger", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_program_says_what_was_spent_and_what_one_more_run_would_cost(tmp_path):
    ledger = make_ledger(tmp_path, taken=10, noise_multiplier=2.0)
    ledger.start_run({**HEADER, "noise_multiplier": 3.0})
    for _ in range(5):
        ledger.record_step()
    done = ledger_program(str(tmp_path))
    assert done.returncode == 0, done.stderr
    spent = exact_epsilon([(2.0, 0.1, 10), (3.0, 0.1, 5)], 1e-3)
    after = exact_epsilon([(2.0, 0.1, 10), (3.0, 0.1, 15)], 1e-3)
    said = [float(line.split("epsilon ")[1].split()[0]) for line in done.stdout.splitlines() if "at delta" in line]
    assert said == [pytest.approx(spent, abs=0.02), pytest.approx(after, abs=0.02)]
    assert "runs 2, steps 15" in done.stdout and "target: epsilon 8" in done.stdout
    assert "at delta 1e-05" in ledger_program(str(tmp_path), "1e-5").stdout


@pytest.mark.parametrize(("rate", "steps", "target"), [(0.898, 61, 8.0), (0.05, 300, 2.0), (1.0, 40, 1.0)])
def test_the_program_does_not_say_more_than_was_promised(tmp_path, rate, steps, target, capsys):
    """The grid of one more run is coarser: it must not pass for what was spent."""
    sigma = find_noise_multiplier(rate, steps, target, 1e-3)
    make_ledger(tmp_path, steps, noise_multiplier=sigma, sample_rate=rate, steps=steps, target_epsilon=target)
    main([str(tmp_path)])
    assert f"spent: epsilon {target:.2f} at" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nowhere"], ["{}", "two"], ["{}", "0"], ["{}", "1e-5", "more"]])
def test_the_program_names_mistakes(tmp_path, arguments):
    make_ledger(tmp_path)
    with pytest.raises(UserError, match=r"OUTPUT_DIR|DELTA"):
        main([word.format(tmp_path) for word in arguments])


def test_the_program_ends_with_status_2_for_a_mistake(tmp_path):
    ledger = make_ledger(tmp_path)
    ledger.path.write_bytes(edited(ledger.path.read_bytes(), "less noise counted"))
    done = ledger_program(str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("author_dp.ledger: error: ") and "line 1 was changed" in done.stderr


def test_several_folders_compose_to_one_epsilon_below_the_sum(tmp_path, capsys):
    options = [{"noise_multiplier": 0.9}, {"noise_multiplier": 1.2, "sample_rate": 0.05}, {"noise_multiplier": 0.9, "name": "c"}]
    for folder, header in zip("abc", options):
        (tmp_path / folder).mkdir()
        make_ledger(tmp_path / folder, taken=40, **header)
    main([str(tmp_path / folder) for folder in "abc"])
    said = capsys.readouterr().out
    alone = [exact_epsilon([spending], 1e-3) for spending in [(0.9, 0.1, 40), (1.2, 0.05, 40), (0.9, 0.1, 40)]]
    together = exact_epsilon([(0.9, 0.1, 80), (1.2, 0.05, 40)], 1e-3)
    numbers = [float(found) for found in re.findall(r"epsilon ([\d.]+) at", said)]
    assert numbers == pytest.approx([*alone, together, sum(alone)], abs=0.03) and together < 0.8 * sum(alone)
    assert "sum, for comparison" in said and "at delta 0.003" in said and "looking at earlier private results" in said
    main([str(tmp_path / "a"), str(tmp_path / "b"), "1e-6"])
    assert "at delta 1e-06" in capsys.readouterr().out


def test_folders_of_other_deltas_want_one(tmp_path, capsys):
    for folder, delta in zip("ab", (1e-3, 1e-4)):
        (tmp_path / folder).mkdir()
        make_ledger(tmp_path / folder, delta=delta)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(UserError, match="DELTA"):
        main([a, b])
    main([a, b, "1e-5"])
    assert "together" in capsys.readouterr().out


def test_no_step_is_counted_twice(tmp_path):
    a, copy, link = (str(tmp_path / name) for name in ("a", "copy", "link"))
    os.mkdir(a)
    make_ledger(tmp_path / "a")
    shutil.copytree(a, copy)
    PrivacyLedger(tmp_path / "copy" / "privacy_ledger.jsonl").record_step()  # it went on
    os.symlink(a, link)
    for other in (a, f"{a}/../a", copy, link):
        with pytest.raises(UserError, match="counted twice"):
            main([a, other, "1e-5"])
    with pytest.raises(UserError, match="OUTPUT_DIR nowhere"):
        main([a, "nowhere"])


def test_two_runs_that_are_alike_in_all_are_not_taken_for_copies(tmp_path):
    trainers = [make_trainer(tmp_path / folder) for folder in "ab"]
    for trainer in trainers:
        trainer.train()
    main([str(tmp_path / folder) for folder in "ab"])


def test_the_chain_depends_on_all_before():
    first = record_hash("a", {"record": "step", "step": 1})
    assert first != record_hash("b", {"record": "step", "step": 1}) and first != record_hash("a", {"record": "step", "step": 2})


# --- the judges -----------------------------------------------------------------------------------------


def settings(number: int) -> list[tuple[float, int, float, float]]:
    """Random sample rates from 1e-4 to 1 (every tenth is 1), 1 to 20,000 steps, noise multipliers from 0.3 to 20, deltas."""
    generator = np.random.default_rng(11)
    low, high = np.log([1e-4, 1, 0.3, 1e-8]), np.log([1, 20_000, 20, 1e-3])
    drawn = np.exp(generator.uniform(low, high, size=(number, 4)))
    return [(1.0 if i % 10 == 0 else q, max(1, int(n)), sigma, delta) for i, (q, n, sigma, delta) in enumerate(drawn.tolist())]


def google_bounds(q: float, steps: int, sigma: float, delta: float, interval: float) -> list[float]:
    """Lower and upper bound by dp-accounting's privacy loss distributions, rounded down and up."""
    options = {"sampling_prob": q, "value_discretization_interval": interval, "use_connect_dots": False}
    losses = [from_gaussian_mechanism(sigma, pessimistic_estimate=upper, **options) for upper in (False, True)]
    return [loss.self_compose(steps).get_epsilon_for_delta(delta) for loss in losses]


def microsoft_bounds(q: float, steps: int, sigma: float, delta: float, error: float) -> tuple[float, float] | None:
    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=sigma)
    try:
        judge = PRVAccountant(prvs=[mechanism], max_self_compositions=[steps], eps_error=error, delta_error=delta / 100)
        lower, _, upper = judge.compute_epsilon(delta=delta, num_self_compositions=[steps])
    except (RuntimeError, MemoryError):  # it does not handle every setting, and says so
        return None
    return lower, upper


@pytest.mark.slow
@pytest.mark.parametrize("setting", settings(60), ids="q={0[0]:.2g} steps={0[1]} sigma={0[2]:.2g}".format)
def test_epsilon_of_a_ledger_agrees_with_the_judges(tmp_path, monkeypatch, setting):
    """Within the errors that each of the three states; ours is an upper bound."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(EpsilonAccountant, "MAX_CELLS", 2**20)
    q, steps, sigma, delta = setting
    make_ledger(tmp_path, steps, sample_rate=q, noise_multiplier=sigma)
    (spending,) = PrivacyLedger(tmp_path / "privacy_ledger.jsonl").events
    assert spending == (sigma, q, steps)
    loss = EpsilonAccountant([spending], delta)
    epsilon, error = loss.epsilon, 2 * getattr(loss, "epsilon_error", np.inf)
    judges = [google_bounds(q, steps, sigma, delta, max(2e-5, 1e-3 * epsilon / steps**0.5))]
    if loss.accountant == "prv":
        judges.append(microsoft_bounds(q, steps, sigma, delta, max(0.02 * epsilon, 0.002)))
    for bounds in filter(None, judges):
        assert bounds[0] <= epsilon * (1 + 1e-9) and epsilon - error <= bounds[1], (epsilon, error, judges)


def test_a_torn_alarm_is_an_alarm(tmp_path):
    ledger = make_ledger(tmp_path)
    ledger.record_failure("noise")
    ledger.path.write_bytes(ledger.path.read_bytes()[:-70])
    torn = PrivacyLedger(ledger.path)
    with pytest.raises(UserError, match="its models have no guarantee"):
        torn.check_no_failure()
