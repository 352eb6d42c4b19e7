"""Runs of two steps in which every choice of every flag of every family occurs.

    python -m tests.every_flag [FAMILY ...]

chooses the flags of the runs, trains them, and writes `tests/golden/every_flag.json`: for each
base, a family and what it needs, the runs, and the values that its runs cannot have, with the error
that refuses them. Each run sets as many flags as go together, so that few runs suffice. To be run
again after a flag has been added or removed; tests/test_every_flag.py says so.
"""

import atexit
import dataclasses
import functools
import json
import pathlib
import random
import re
import shutil
import sys
import tempfile
import types
import typing
from collections.abc import Iterator

from genai_jax import train
from genai_jax.components import components_of, make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.tasks.registry import task_class
from tests.every_flag_values import NUMBERS, WITH
from tests.families import taken

RECORD = pathlib.Path(__file__).parent / "golden" / "every_flag.json"
COMMON = (
    "--train.progress=false", "--train.log_every=1", "--eval.batches=1", "--data.batch_size=4",
    "--optimizer.warmup_steps=0",
)  # fmt: skip
TEXT = ("--data.sequence_length=16", "--data.unique_tokens=2000")
TRANSFORMER = (
    *TEXT,
    "--transformer.num_layers=2",
    "--transformer.embed_dim=16",
    "--transformer.num_heads=2",
)
PAIRS = (
    "--task=sequence_to_sequence", "--sequence_to_sequence.objective=pairs",
    "--data.dataset=number_names:2", "--data.sequence_length=16",
    "--sequence_to_sequence.target_length=24", *TRANSFORMER[-3:],
)  # fmt: skip
UNET = (
    "--unet.channels=8",
    "--unet.channel_multipliers=1,2",
    "--unet.blocks_per_level=1",
    "--unet.attention_resolutions=4",
    "--unet.head_dim=8",
)
DIT = (
    "--task=diffusion", "--diffusion.network=dit", "--dit.num_layers=2", "--dit.embed_dim=16",
    "--dit.num_heads=2", "--dit.patch_size=4", "--dit.text_layers=1",
)  # fmt: skip
FEW_STEP = (*DIT, "--task=few_step")
CODEC = (
    "--task=autoencoder", "--autoencoder.channels=4", "--autoencoder.channel_multipliers=1,1",
    "--discriminator.channels=4", "--discriminator.num_layers=1",
    "--autoencoder_loss.discriminator_weight=0.5",
)  # fmt: skip
LADDER = (
    "--task=vae", "--vae.network=ladder", "--ladder_vae.stages=1x1,8x1", "--ladder_vae.channels=4",
    "--ladder_vae.latent_channels=2",
)  # fmt: skip
DENSE = ("--dense_vae.latent_dim=3", "--dense_vae.hidden_dim=16", "--dense_vae.num_layers=1")
GAN = ("--task=gan", "--generator.channels=4", "--generator.latent_dim=6", "--critic.channels=4")
BASES = {
    "language_model": TRANSFORMER,
    "language_model experts": (*TRANSFORMER, "--moe.num_experts=4"),
    "language_model states": (*TRANSFORMER, "--transformer.pattern=mamba,latent_attention"),
    "masked_language_model": (*TRANSFORMER, "--task=masked_language_model"),
    "masked_language_model experts": (
        *TRANSFORMER, "--task=masked_language_model", "--moe.num_experts=4",
    ),
    "discrete_diffusion": (*TRANSFORMER, "--task=discrete_diffusion"),
    "sequence_to_sequence": (*TRANSFORMER, "--task=sequence_to_sequence"),
    "sequence_to_sequence pairs": PAIRS,
    "sequence_to_sequence recurrent": (
        *PAIRS[:-3], "--sequence_to_sequence.network=recurrent", "--recurrent.embed_dim=8",
        "--recurrent.hidden_dim=8", "--recurrent.attention_dim=4",
    ),
    "diffusion": (*UNET, "--task=diffusion"),
    "diffusion dit": DIT,
    "diffusion bound": (*DIT, "--diffusion.objective=bound", "--diffusion.schedule=learned"),
    "diffusion text": (
        *DIT, "--data.captions", "--diffusion.condition=text", "--data.caption_length=8",
    ),
    "diffusion straight": (
        *DIT, "--diffusion.schedule=flow", "--diffusion.parameterization=velocity",
    ),
    "few_step": FEW_STEP,
    "few_step unet": (*UNET, "--task=few_step"),
    "few_step progressive": (
        *FEW_STEP, "--few_step.method=progressive", "--few_step.teacher={diffusion dit}",
    ),
    "few_step distillation": (
        *FEW_STEP, "--few_step.method=consistency_distillation",
        "--few_step.teacher={diffusion dit}",
    ),
    "few_step shortcut": (
        *FEW_STEP, "--few_step.method=shortcut", "--diffusion.schedule=flow",
        "--diffusion.parameterization=velocity", "--few_step.bootstrap=0.5",
        "--sampler.solver=euler", "--sampler.steps=4",
    ),
    "autoencoder": CODEC,
    "autoencoder codes": (
        *CODEC, "--autoencoder.latent=vq", "--quantizer.codes=16", "--autoencoder.head_dim=4",
    ),
    "autoencoder residual codes": (
        *CODEC, "--autoencoder.latent=rvq", "--quantizer.codes=8", "--quantizer.codebooks=2",
    ),
    "code_prior": (
        "--task=code_prior", "--code_prior.autoencoder={autoencoder codes}",
        "--transformer.num_layers=2", "--transformer.embed_dim=16", "--transformer.num_heads=2",
    ),
    "image_classifier": (
        "--task=image_classifier", "--classifier.channels=8", "--classifier.num_stages=2",
        "--classifier.feature_dim=8",
    ),
    "vae": ("--task=vae", *DENSE),
    "vae ladder": LADDER,
    "gan": GAN,
    "gan style": (
        *GAN, "--generator.network=style", "--generator.style_dim=5",
        "--generator.mapping_layers=1", "--critic.network=residual",
    ),
    "gan small": (
        *GAN, "--data.dataset=shapes", "--data.image_size=16", "--generator.channels=8",
        "--critic.channels=8",
    ),
    "gan grown": (
        *GAN, "--data.dataset=shapes", "--data.image_size=32", "--gan.grow_from={gan small}",
        "--gan.fade_steps=1",
    ),
    "normalizing_flow": (
        "--task=normalizing_flow", "--glow.steps_per_level=1", "--glow.hidden_channels=4",
    ),
    "rbm": ("--task=rbm", "--rbm.num_hidden=5", "--rbm.chains=4", "--rbm.sweeps=1"),
    "ngram": (*TEXT, "--task=ngram", "--ngram.order=3", "--ngram.max_entries=2000"),
    "hmm": (*TEXT, "--task=hmm", "--hmm.states=3", "--hmm.iterations=2"),
    "neural_lm": (
        *TEXT, "--task=neural_lm", "--neural_lm.context=3", "--neural_lm.embed_dim=4",
        "--neural_lm.hidden_dim=8",
    ),
    "word_vectors": ("--task=word_vectors", "--word_vectors.dim=8", "--data.min_count=20"),
    "responder": ("--task=responder",),
}  # fmt: skip
# Components that say where and how long a run is, or that only sampling uses.
ELSEWHERE = {"run", "checkpoint", "distributed", "mesh", "population", "profile", "sampler"}
LARGE = ("transformer.mlp_dim", "transformer.head_dim", "data.num_frames")


