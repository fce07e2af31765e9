"""ledger_report.py: what the program reports, and that its epsilon agrees with other accountants."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_trainer
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from mutation import catches
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
from test_accountant import exact_epsilon
from test_ledger import HEADER, edited, make_ledger

from author_dp.accounting.accountant import EpsilonAccountant, find_noise_multiplier
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.ledger_report import main
from author_dp.errors import UserError


def ledger_program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "author_dp.ledger", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.integration
def test_program_reports_spent_and_cost_of_one_more_run(tmp_path):
    ledger = make_ledger(tmp_path, num_steps=10, noise_multiplier=2.0)
    ledger.start_run({**HEADER, "noise_multiplier": 3.0})
    for _ in range(5):
        ledger.record_step()
    done = ledger_program(str(tmp_path))
    assert done.returncode == 0, done.stderr
    spent = exact_epsilon([(2.0, 0.1, 10), (3.0, 0.1, 5)], 1e-3)
    after = exact_epsilon([(2.0, 0.1, 10), (3.0, 0.1, 15)], 1e-3)
    epsilons = [float(line.split("epsilon ")[1].split()[0]) for line in done.stdout.splitlines() if "at delta" in line]
    assert epsilons == [pytest.approx(spent, abs=0.02), pytest.approx(after, abs=0.02)]
    assert "runs 2, steps 15" in done.stdout and "target: epsilon 8" in done.stdout
    assert "at delta 1e-05" in ledger_program(str(tmp_path), "1e-5").stdout


@pytest.mark.parametrize(("rate", "steps", "target"), [(0.898, 61, 8.0), (0.05, 300, 2.0), (1.0, 40, 1.0)])
def test_program_reports_at_most_the_target(tmp_path, rate, steps, target, capsys):
    """The accountant uses a coarser grid for one more run; spent epsilon must not come from that grid."""
    sigma = find_noise_multiplier(rate, steps, target, 1e-3)
    make_ledger(tmp_path, steps, noise_multiplier=sigma, sample_rate=rate, steps=steps, target_epsilon=target)
    main([str(tmp_path)])
    assert f"spent: epsilon {target:.2f} at" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["{}", "two"], ["{}", "0"], ["{}", "1e-5", "more"]])
def test_program_names_wrong_argument(tmp_path, arguments):
    make_ledger(tmp_path)
    with pytest.raises(UserError, match=r"OUTPUT_DIR|DELTA"):
        main([word.format(tmp_path) for word in arguments])


@pytest.mark.integration
def test_program_exits_2_for_edited_ledger(tmp_path):
    ledger = make_ledger(tmp_path)
    ledger.path.write_bytes(edited(ledger.path.read_bytes(), "less noise counted"))
    done = ledger_program(str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("author_dp.ledger: error: ") and "line 1 was changed" in done.stderr


def test_joint_epsilon_is_below_the_sum(tmp_path, capsys):
    options = [{"noise_multiplier": 0.9}, {"noise_multiplier": 1.2, "sample_rate": 0.05}, {"noise_multiplier": 0.9, "name": "c"}]
    for folder, header in zip("abc", options):
        (tmp_path / folder).mkdir()
        make_ledger(tmp_path / folder, num_steps=40, **header)
    main([str(tmp_path / folder) for folder in "abc"])
    output = capsys.readouterr().out
    alone = [exact_epsilon([event], 1e-3) for event in [(0.9, 0.1, 40), (1.2, 0.05, 40), (0.9, 0.1, 40)]]
    together = exact_epsilon([(0.9, 0.1, 80), (1.2, 0.05, 40)], 1e-3)
    numbers = [float(found) for found in re.findall(r"epsilon ([\d.]+) at", output)]
    assert numbers == pytest.approx([*alone, together, sum(alone)], abs=0.03) and together < 0.8 * sum(alone)
    assert "sum, for comparison" in output and "at delta 0.003" in output and "looking at earlier private results" in output
    main([str(tmp_path / "a"), str(tmp_path / "b"), "1e-6"])
    assert "at delta 1e-06" in capsys.readouterr().out


def test_joint_report_needs_one_delta(tmp_path, capsys):
    for folder, delta in zip("ab", (1e-3, 1e-4)):
        (tmp_path / folder).mkdir()
        make_ledger(tmp_path / folder, delta=delta)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(UserError, match="DELTA"):
        main([a, b])
    main([a, b, "1e-5"])
    assert "together" in capsys.readouterr().out


@catches(
    "a folder counted twice", "accounting.ledger_report.format_joint_ledgers", "check_no_shared_ledger_records(ledgers)", "pass"
)
def test_joint_report_refuses_shared_records(tmp_path):
    a, copy, link = (str(tmp_path / name) for name in ("a", "copy", "link"))
    os.mkdir(a)
    make_ledger(tmp_path / "a")
    shutil.copytree(a, copy)
    PrivacyLedger(tmp_path / "copy" / "privacy_ledger.jsonl").record_step()  # the copy was resumed
    os.symlink(a, link)
    for other in (a, f"{a}/../a", copy, link):
        with pytest.raises(UserError, match="counted twice"):
            main([a, other, "1e-5"])
    with pytest.raises(UserError, match="OUTPUT_DIR nowhere"):
        main([a, "nowhere"])


def test_joint_report_accepts_equal_runs(tmp_path):
    trainers = [make_trainer(tmp_path / folder) for folder in "ab"]
    for trainer in trainers:
        trainer.train()
    main([str(tmp_path / folder) for folder in "ab"])


# --- other accountants -----------------------------------------------------------------------------------------


def settings(number: int) -> list[tuple[float, int, float, float]]:
    """Random sample rates from 1e-4 to 1 (every tenth is 1), 1 to 20,000 steps, noise multipliers from 0.3 to 20, deltas."""
    generator = np.random.default_rng(11)
    low, high = np.log([1e-4, 1, 0.3, 1e-8]), np.log([1, 20_000, 20, 1e-3])
    sampled = np.exp(generator.uniform(low, high, size=(number, 4)))
    return [(1.0 if i % 10 == 0 else q, max(1, int(n)), sigma, delta) for i, (q, n, sigma, delta) in enumerate(sampled.tolist())]


def google_bounds(q: float, steps: int, sigma: float, delta: float, interval: float) -> list[float]:
    """Lower and upper bound by dp-accounting's privacy loss distributions."""
    options = {"sampling_prob": q, "value_discretization_interval": interval, "use_connect_dots": False}
    losses = [from_gaussian_mechanism(sigma, pessimistic_estimate=upper, **options) for upper in (False, True)]
    return [loss.self_compose(steps).get_epsilon_for_delta(delta) for loss in losses]


