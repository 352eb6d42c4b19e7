"""The model card of a run."""

import json
import math
import shutil

import pytest
import yaml

from genai_jax import model_card, train
from genai_jax.config import ConfigError
from genai_jax.scaling import footprint
from genai_jax.scaling.metric_notes import note_of
from genai_jax.scaling.model_card import NOT_SAMPLED, UNKNOWN, exceeds_threshold
from genai_jax.tasks.registry import TASKS, task_class
from tests.commands import TINY

EMISSIONS = "timestamp,emissions,energy_consumed,codecarbon_version\nx,0.25,0.5,3.3\ny,0.5,1,3.3\n"
MORE = "More than 10^25 FLOPs, the threshold of Article 51(2) of the EU AI Act"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "my_run"
    flags = ["--train.steps=2", "--eval.batches=1", "--data.dataset=python_source"]
    assert train.main([*TINY, *flags, f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture
def card(tmp_path, workdir, capsys):
    def write(folder=workdir, *flags):
        path = tmp_path / f"card{len(list(tmp_path.glob('card*')))}.md"
        assert model_card.main([f"--workdir={folder}", f"--output={path}", *flags]) == 0
        assert str(path) in capsys.readouterr().out
        return path.read_text(encoding="utf-8")

    return write


def bullets(text):
    lines = (line[4:].split(":** ", 1) for line in text.splitlines() if line.startswith("- **"))
    return {name: value for name, value in lines}


def copy_of(workdir, folder, record=None, **files):
    """A run with other files; `record` replaces entries of run.json."""
    folder.mkdir()
    for name in ("flags.txt", "run.json", "metrics.jsonl"):
        (folder / name).write_text((workdir / name).read_text())
    content = json.loads((workdir / "run.json").read_text()) | (record or {})
    (folder / "run.json").write_text(json.dumps(content))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_the_card_says_what_the_run_says(card, workdir):
    text = card(workdir, "--license=apache-2.0", "--device_watts=100")
    record = json.loads((workdir / "run.json").read_text())
    facts = bullets(text)
    assert facts["Parameters"] == f"{record['parameters']['total']:,}"
    assert facts["FLOPs of the training"].startswith(f"{2 * record['flops_per_step']:.4g} (")
    assert facts[MORE] == "no" and facts["Steps"] == "2 of 2"
    for name, value in record["data"].items():
        if "sha256" in name:
            assert f"| {name} | `{value}` |" in text
    assert "`embed_dim=16`" in text and "`learning_rate=" in text
    hours = float(facts["Hours used"].split()[0])
    clock = json.loads((workdir / "checkpoints" / "2" / "clock" / "metadata").read_text())
    assert hours == pytest.approx(clock["seconds"] / 3600, rel=1e-3)
    energy = float(facts["Energy"].split()[0])
    assert energy == pytest.approx(hours * 0.1 * footprint.OVERHEAD, rel=1e-3)
    assert float(facts["Carbon Emitted"].split()[0]) == pytest.approx(energy * 0.475, rel=1e-3)
    assert "PUE" in facts["Method"] and "475 g" in facts["Method"] and "W (" in facts["Method"]
    sections = text.split("\n## ")
    for title in ("Uses", "Bias, Risks, and Limitations"):
        assert UNKNOWN in next(part for part in sections if part.startswith(title))


def test_the_metadata_are_what_the_hub_reads(card, workdir):
    hub = pytest.importorskip("huggingface_hub")
    parsed = hub.ModelCard(card(workdir, "--name=Mine: a/b", "--license=mit"))
    assert parsed.data.license == "mit" and parsed.data.pipeline_tag == "text-generation"
    results = {result.metric_type: result for result in parsed.data.eval_results}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for row in rows for name, value in row.items()}
    assert results["bits_per_byte"].metric_value == last["eval/bits_per_byte"]
    assert results["bits_per_byte"].dataset_name == "python_source (held-out part)"
    assert "tokens" not in results  # a size is no result


def test_scores_of_evaluate_replace_those_of_the_training(card, workdir, tmp_path):
    (tmp_path / "scores.json").write_text('{"fd_classifier": 0.5, "features": "x", "nan": NaN}')
    text = card(workdir, f"--scores={tmp_path / 'scores.json'}")
    assert "| fd_classifier | 0.5 | Frechet distance" in text and "eval/loss" not in text
    assert yaml.safe_load(text.split("---\n")[1])["model-index"]


def test_a_card_that_somebody_may_have_edited_stays(workdir, tmp_path):
    folder = copy_of(workdir, tmp_path / "run")
    assert model_card.main([f"--workdir={folder}"]) == 0
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md is there already"):
        model_card.main([f"--workdir={folder}"])
    assert (folder / "README.md").read_text() == "mine"


def test_the_threshold_is_strictly_greater(card, workdir, tmp_path):
    assert not exceeds_threshold(1e25) and exceeds_threshold(math.nextafter(1e25, math.inf))
    at, above = (
        copy_of(workdir, tmp_path / name, {"flops_per_step": flops})
        for name, flops in (("at", 5e24), ("above", 5.001e24))
    )
    assert bullets(card(at))[MORE] == "no" and bullets(card(above))[MORE] == "yes"


def test_the_compute_of_earlier_runs_counts(card, workdir, tmp_path):
    run = copy_of(workdir, tmp_path / "run", {"flops_per_step": 1e24})
    kept = run / "data" / "runs" / "diffusion.autoencoder"
    kept.parent.mkdir(parents=True)
    copy_of(workdir, kept, {"flops_per_step": 4.5e24})  # planned for two steps
    facts = bullets(card(run))
    assert "`--diffusion.autoencoder` (language_model)" in facts["Trained from"]
    assert "1.1e+25 with the planned training" in facts["FLOPs of the training"]
    assert facts[MORE] == "yes"
    (kept / "run.json").write_text("{}")
    facts = bullets(card(run))
    assert "whose compute is unknown" in facts["FLOPs of the training"]
    assert facts[MORE] == "not as far as it is known"


def test_runs_that_began_with_runs_that_began_with_runs_count(card, workdir, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for run, start in ((first, third), (second, first), (third, second)):  # even in a circle
        copy_of(workdir, run, {"flops_per_step": 2e24})  # in two steps
        with open(run / "flags.txt", "a") as flags:
            flags.write(f"--init_from={start}:2\n")
    facts = bullets(card(third))
    assert "1.2e+25 with the planned training" in facts["FLOPs of the training"]
    assert facts[MORE] == "yes" and facts["Trained from"].count("--init_from") == 2
    shutil.rmtree(first)
    facts = bullets(card(third))
    assert "8e+24 with" in facts["FLOPs of the training"] and "unknown" in facts["Trained from"]
    assert facts[MORE] == "not as far as it is known"


def test_measured_emissions_replace_the_factors(card, workdir, tmp_path):
    path = tmp_path / "emissions.csv"
    path.write_text(EMISSIONS)
    facts = bullets(card(workdir, f"--emissions={path}"))
    assert facts["Energy"] == "1.5 kWh" and facts["Carbon Emitted"] == "0.75 kg CO2 equivalent"
    assert facts["Method"] == "measured by codecarbon 3.3, the sum of 2 measurements"
    # One measurement that was written twice, and another.
    rows = ("project_name,run_id,emissions,energy_consumed", "a,1,1,2", "a,1,4,8", "b,2,1,2")
    path.write_text("\n".join(rows))
    facts = bullets(card(workdir, f"--emissions={path}"))
    assert facts["Energy"] == "10 kWh" and facts["Carbon Emitted"] == "5 kg CO2 equivalent"
    assert facts["Method"].endswith("the sum of 2 measurements of the projects a, b")


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ((), "a,b\n1,2\n", "not an emissions.csv of codecarbon"),
        ((), "emissions,energy_consumed\nnan,1\n", "not an emissions.csv"),
        ((), "emissions,energy_consumed\n", "not an emissions.csv"),
        (("--overhead=1.1",), EMISSIONS, "no effect with --emissions"),
        (("--overhead=0.5",), EMISSIONS, "overhead=0.5"),
        (("--output=/",), EMISSIONS, "--output=/ is a folder"),
        (("--workdir=",), EMISSIONS, "--workdir is not set"),
        (("--scores=missing.json",), EMISSIONS, "missing.json"),
    ],
)
def test_mistakes_are_one_line(workdir, tmp_path, flags, content, message):
    path = tmp_path / "emissions.csv"
    path.write_text(content)
    output = f"--output={tmp_path / 'card.md'}"
    with pytest.raises(ConfigError, match=message) as error:
        model_card.main([f"--workdir={workdir}", output, f"--emissions={path}", *flags])
    assert "\n" not in str(error.value) and not (tmp_path / "card.md").exists()


