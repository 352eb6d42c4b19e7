"""isoFLOP ladders: every flagfile spends its budget, by the counts of the task itself."""

import re

import jax
import pytest

from genai_jax import ladder, study
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.scaling.study.folder import flagfiles

BASE = ("--data.batch_size=8", "--data.sequence_length=64", "--optimizer.schedule=linear")


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.flags"
    path.write_text("\n".join(BASE) + "\n")
    return path


def flags(base, **changes) -> list[str]:
    every = {
        "budgets": "1e11,3.5e11", "widths": "32,64,128", "aspect_ratio": 32, "head_dim": 16,
        "output": base.parent / "study", "least_steps": 20,
    } | changes  # fmt: skip
    return [f"--flagfile={base}", *(f"--{name}={value}" for name, value in every.items())]


@pytest.mark.smoke
def test_every_run_spends_its_budget(base, capsys):
    more = ("--data.dataset=python_source", "--data.answer_after=\n")
    assert ladder.main([*flags(base, warmup=0.1, evaluations=4), *more]) == 0
    paths = flagfiles(base.parent / "study")
    assert {p.stem for p in paths} == {
        f"c{c}_w{w}" for c in ("1e11", "3.5e11") for w in (32, 64, 128)
    }
    for path in paths:
        config = parse_run([f"--flagfile={path}"])
        task = make_task(config)
        per_step = task.flops_per_step()["flops_per_step"]
        budget = float(path.stem[1:].split("_")[0])
        assert abs(config.train.steps * per_step - budget) <= per_step / 2
        width = config.transformer.embed_dim
        assert config.transformer.num_layers == max(2, width // 32)
        assert config.transformer.head_width == 16
        assert config.optimizer.warmup_steps == round(0.1 * config.train.steps)
        assert config.eval.every == config.train.steps // 4
        assert config.data.dataset == "python_source" and config.data.sequence_length == 64
        assert config.data.answer_after == "\n"
        n, total, d, ratio, c = (
            float(x.replace(",", ""))
            for x in re.search(
                r"# N ([\d,]+) .* of ([\d,]+)\n# D ([\d,]+) .*, ([\d.]+) per .*\n# C (\S+) FLOPs",
                path.read_text(),
            ).groups()
        )
        params = jax.eval_shape(lambda task=task: task.init(jax.random.key(0)))[0]
        assert total == sum(x.size for x in jax.tree.leaves(params))
        assert n == total - task.data.vocab_size * width  # the head is not an embedding
        assert d == config.train.steps * 8 * 64
        assert ratio == pytest.approx(d / n, rel=1e-3)
        assert c == pytest.approx(config.train.steps * per_step, rel=1e-4)
    assert "FLOPs: 6 x matmul parameters" in capsys.readouterr().out


def test_rungs_out_of_bounds_are_left_out_and_listed(base, capsys):
    ladder.main(flags(base, least_tokens=1, most_tokens=20))
    out = capsys.readouterr().out
    kept = {p.stem for p in (base.parent / "study").glob("*.flags")}
    assert kept and len(kept) < 6
    for line in out.splitlines():
        if "is left out" in line:
            assert re.match(
                r"c\S+_w\d+ is left out: \S+ tokens per parameter, --(least|most)", line
            )
            assert line.split()[0] not in kept


def test_files_left_from_an_earlier_ladder_are_named(base, capsys):
    ladder.main(flags(base))
    capsys.readouterr()
    ladder.main(flags(base, widths="32"))
    out = capsys.readouterr().out
    assert "c1e11_w64.flags is left from before and does not belong to this ladder" in out
    assert "c1e11_w32.flags is left" not in out


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"widths": "40"}, (), "--widths: 40 is not a multiple of --head_dim=16"),
        ({"widths": "32,x"}, (), "--widths=32,x is not a list of numbers"),
        ({"budgets": "-1"}, (), "--budgets=-1: the numbers must be positive"),
        ({"budgets": "1e6"}, (), "--budgets: 1e.06 FLOPs suit no width; c1e6_w32: 0 step"),
        ({"budgets": "1e20"}, (), r"suit no width; c1e20_w32: .* steps, more than the 2147483647"),
        ({"budgets": ""}, (), "--budgets is not set"),
        ({"output": ""}, (), "--output is not set"),
        ({"component": "dit"}, (), "--component=dit is not a component of --task=language_model"),
        ({}, ("--transformer.mlp_dim=64",), "mlp_dim=64 is set, but on a ladder"),
        ({}, ("--flagfile=x",), "--flagfile, the base of the ladder, must be given once"),
        ({}, ("--dit.patch=2",), "dit.patch"),
    ],
)  # fmt: skip
def test_bad_ladders_are_one_line(base, changes, more, words):
    with pytest.raises(ConfigError, match=words) as caught:
        ladder.main([*flags(base, **changes), *more])
    assert "\n" not in str(caught.value)
    assert not list(base.parent.glob("study/*"))