def microsoft_bounds(q: float, steps: int, sigma: float, delta: float, error: float) -> tuple[float, float] | None:
    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=sigma)
    try:
        accountant = PRVAccountant(prvs=[mechanism], max_self_compositions=[steps], eps_error=error, delta_error=delta / 100)
        lower, _, upper = accountant.compute_epsilon(delta=delta, num_self_compositions=[steps])
    except (RuntimeError, MemoryError):  # it raises for settings that it does not handle
        return None
    return lower, upper


@pytest.mark.integration
@pytest.mark.parametrize("setting", settings(20), ids="q={0[0]:.2g} steps={0[1]} sigma={0[2]:.2g}".format)
def test_ledger_epsilon_agrees_with_other_accountants(tmp_path, monkeypatch, setting):
    """They agree within the errors that each of the three states; ours is an upper bound."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(EpsilonAccountant, "MAX_CELLS", 2**20)
    q, steps, sigma, delta = setting
    make_ledger(tmp_path, steps, sample_rate=q, noise_multiplier=sigma)
    (event,) = PrivacyLedger(tmp_path / "privacy_ledger.jsonl").events
    assert event == (sigma, q, steps)
    loss = EpsilonAccountant([event], delta)
    epsilon, error = loss.epsilon, 2 * getattr(loss, "epsilon_error", np.inf)
    bounds_of_others = [google_bounds(q, steps, sigma, delta, max(2e-5, 1e-3 * epsilon / steps**0.5))]
    if loss.accountant == "prv":
        bounds_of_others.append(microsoft_bounds(q, steps, sigma, delta, max(0.02 * epsilon, 0.002)))
    for bounds in filter(None, bounds_of_others):
        assert bounds[0] <= epsilon * (1 + 1e-9) and epsilon - error <= bounds[1], (epsilon, error, bounds_of_others)
