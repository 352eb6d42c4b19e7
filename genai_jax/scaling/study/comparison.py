"""Compares architectures on the same data, tokens, and FLOPs or parameters, paired by seed.

The name of a flagfile up to the first dot is its architecture; seed and learning rate come from the
flags. If an architecture has several learning rates, the one that is best with the selection seed
is chosen. That seed is then scored for none of the architectures, so that the selection does not
bias the scores. For the other learning rates, only the runs with the selection seed are needed.
"""

from collections.abc import Mapping, Sequence

from genai_jax.config import ConfigError
from genai_jax.scaling.report_types import Section
from genai_jax.scaling.study.comparability import ComparisonConfig, check
from genai_jax.scaling.study.comparison_sections import (
    main_section,
    matching_section,
    rates_section,
)
from genai_jax.scaling.study.folder import Run
from genai_jax.scaling.study.groups import grouped, learning_rate, models_of, seed
from genai_jax.scaling.study.pairing import chosen_rate, paired_difference, scored_runs
from genai_jax.scaling.study.results import Result


def needed(
    runs: Sequence[Run], results: Mapping[str, list[Result]], config: ComparisonConfig
) -> list[Run]:
    """The runs that the comparison needs, given the results so far.

    At first these are the runs with the selection seed; once those of an architecture have
    finished, also the other seeds of the learning rate that they choose.

    Raises:
      ConfigError: architectures that are not comparable, a missing baseline, too few seeds.
    """
    architectures = grouped(models_of(runs))
    check(architectures, config)
    compared, references = config.split(architectures)
    wanted = [m.run for models in references.values() for m in models]
    for models in compared.values():
        rates = {learning_rate(m) for m in models}
        selecting = [m for m in models if seed(m) == config.selection_seed]
        if len(rates) == 1:
            wanted += [m.run for m in models]
            continue
        wanted += [m.run for m in selecting]
        if all(m.name in results for m in selecting):
            best = chosen_rate([r for m in selecting for r in results[m.name]], config)
            wanted += [m.run for m in models if learning_rate(m) == best]
    return [run for run in runs if run in wanted]


def follow_ups(
    runs: Sequence[Run], results: Mapping[str, list[Result]], config: ComparisonConfig
) -> list[list[list[Run]]]:
    """For each architecture without a chosen learning rate: for each rate, what it would ask for.

    These are the runs with the other seeds, of which `needed` asks for those of one rate.
    """
    choices = []
    compared, _ = config.split(grouped(models_of(runs)))
    for models in compared.values():
        rates = dict.fromkeys(learning_rate(m) for m in models)
        selecting = [m for m in models if seed(m) == config.selection_seed]
        if len(rates) == 1 or all(m.name in results for m in selecting):
            continue
        now = {m.name for m in selecting}
        by_rate: dict[float, dict[str, Run]] = {learning_rate(m): {} for m in selecting}
        for m in models:
            if learning_rate(m) in by_rate and m.name not in now:
                by_rate[learning_rate(m)][m.name] = m.run  # once for all members of a population
        choices.append([list(runs.values()) for runs in by_rate.values()])
    return choices


def analyze(results: Sequence[Result], config: ComparisonConfig) -> list[Section]:
    """Scores of the architectures and their paired differences to the baseline.

    An architecture with too few finished runs is left out, and the report says why. References are
    scored by all their runs.

    Raises:
      ConfigError: the baseline has too few seeds, or no other architecture has enough.
    """
    architectures = grouped(results)
    if config.baseline not in architectures:
        raise ConfigError(f"no run of --study.baseline={config.baseline} has finished")
    architectures, references = config.split(architectures, missing_ok=True)
    chooses = any(len({learning_rate(r) for r in a}) > 1 for a in architectures.values())
    rates, scored, differences, missing = {}, {}, {}, []
    base, of_base = config.baseline, {}
    for name in (base, *(n for n in architectures if n != base)):
        try:
            rate, members = scored_runs(architectures[name], chooses, config)
            own = {seed(r): r.final(config.metric) for r in members}
            if name == base:
                of_base = own
            else:
                differences[name] = paired_difference(own, of_base, config, name)
        except ConfigError as error:
            if name == base:
                raise
            missing.append(str(error))
        else:
            rates[name], scored[name] = rate, members
    if not differences:
        raise ConfigError("; ".join(missing) or f"no architecture except {base} has finished")
    return [
        main_section(scored, rates, differences, references, missing, config),
        matching_section(scored, config),
        rates_section({n: m for n, m in architectures.items() if n in rates}, rates, config),
    ]