def test_the_folder_is_a_study_of_its_own(tmp_path, capsys, monkeypatch):
    (tmp_path / "shared.flags").write_text('--data.answer_after:="\\n"\n--transformer.use_bias\n')
    base = tmp_path / "mine.flags"
    base.write_text("\n".join(("--flagfile=shared.flags", *BASE)) + "\n")
    monkeypatch.chdir(tmp_path)
    assert ladder.main(flags(base, output="made")) == 0
    for path in ("shared.flags", "mine.flags"):
        (tmp_path / path).unlink()  # the study needs neither
    made = tmp_path / "made"
    names = {path.name for path in made.iterdir()} - {p.name for p in flagfiles(made)}
    assert names == {"README.md", "study.flags", "base.flags"}
    config = parse_run([f"--flagfile={flagfiles(made)[0]}"])
    assert config.data.answer_after == "\n" and config.data.batch_size == 8
    capsys.readouterr()
    where = ("--study=made", f"--workdir={tmp_path / 'work'}")
    assert study.main([*where, "--dry_run", "--flops_per_second=1e9"]) == 0
    out = capsys.readouterr().out
    assert "6 run(s) to train" in out and "c1e11_w32" in out
    readme = (made / "README.md").read_text()
    assert "python -m genai_jax.ladder --flagfile=" in readme and "| c3.5e11_w128 |" in readme

    # Once more, with other widths: only the ladder's part of the README changes.
    (made / "README.md").write_text(readme + "Mine.\n")
    (tmp_path / "mine.flags").write_text("--data.batch_size=4\n")
    ladder.main(flags(base, output="made", widths="32"))
    readme = (made / "README.md").read_text()
    assert "| c3.5e11_w128 |" not in readme and readme.endswith("Mine.\n")
    assert parse_run([f"--flagfile={made}/c1e11_w32.flags"]).data.batch_size == 4
    # A base that is in the folder stays as it is.
    (made / "base.flags").write_text("--data.batch_size=2\n")
    with pytest.raises(ConfigError, match=r"base.flags is not from this command: choose another"):
        ladder.main(flags(base, output="made"))
    ladder.main(flags(made / "base.flags", output="made"))
    assert (made / "base.flags").read_text() == "--data.batch_size=2\n"


def test_names_that_no_text_file_can_hold_are_escaped_in_its_readme(base):
    assert ladder.main([*flags(base, output=base.parent / "\udcff"), "--train.log_every=3"]) == 0
    assert "output=" in (base.parent / "\udcff" / "README.md").read_text()


def test_too_few_runs_to_fit_are_said(base, capsys):
    ladder.main(flags(base, widths="32,64"))
    out = capsys.readouterr().out
    assert "too few runs for a study: the parametric law needs at least as many points" in out
    ladder.main(flags(base, widths="32,64", budgets="1e11,2e11,3e11", output=base.parent / "b"))
    assert "study: a law of parameters and tokens needs at least 3" in capsys.readouterr().out
    ladder.main(flags(base, output=base.parent / "c"))
    assert "too few" not in capsys.readouterr().out


def test_its_folder_is_a_study(base, tmp_path, capsys):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "README.md").write_text("# Mine\n\nA question.\n")
    ladder.main(flags(base))
    capsys.readouterr()
    where = (f"--study={tmp_path / 'study'}", f"--workdir={tmp_path / 'work'}")
    assert study.main([*where, "--dry_run", "--flops_per_second=1e9"]) == 0
    assert "6 run(s) to train" in capsys.readouterr().out
    assert (tmp_path / "study" / "README.md").read_text().startswith("# Mine")