@functools.cache
def trained(base: str, *flags: str) -> str:
    """Workdir of a run, of one step unless `flags` say otherwise."""
    workdir = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, workdir, ignore_errors=True)
    more = taken(class_of(base), ("--train.steps=1", *flags))
    assert train.main([*flags_of_base(base), *more, f"--workdir={workdir}"]) == 0
    return workdir


def needs_a_run(base: str) -> bool:
    return any("{" in flag for flag in BASES[base])


def flags_of_base(base: str) -> list[str]:
    """What all runs of a base have; "{other base}" stands for a run of that one."""
    run = lambda match: trained(match[1])
    common = taken(class_of(base), COMMON)
    return [re.sub(r"\{(.+)\}", run, flag) for flag in (*common, *BASES[base])]


def class_of(base: str) -> type:
    """The class of its task."""
    return task_class(base.split()[0])


def candidates(base: str) -> list[str]:
    """Every value of every flag of a base's family that its runs are to have, as "name=value"."""
    flags = flags_of_base(base)
    fixed = {flag.removeprefix("--").partition("=")[0] for flag in flags}
    components = components_of(task_class(parse_run(flags).run.task))

    def with_needs(name: str, value: str) -> str:
        needed = WITH.get(f"{name}={value}", WITH.get(name, "")).split()
        needs = [n for n in needed if n.split(".")[0] in components]
        return " ".join([f"{name}={value}", *needs])

    every = ["dtype=bfloat16"] * (base != "normalizing_flow")
    for component in components.keys() - ELSEWHERE:
        for field in dataclasses.fields(components[component]):
            name = f"{component}.{field.name}"
            if name not in fixed:
                every += [with_needs(name, value) for value in _values(name, field)]
    # A flag and what it needs may be another flag's value with its needs, in another order.
    return sorted({frozenset(value.split()): value for value in sorted(every)}.values())


