"""A model card of a run, in the format of Hugging Face: YAML metadata, then Markdown.

The order of sections is that of the annotated model card template (Mitchell et al. 2019, "Model
Cards for Model Reporting"); what no file of a run can say is left to fill in.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from genai_jax.errors import printable
from genai_jax.outside import is_outside
from genai_jax.scaling.footprint import Footprint
from genai_jax.scaling.metric_notes import COUNTS, note_of
from genai_jax.scaling.run_facts import RunFacts

UNKNOWN = "[More Information Needed]"  # the template's words, which its readers search for
# Regulation (EU) 2024/1689, Article 51(2): "greater than".
SYSTEMIC_RISK_FLOPS = 1e25
# Components of a run that say how it is trained; the data have a section of their own, and the
# rest is the model.
TRAINING = {"train", "optimizer", "ema", "population", "mesh", "parallel", "compiler"}
NEITHER = {"data", "eval", "checkpoint", "sample", "sampler", "profile", "distributed"}
NOT_SAMPLED = ("image_classifier",)
IMAGES = "unconditional-image-generation"
# Task -> what the Hugging Face Hub calls it; others have no name there.
PIPELINES = {
    "language_model": "text-generation",
    "masked_language_model": "fill-mask",
    "discrete_diffusion": "text-generation",
    "sequence_to_sequence": "text2text-generation",
    "image_classifier": "image-classification",
    "vae": IMAGES,
    "gan": IMAGES,
    "diffusion": IMAGES,
    "few_step": IMAGES,
    "code_prior": IMAGES,
    "normalizing_flow": IMAGES,
    "rbm": IMAGES,
    "ngram": "text-generation",
    "hmm": "text-generation",
    "neural_lm": "text-generation",
    "word_vectors": "feature-extraction",
    "responder": "text-generation",
}


def exceeds_threshold(flops: float) -> bool:
    """Whether the EU AI Act presumes systemic risk: strictly more than 10^25 FLOPs."""
    return flops > SYSTEMIC_RISK_FLOPS


def card_text(
    facts: RunFacts,
    name: str,
    license: str,
    scores: Mapping[str, Any] | None,
    footprint: Footprint | None,
) -> str:
    """The whole card.

    Args:
      facts: of the run.
      name: of the model.
      license: an identifier such as "apache-2.0"; empty if not known.
      scores: what the evaluate command printed; None for the held-out metrics of the training.
      footprint: energy and emissions; None if not known.
    """
    chosen = facts.scores if scores is None else scores
    numbers = {n: x for n, x in chosen.items() if type(x) in (int, float)}
    metadata = yaml.safe_dump(
        _metadata(facts, name, license, numbers), sort_keys=False, allow_unicode=True
    )
    parts = [
        f"---\n{metadata}---\n\n# Model Card for {_text(name)}\n",
        *_details(facts, license),
        *_uses(facts),
        *_training(facts),
        *_evaluation(facts, numbers, trained=scores is None),
        *_impact(facts, footprint),
        *_specifications(facts),
        f"## Citation\n\n{UNKNOWN}\n",
    ]
    return "\n".join(parts)


def _task(facts: RunFacts) -> str:
    return facts.flags.get("task", "language_model")


def _pipeline(facts: RunFacts) -> str | None:
    name = PIPELINES.get(_task(facts))
    shape = facts.get("data.shape", list)
    if name == IMAGES and shape is not None and len(shape) != 3:
        return None  # signals or videos
    condition = facts.flags.get("diffusion.condition", "")
    return "text-to-image" if name == IMAGES and condition == "text" else name


def _metadata(facts: RunFacts, name: str, license: str, scores: Mapping[str, float]) -> dict:
    """What the Hub reads: https://huggingface.co/docs/hub/model-cards."""
    pipeline = _pipeline(facts)
    metadata: dict[str, Any] = {"library_name": "genai_jax"}
    if license:
        metadata["license"] = license
    if pipeline:
        metadata["pipeline_tag"] = pipeline
    metadata["tags"] = ["genai_jax", "jax", "flax", printable(_task(facts))]
    if pipeline and scores:
        data = _without_home(facts.flags.get("data.dataset", "") or "unknown")
        result = {
            "task": {"type": pipeline},
            "dataset": {"name": f"{data} (held-out part)", "type": data},
            "metrics": [
                {"type": _short(metric), "name": metric, "value": value}
                for metric, value in scores.items()
                if _short(metric) not in COUNTS
            ],
        }
        metadata["model-index"] = [{"name": name, "results": [result]}]
    return metadata