def test_facts_of_other_types_and_odd_text_do_no_harm(card, workdir, tmp_path):
    odd = {"parameters": 3, "data": {"a|b": "`x`|<b>\n# y"}, "flops_per_step": True, "devices": "x",
           "device_kind": ["H100"], "versions": [1], "mesh": "m", "changes": {"a": 1}}  # fmt: skip
    text = card(copy_of(workdir, tmp_path / "odd", odd), "--name=a\n# b", "--license=x: [y")
    assert "| a\\|b | `'x'\u00a6<b> # y` |" in text
    assert not any(line.startswith(("# y", "# b")) for line in text.splitlines())
    assert yaml.safe_load(text.split("\n---\n")[0][4:])["license"] == "x: [y"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="no run in --workdir="):
        card(empty)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "TPU v4"])
def test_known_devices_have_a_power_and_a_source(kind):
    watts, source = footprint.watts_of(kind)
    cost = footprint.by_factors(10, watts, source, 1.1, 400)
    assert cost.kilowatt_hours == pytest.approx(watts / 1000 * 11)
    assert cost.kilograms == pytest.approx(cost.kilowatt_hours * 0.4) and source in cost.method
    assert footprint.watts_of("TPU v5p") is None  # nobody has published it


def test_what_each_family_is_called_and_can_do():
    for name in TASKS:
        assert hasattr(task_class(name), "sample") != (name in NOT_SAMPLED), name
    assert "upper bound" in note_of("eval/bits_per_dim", "normalizing_flow")
    assert "bound" in note_of("eval/ema/bits_per_dim", "vae")
    assert note_of("eval/ema/loss", "vae").startswith("of the averaged parameters; ")