def _values(name: str, field: dataclasses.Field) -> Iterator[str]:
    """Values of a flag other than its default."""
    kind, default, meta = field.type, field.default, field.metadata
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (a for a in typing.get_args(kind) if a is not type(None))
    if meta["choices"]:
        yield from (choice for choice in meta["choices"] if choice != default)
    elif kind is bool:
        yield str(not default).lower()
    elif name in NUMBERS:
        yield NUMBERS[name]
    elif kind in (int, float) and not default and name not in LARGE:  # off, until it has a value
        yield "2" if kind is int else "0.5"


def flags_of(values: list[str]) -> list[str]:
    return [f"--{flag}" for value in values for flag in value.split()]


def refused(base: str, values: list[str]) -> str | None:
    """The error that refuses these values together; None if there is none."""
    try:
        make_task(parse_run([*flags_of_base(base), *flags_of(values)]))
    except ConfigError as error:
        return str(error)
    return None


def two_steps(base: str, values: list[str], accumulate: int, workdir: str):
    """Trains two steps, and resumes for another."""
    flags = [*flags_of_base(base), *flags_of(values)]
    for steps in (2, 3):
        more = (f"--train.accumulate={accumulate}", f"--train.steps={steps}")
        more = taken(class_of(base), more)
        assert train.main([*flags, *more, f"--workdir={workdir}"]) == 0
    rows = (pathlib.Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows][-1] == 3


def grown(base: str, left: list[str], check) -> list[str]:
    """As many values as `check` finds to go together."""
    run: list[str] = []

    def add(values: list[str]):
        """Adds all; or halves them, until what does not go with the others is one value."""
        taken, fresh = {name for value in run for name in names_in(value)}, []
        for value in values:
            if not taken & names_in(value):
                taken |= names_in(value)
                fresh.append(value)
        if fresh and check(base, run + fresh) is None:
            run.extend(fresh)
        elif len(values) > 1:
            add(values[: len(values) // 2])
            add(values[len(values) // 2 :])

    add(left)
    return run


def chosen_runs(base: str, done: set[str]) -> tuple[list[list[str]], dict[str, str]]:
    """(values of each run, value -> why no run has it), without what is `done` already."""
    left, runs, why = [value for value in candidates(base) if value not in done], [], {}
    random.Random(0).shuffle(left)
    while left:
        run = grown(base, left, refused)
        if not run:
            why |= {value: refused(base, [value]) for value in left}
            break
        if trains(base, run):  # refused later than by its flags alone
            good = grown(base, run, trains)
            alone = {value: trains(base, [value]) for value in run if value not in good}
            why |= {value: message for value, message in alone.items() if message}
            run = good or [value for value, message in alone.items() if not message][:1]
        if run:
            print(base, *run, flush=True)
            runs.append(run)
        left = [value for value in left if value not in run and value not in why]
    return runs or [[]], why  # the base itself trains, too


def family(base: str) -> list[str]:
    """The bases of the same family."""
    return [b for b in BASES if b.split()[0] == base.split()[0]]


def in_runs(record: dict, bases: list[str]) -> set[str]:
    """The values that the runs of some bases have."""
    return {value for base in bases for run in record[base]["runs"] for value in run}


def names_in(value: str) -> set[str]:
    return {flag.partition("=")[0] for flag in value.split()}


def trains(base: str, values: list[str]) -> str | None:
    """As `refused`, but by training."""
    if message := refused(base, values):
        return message
    workdir = tempfile.mkdtemp()
    try:
        two_steps(base, values, 2, workdir)
    except ConfigError as error:
        return str(error)
    except BaseException:
        print("FAILED", base, *values, flush=True)
        raise
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    return None


def main(names: list[str]):
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for base in [b for b in BASES if not names or {b, b.split()[0]} & {*names}]:
        earlier = [b for b in family(base) if list(BASES).index(b) < list(BASES).index(base)]
        runs, why = chosen_runs(base, in_runs(record, earlier))
        record[base] = {"runs": runs, "refused": why}
        print(base, len(runs), "runs,", len(why), "refused", flush=True)
        record = {name: record[name] for name in BASES if name in record}
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
