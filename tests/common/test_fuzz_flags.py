"""Command lines of careless hands: every one is understood or answered with one line."""

import re

import pytest
from conftest import assert_one_error_line
from hypothesis import given
from hypothesis import strategies as st
from mutations import FREE_TEXTS, NUMBERS, bounded

from deploy import flags
from recipes import DATASET_SETTINGS
from settings import parse_args
from training.resolve import resolve

WORDS = (
    "7 28 1e9 2147483648 1_000 ٣ mnist digits auto cpu cuda cuda:99 cuda:-1 fast best article on"
)
WORDS += " off bf16 SGD Muon StepLR(5) - -- -h @x %s %(prog)s {} x.png x.json /dev/null . .. /"
VALUES = st.sampled_from([*WORDS.split(), *NUMBERS]) | FREE_TEXTS.filter(lambda t: "\0" not in t)


def parse_training_flags() -> None:
    options, given = parse_args()
    for dataset in DATASET_SETTINGS:
        resolve(options.recipe, dataset, given)


SCRIPTS = [parse_training_flags, flags.parse_args]


def check_flags(run, main, arguments: list[str]) -> None:
    with bounded():
        result = run(main, *arguments)
    if result.status == 0:
        assert not result.err
    else:
        assert_one_error_line(result)
        assert len(result.err) < 10_000


@pytest.mark.parametrize("main", SCRIPTS)
def test_flags_that_once_broke_the_parser(run, main):
    for arguments in (["--mode=--"], ["--device=--"], ["--output", "(" * 10**6]):
        check_flags(run, main, arguments)
    check_flags(run, main, ["--help=" + "x" * 10**6])


@pytest.mark.parametrize("main", SCRIPTS)
@given(data=st.data())
def test_flags_in_any_order_with_any_values(run, main, data):
    known = st.sampled_from(sorted(set(re.findall(r"--\w+", run(main, "--help").out))))
    flag = known | known.map(lambda f: f.replace("_", "-")) | known.map(lambda f: f[:-1]) | VALUES
    joined = st.tuples(known, VALUES).map("=".join)
    parts = st.tuples(flag) | st.tuples(known, VALUES) | st.tuples(joined)
    arguments = data.draw(st.lists(parts, max_size=5))
    check_flags(run, main, [each for part in arguments for each in part])
