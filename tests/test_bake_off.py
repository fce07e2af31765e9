"""benchmarks/bake_off.py: ways see as many authors each, and what wins does so on both corpora by more than chance."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import bake_off

DEFAULT, LOWER, SAME = [5.0, 5.01, 5.02], [4.5, 4.51, 4.52], [4.99, 5.01, 5.02]


def test_winners_are_below_the_default_on_each_corpus():
    roles = {"default": DEFAULT, "rank 4": LOWER, "rank 16": LOWER, "rank 64": SAME}
    commits = {"default": DEFAULT, "rank 4": LOWER, "rank 16": SAME, "rank 64": LOWER}
    assert bake_off.winners({"roles": roles, "commits": commits}) == ["rank 4"]
    assert bake_off.winners({"roles": roles}) == []
    assert bake_off.winners({"roles": roles, "commits": {**commits, "rank 4": LOWER[:1]}}) == []  # a single run says nothing


def test_winners_are_corrected_for_how_many_were_compared():
    close = [4.96, 4.985, 4.97]  # one-sided p of 0.01
    few = {"default": DEFAULT, "rank 4": close}
    many = {**few, **{f"way {number}": SAME for number in range(20)}}
    assert bake_off.winners({"roles": few, "commits": few}) == ["rank 4"]
    assert bake_off.winners({"roles": many, "commits": many}) == []


@pytest.mark.parametrize("way", bake_off.WAYS)
def test_ways_see_as_many_authors(way):
    options = bake_off.options_of(bake_off.WAYS[way], "2e-3", authors=64, steps=16, tokens=16, at_once=16)
    at_once, times, steps = (
        int(re.search(rf"--{name} (\d+)", options)[1])
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")
    )
    assert at_once * times * steps == 64 * 16
    assert options.count("--noise_bands") == 1 and "--target_epsilon 2 " in options