def _short(metric: str) -> str:
    return metric.rpartition("/")[2]


def _details(facts: RunFacts, license: str) -> Iterator[str]:
    yield "## Model Details\n"
    yield _bullets(
        ("Developed by", UNKNOWN),
        ("Model type", f"{_code(_task(facts))}, trained with genai_jax"),
        ("Parameters", _count(facts.number("parameters.total")) + _active(facts)),
        ("License", _text(license) if license else UNKNOWN),
        ("Trained from", _origins(facts)),
    )


def _active(facts: RunFacts) -> str:
    total, active = facts.number("parameters.total"), facts.number("parameters.active")
    return f", of which {_count(active)} are active" if active and active != total else ""


def _origins(facts: RunFacts) -> str:
    if not facts.earlier:
        return "random initialization; no other run is part of it"
    named = (f"{_code('--' + run.flag)} ({_text(run.task) or 'unknown'})" for run in facts.earlier)
    return f"other runs: {', '.join(named)}"


def _uses(facts: RunFacts) -> Iterator[str]:
    task = _task(facts)
    use = "print(run.evaluate())" if task in NOT_SAMPLED else "samples = run.sample(num_samples=4)"
    loads = f'import genai_jax\n\nrun = genai_jax.load("PATH_OF_THIS_FOLDER")\n{use}\n'
    yield f"## Uses\n\n### Direct Use\n\n{UNKNOWN}\n\n### Out-of-Scope Use\n\n{UNKNOWN}\n"
    yield f"## Bias, Risks, and Limitations\n\n{UNKNOWN}\n"
    yield f"## How to Get Started with the Model\n\n```python\n{loads}```\n"
    if is_outside(task):
        code = f"`task={task!r}`"
        yield f"The code of its task is not part of genai_jax: `load` also takes {code}.\n"


def _training(facts: RunFacts) -> Iterator[str]:
    yield "## Training Details\n\n### Training Data\n"
    record = facts.get("data", dict) or {}
    yield _table(
        ("", ""),
        [(_text(name), _code(_without_home(_value(x)))) for name, x in record.items()]
        or [("data", UNKNOWN)],
    )
    yield "Hashes named `sha256` identify the data of each split.\n"
    for change in facts.get("changes", list) or []:
        yield f"Changed during the training: {_code(_value(change))}\n"
    yield "### Training Procedure\n\n#### Training Hyperparameters\n"
    yield _flags(facts, TRAINING)
    yield "#### Speeds, Sizes, Times\n"
    yield _bullets(
        ("Began", _text(str(facts.get("began", str) or UNKNOWN))),
        ("Steps", f"{facts.step:,} of {_text(facts.flags.get('train.steps', '?'))}"),
        ("FLOPs of the training", _compute(facts)),
        (
            "More than 10^25 FLOPs, the threshold of Article 51(2) of the EU AI Act",
            _above(facts),
        ),
        ("Convention of FLOPs", _text(facts.get("convention", str) or UNKNOWN)),
    )


def total_flops(facts: RunFacts) -> tuple[float | None, list[str]]:
    """FLOPs of the run and of all runs it builds on, and the flags whose runs are not counted."""
    counted = [run for run in facts.earlier if run.flops is not None]
    missing = [f"--{run.flag}" for run in facts.earlier if run.flops is None]
    own = facts.flops
    return (None if own is None else own + sum(run.flops or 0 for run in counted)), missing


def _compute(facts: RunFacts) -> str:
    total, missing = total_flops(facts)
    if total is None or facts.flops is None:
        return UNKNOWN
    text = f"{facts.flops:.4g} ({facts.number('flops_per_step'):.4g} per step)"
    if total != facts.flops:
        text += f"; {total:.4g} with the planned training of the runs it builds on"
    if missing:
        text += f"; without the runs of {', '.join(map(_code, missing))}, whose compute is unknown"
    return text


