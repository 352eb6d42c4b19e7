"""A sample of the calls of `python -m tests.fuzz`."""

import re
import subprocess
import sys

import pytest

from tests.commands import environment
from tests.conftest import ROOT
from tests.fuzz import BAD, Result
from tests.fuzz_calls import Call

FAMILIES = "language_model,vae"  # whose runs are trained first


@pytest.mark.depends_on("whole runs")
def test_odd_calls_end_well():
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--calls=80", "--seed=0", f"--families={FAMILIES}"],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    ok, refused = map(int, re.search(r"ok (\d+), refused (\d+),", result.stdout).groups())
    assert ok > 10 and refused > 60
    assert all(f"{ending} 0" in result.stdout for ending in BAD)


def test_each_ending_is_recognized():
    call = Call("train", ["--a=nan"], {}, refused=True, names=["a", "nan"])
    ending = lambda code, err, call=call: Result(call, code, "", err, 1).ending()
    assert ending(2, "error: flag --a=nan: must be a finite number\n") == "refused"
    assert ending(2, "note: b\nwarning: c\nerror: --a=nan\n") == "refused"
    assert ending(2, "error: something is wrong\n") == "other"  # but what?
    assert ending(2, "error: --a\nerror: --a\n") == "other"
    assert ending(2, "") == ending(-11, "") == ending(1, "error: --a\n") == "other"
    assert ending(1, "Traceback (most recent call last):\nValueError: a\n") == "traceback"
    assert ending(None, "") == "hang"
    assert ending(0, "") == "ignored nonsense"
    assert ending(0, "", call._replace(refused=False)) == "ok"
