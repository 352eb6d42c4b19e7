"""Transfer studies: the optimal learning rate as a function of width."""

import math

import pytest

from genai_jax.config import ConfigError
from genai_jax.scaling.study import transfer
from genai_jax.scaling.study.results import Result
from genai_jax.scaling.study.transfer import TransferConfig
from tests.scaling.study_results import make_result, make_run


def swept(best: dict[str, dict[int, float]]) -> list[Result]:
    """Losses 2 + (log2 rate - log2 best)^2 / 10 at five rates for every variant and width."""
    results = []
    for variant, widths in best.items():
        for width, optimum in widths.items():
            for power in range(-12, -5):
                rate = 2.0**power
                loss = 2 + (power - math.log2(optimum)) ** 2 / 10
                name = f"{variant}.w{width}.{power}"
                flags = {"transformer__embed_dim": width, "optimizer__learning_rate": rate}
                results.append(make_result(make_run(name, **flags), loss))
    return results


def test_the_optimum_of_a_parabola_is_recovered_exactly():
    best = {
        "standard": {16: 2**-7.3, 32: 2**-8.3, 64: 2**-9.3},
        "mup": {16: 2**-8.4, 32: 2**-8.4, 64: 2**-8.4},
    }
    config = TransferConfig("transfer")
    numbers = transfer.analyze(swept(best), config)[0].numbers
    for variant, widths in best.items():
        for width, rate in widths.items():
            assert numbers[f"{variant}/{width}/learning_rate"] == pytest.approx(rate, rel=1e-9)
            assert numbers[f"{variant}/{width}/loss"] == pytest.approx(2, abs=1e-9)
    assert numbers["standard/slope"] == pytest.approx(-1, abs=1e-9)
    assert numbers["standard/octaves"] == pytest.approx(-2, abs=1e-9)
    assert numbers["standard/lost"] == pytest.approx(0.4, abs=1e-9)
    assert numbers["mup/slope"] == pytest.approx(0, abs=1e-9)


def test_no_optimum_at_the_edge_or_next_to_a_divergence():
    assert math.isnan(transfer.optimum([1, 2, 4], [1.0, 2.0, 3.0]).rate)
    assert math.isnan(transfer.optimum([1, 2, 4], [2.0, 1.0, math.inf]).rate)
    assert transfer.optimum([1, 2, 4, 8], [2.0, 1.0, 2.0, math.inf]).rate == pytest.approx(2)


def test_an_optimum_that_is_not_inside_is_said():
    best = {"mup": {16: 2**-8.0, 32: 2**-12.0, 64: 2**-6.0, 128: 2**-8.0}}
    results = swept(best)
    worst = ("mup.w128.-7", "mup.w128.-9")
    results = [r._replace(diverged=True) if r.name in worst else r for r in results]
    text = transfer.analyze(results, TransferConfig("transfer"))[0].paragraphs
    assert text[-3:] == [
        "At the edge of the tried range: the lowest eval/loss is at the smallest learning rate for "
        "mup at width 32; a smaller one may be better.",
        "At the edge of the tried range: the lowest eval/loss is at the largest learning rate for "
        "mup at width 64; a larger one may be better.",
        "The lowest loss is next to a learning rate that diverged, so that its optimum is not "
        "known, for mup at width 128.",
    ]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda r: ".w16." in r.name, r"has 1 usable value\(s\) of --transformer.em"),
        (lambda r: ".w16." in r.name or r.name.endswith(("-7", "-8")), r"has 2 learning rate\(s\)"),
    ],
)
def test_too_few_results_for_transfer_are_refused(keep, words):
    results = [r for r in swept({"mup": {16: 2**-8, 32: 2**-8}}) if keep(r)]
    with pytest.raises(ConfigError, match=words):
        transfer.analyze(results, TransferConfig("transfer"))
    with pytest.raises(ConfigError, match=r"--study.width=a.b is not a flag of run"):
        transfer.analyze(results, TransferConfig("transfer", width="a.b"))