def _above(facts: RunFacts) -> str:
    total, missing = total_flops(facts)
    if total is None:
        return UNKNOWN
    if exceeds_threshold(total):
        return "yes"
    return "not as far as it is known" if missing else "no"


def _evaluation(facts: RunFacts, scores: Mapping[str, float], trained: bool) -> Iterator[str]:
    how = (
        "The last held-out metrics of the training"
        if trained
        else "What `python -m genai_jax.evaluate` printed for this run"
    )
    yield "## Evaluation\n"
    rows = [
        (_text(name), f"{value:.6g}", _text(note_of(name, _task(facts))))
        for name, value in scores.items()
    ]
    yield f"{how}, on data that were not trained on.\n" if rows else f"{UNKNOWN}\n"
    if rows:
        yield _table(("metric", "value", "convention"), rows)


def _impact(facts: RunFacts, footprint: Footprint | None) -> Iterator[str]:
    hours = facts.device_hours
    devices = f"{facts.number('devices') or '?'} x {facts.get('device_kind', str) or '?'}"
    missing = "power of this device is not known: `--device_watts`"
    if hours is None:
        missing = "time of the training is not known"
    energy = emitted = f"{UNKNOWN} (the {missing})"
    if footprint:
        energy = f"{footprint.kilowatt_hours:.4g} kWh"
        emitted = f"{footprint.kilograms:.4g} kg CO2 equivalent"
    yield "## Environmental Impact\n"
    yield _bullets(
        ("Hardware Type", _text(devices)),
        (
            "Hours used",
            UNKNOWN if hours is None else f"{hours:.4g} device hours, from the start of the "
            "training loop (compilation and evaluation included) to the last checkpoint",
        ),
        ("Energy", energy),
        ("Carbon Emitted", emitted),
        *([("Method", _text(footprint.method))] if footprint else []),
    )  # fmt: skip


def _specifications(facts: RunFacts) -> Iterator[str]:
    yield "## Technical Specifications\n\n### Model Architecture and Objective\n"
    components = {name.split(".")[0] for name in facts.flags if "." in name}
    yield _flags(facts, components - TRAINING - NEITHER)
    counts = facts.get("parameters", dict) or {}
    rows = [(_text(n), _count(x)) for n, x in counts.items() if type(x) in (int, float)]
    yield _table(("parameters", "count"), rows or [("total", UNKNOWN)])
    versions = facts.get("versions", dict) or {}
    software = [("Python", facts.get("python", str)), *versions.items()]
    software.append(("genai_jax commit", facts.get("git_commit", str)))
    yield "### Compute Infrastructure\n"
    yield _bullets(
        ("Mesh", _text(_value(facts.get("mesh", dict) or {})) or "one device"),
        ("Software", ", ".join(f"{_text(n)} {_text(str(v))}" for n, v in software if v) or UNKNOWN),
    )


def _flags(facts: RunFacts, components: set[str]) -> str:
    """The flags of components, one row for each component; what is off or empty is left out."""
    rows: dict[str, list[str]] = {}
    for flag, value in facts.flags.items():
        component, _, name = flag.rpartition(".")
        is_run = component == "" and name in ("task", "seed", "dtype") and "train" in components
        if (is_run or component in components) and value not in ("", "none"):
            rows.setdefault(component or "run", []).append(f"{name}={_without_home(value)}")
    shown = [(_code(name), ", ".join(map(_code, values))) for name, values in rows.items()]
    return _table(("component", "flags"), shown or [("", UNKNOWN)])


def _bullets(*items: tuple[str, str]) -> str:
    return "".join(f"- **{name}:** {value}\n" for name, value in items)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _value(value: Any) -> str:
    """A value of a record in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_value(x)}" for name, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "none" if value is None else str(value)


def _without_home(text: str) -> str:
    """A card is published: the user's name in paths is not."""
    home = os.path.expanduser("~")
    return text.replace(f"{home}/", "~/") if pathlib.Path(home).name else text


def _text(text: str) -> str:
    """Text of unknown origin as Markdown that shows exactly that."""
    escaped = printable(text)
    return re.sub(r"([\\`*\[\]<>|#]|\b_|_\b|(?<=\W)_|_(?=\W))", r"\\\1", escaped)


def _code(text: str) -> str:
    """As `_text`, in the font of code; a backtick cannot occur there."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', chr(166))}`"
