"""What post-training needs: frozen and adapted parameters, other runs, rollouts, fits."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from genai_jax import evaluate, sample, train
from genai_jax.components import make_task, parse_run, read_config
from genai_jax.config import ConfigError
from genai_jax.outside import allow
from genai_jax.tasks.protocol import LossOutput, Phase
from genai_jax.training import checkpoint
from genai_jax.training.frozen import FrozenStore, shapes_of
from genai_jax.training.restore import restore_model
from genai_jax.training.sharding import MESH_AXES, state_shardings
from genai_jax.training.step import TrainState, make_step
from genai_jax.training.transfer import SavedState
from genai_jax.training.trees import matching_paths, overlay, select
from tests import toy_tasks
from tests.toy_tasks import SLOPE

TASK = "--task=tests.toy_tasks:"
SHORT = (
    "--train.steps=6", "--train.log_every=1", "--train.progress=false", "--checkpoint.every=3",
    "--optimizer.warmup_steps=0", "--optimizer.learning_rate=0.1", "--optimizer.schedule=constant",
)  # fmt: skip


def run(name: str, workdir: pathlib.Path, *flags: str) -> list[dict]:
    """Trains a toy task; returns the rows of its metrics."""
    assert train.main([TASK + name, *SHORT, f"--workdir={workdir}", *flags]) == 0
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def params_of(workdir: pathlib.Path) -> dict:
    task = next(
        line.partition("=")[2]
        for line in (workdir / "flags.txt").read_text().splitlines()
        if line.startswith("--task=")
    )
    allow([task])
    config = read_config(str(workdir))
    return jax.device_get(restore_model(make_task(config), config).params)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """A trained linear model."""
    workdir = tmp_path_factory.mktemp("base")
    run("Linear", workdir, "--ema.decay=0.5", "--ema.use=0.5")
    return workdir


# Parts of the parameters.


def test_parts_of_nested_dictionaries():
    tree = {"a": {"x": 1, "y": 2}, "b": {"z": {"x": 3}}}
    assert select(tree, ["a/x", "b/z/x"]) == {"a": {"x": 1}, "b": {"z": {"x": 3}}}
    assert overlay(tree, {"a": {"x": 9}}) == {"a": {"x": 9, "y": 2}, "b": {"z": {"x": 3}}}
    assert matching_paths(tree, ["b"], "") == {"b/z/x"}
    assert matching_paths(tree, ["/x$"], "") == {"a/x", "b/z/x"}
    assert matching_paths(tree, ["a/y", "z"], "") == {"a/y", "b/z/x"}
    with pytest.raises(ConfigError, match=r"here: 'c' matches no parameter; the groups are a, b"):
        matching_paths(tree, ["a", "c"], "here")
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
        matching_paths(tree, ["("], "here")


def test_only_what_a_pattern_names_is_trained_averaged_and_saved(base, tmp_path):
    flags = ("--optimizer.trainable=/bias$", f"--init_from={base}", "--ema.decay=0.5")
    run("Linear", tmp_path, *flags)
    before, after = params_of(base), params_of(tmp_path)
    np.testing.assert_array_equal(
        after["model"]["layer"]["kernel"], before["model"]["layer"]["kernel"]
    )
    assert after["model"]["layer"]["bias"] != before["model"]["layer"]["bias"]
    saved = SavedState(str(tmp_path), "--workdir").shapes
    assert "ema/0.5/model/layer/bias" in saved and "ema/0.5/model/layer/kernel" not in saved
    moments = [name for name in saved if name.startswith("opt_state") and "kernel" in name]
    assert moments == []


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    for flag, said in (
        ("--optimizer.trainable=nothing_like_this", "matches no parameter; the groups are model"),
        ("--optimizer.trainable=model,heads", "'heads' matches no parameter"),
    ):
        with pytest.raises(ConfigError, match=f"--optimizer.trainable: .*{said}"):
            run("Linear", tmp_path, flag)
    flags = ("--optimizer.trainable=model",)
    with pytest.raises(ConfigError, match="leaves phase adapt nothing to train"):
        run("Adapted", tmp_path, *flags)


# Other runs.


def test_a_run_begins_as_another_one_ended_in_its_averages_too(base, tmp_path):
    run("Linear", tmp_path, f"--init_from={base}", "--train.steps=1", "--ema.decay=0.9",
        "--optimizer.learning_rate=0")  # fmt: skip
    begun, ended = params_of(tmp_path), params_of(base)  # the average that --ema.use names
    jax.tree.map(np.testing.assert_array_equal, begun, ended)
    run("Linear", tmp_path / "early", f"--init_from={base}:3", "--train.steps=1",
        "--optimizer.learning_rate=0")  # fmt: skip
    early = restore_model(*_opened(base), step=3).params
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "early"), early)
    raw = restore_model(*_opened(base), ema="none").params
    assert np.any(raw["model"]["layer"]["kernel"] != ended["model"]["layer"]["kernel"])


def _opened(workdir):
    allow(["tests.toy_tasks:Linear"])
    config = read_config(str(workdir))
    return make_task(config), config


def test_what_does_not_fit_is_named(base, tmp_path):
    for flags, said in (
        ((f"--init_from={tmp_path}",), "no run in --init_from="),
        ((f"--init_from={base}", "--init_map=model:nets"),
         "nothing named nets in this run to initialize, only model"),
        ((f"--init_from={base}", "--init_map=nets:model"), "has no params/nets/layer/bias, with"),
        ((f"--init_from={base}", "--init_map=model/layer/bias:model/layer/kernel"),
         r"model/layer/bias has shape \(1,\) there, and params/model/layer/kernel has \(4,\) here"),
        ((f"--init_from={base}:7",), r"base\d*:7: .*/checkpoints has checkpoints of \[3, 6\]"),
        (("--init_map=model",), "--init_map=model needs --init_from"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            run("Linear", tmp_path / "new", *flags)


def test_text_with_another_tokenizer_is_refused(text_folder, tmp_path):
    short = (
        "--task=tests.tasks.language.unigram:Unigram", f"--data.dataset=text:{text_folder}",
        "--data.sequence_length=32", "--train.steps=1", "--train.progress=false",
        "--eval.batches=0",
    )  # fmt: skip
    assert train.main([*short, f"--workdir={tmp_path / 'a'}"]) == 0
    record = tmp_path / "a" / "run.json"
    record.write_text(record.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    init = (f"--init_from={tmp_path / 'a'}", f"--workdir={tmp_path / 'b'}")
    with pytest.raises(ConfigError, match=r"--init_from=.* was trained with another tokenizer"):
        train.main([*short, *init])


# Adapters and what never changes.


def test_an_adapter_learns_what_its_frozen_base_lacks(base, tmp_path):
    rows = run(
        "Adapted", tmp_path, f"--toy.base={base}", "--train.steps=60", "--checkpoint.every=20"
    )
    assert rows[-1]["eval/loss"] < 0.1 * rows[0]["train/loss"]
    params = params_of(tmp_path)
    raw = restore_model(*_opened(base), ema="none").params
    jax.tree.map(np.testing.assert_array_equal, params["model"], jax.device_get(raw["model"]))
    merged = params["model"]["layer"]["kernel"] + params["adapter"]["delta"]
    np.testing.assert_allclose(merged, SLOPE, atol=0.3)


def test_a_frozen_group_is_saved_once_and_checkpoints_refer_to_it(base, tmp_path, capsys):
    flags = (f"--toy.base={base}",)
    whole = run("Adapted", tmp_path / "whole", *flags)
    state = checkpoint.Checkpointer(tmp_path / "whole" / "checkpoints", read_only=True)
    for step in state.steps():
        saved = shapes_of(state._manager.item_metadata(step)["state"])
        assert "params/adapter/delta" in saved and not [s for s in saved if "params/model" in s]
    assert [p.name for p in (tmp_path / "whole" / "frozen").iterdir()] == ["0"]
    # Resumed, the run goes on bit for bit, also when the base is gone.
    part = tmp_path / "part"
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    run("Adapted", part, f"--toy.base={moved}", "--train.steps=3")
    shutil.rmtree(moved / "checkpoints")
    resumed = run("Adapted", part, f"--toy.base={moved}")
    assert "resuming" in capsys.readouterr().err
    plain = lambda rows: [{k: v for k, v in r.items() if "perf" not in k} for r in rows]
    assert plain(resumed)[3:] == plain(whole)[3:]
    # What is no longer what the checkpoints refer to is noticed.
    shutil.rmtree(part / "frozen")
    layer = {"kernel": jnp.ones(4), "bias": jnp.zeros(1)}
    FrozenStore(part / "frozen", read_only=False).save({"model": {"layer": layer}})
    with pytest.raises(ConfigError, match="no other checkpoint is left"):
        run("Adapted", part, f"--toy.base={moved}", "--train.steps=8")


def test_a_checkpoint_of_an_older_layout_is_one_line(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "LAYOUT", 1)
        run("Linear", tmp_path)
    with pytest.raises(ConfigError, match="layout 1 of another version of genai_jax") as error:
        run("Linear", tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="layout 1 of another version"):
        evaluate.main([f"--workdir={tmp_path}", f"{TASK}Linear"])
    with pytest.raises(ConfigError, match="layout 1 of another version"):
        run("Linear", tmp_path / "new", f"--init_from={tmp_path}")


# Batches from the model, and several passes over one.


def test_a_batch_is_collected_before_the_step_with_python_rewards(tmp_path):
    rows = run("Collecting", tmp_path)
    for row in rows:
        assert row["train/reward"] < 0
        assert row["train/seen"] == pytest.approx(row["train/reward"], rel=1e-6)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_epochs_are_updates_on_the_same_slices_again():
    def loss(params, mutables, batch, info):
        value = 0.5 * jnp.mean(jnp.square(params["w"] - batch["x"]))
        return LossOutput(value, {"noise": jax.random.uniform(info.rng)}, mutables + 1)

    def trained(**options):
        phase = Phase("fit", ("w",), loss, optax.sgd(0.1), **options)
        params = {"w": jnp.float32(0)}
        state = TrainState(
            jnp.int32(0), params, jnp.int32(0), {"fit": phase.optimizer.init(params)}, {},
            jax.random.key(0),
        )  # fmt: skip
        return jax.jit(make_step((phase,)))(state, {"x": jnp.arange(8.0)})

    state, report = trained(repeats=2, epochs=3)
    expected = 0.0
    for _ in range(3):
        for i in range(2):
            expected -= 0.1 * (expected - np.mean(np.arange(8.0)[i::2]))
    assert float(state.params["w"]) == pytest.approx(expected, rel=1e-6)
    assert int(state.mutables) == 6
    assert float(report.metrics["noise"]) != float(trained(repeats=2)[1].metrics["noise"])


# Fitted without gradients.


def test_a_fitted_task_is_trained_and_evaluated_by_the_same_commands(tmp_path, capsys):
    short = [TASK + "Averages", "--train.steps=50", f"--workdir={tmp_path}"]
    assert train.main(short) == 0
    y = [
        np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32) @ SLOPE
        for i in range(1, 51)
    ]
    assert float(params_of(tmp_path)["mean"]) == pytest.approx(np.mean(y), rel=1e-5)
    assert evaluate.main([f"--workdir={tmp_path}", f"{TASK}Averages"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 1
    with pytest.raises(ConfigError, match=r"--optimizer.learning_rate is not a flag of --task"):
        parse_run([*short, "--optimizer.learning_rate=1"])


# Mutables on a mesh.


def test_mutables_follow_rules_of_their_own():
    devices = np.array(jax.devices()[:1]).reshape((1,) * len(MESH_AXES))
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    state = TrainState(
        shape(), {"w": shape(4)}, {"books": shape(8, 4), "other": shape(3)}, {}, {}, shape()
    )
    rules = (("^books$", ("batch", "embed")),)
    placed = state_shardings(state, (("w", ("embed",)),), mesh, rules)
    assert len(placed.mutables["books"].spec) == 2
    assert placed.mutables["other"].spec == PartitionSpec()
    with pytest.raises(ConfigError, match=r"mutable books \(8, 4\) does not fit its axes"):
        state_shardings(state, (("w", ("embed",)),), mesh, (("books", ("batch",)),))


def test_flags_that_mean_nothing_to_a_fitted_task_are_refused(tmp_path):
    for flag in ("--init_from=x", "--train.log_every=3", "--eval.every=2", "--checkpoint.every=7"):
        with pytest.raises(ConfigError, match=f"{flag} means nothing to --task=tests.toy_tasks"):
            train.main([TASK + "Averages", flag, f"--workdir={tmp_path}"])


def test_a_component_cannot_take_the_name_of_one_that_every_run_has(monkeypatch):
    monkeypatch.setattr(toy_tasks.Linear, "components", {"train": toy_tasks.ToyConfig})
    with pytest.raises(ConfigError, match="has a component 'train', a name that every run has"):
        parse_run([TASK + "Linear"])


def test_a_model_that_changed_since_its_checkpoint_is_named(base, monkeypatch):
    def wider(self, key):
        return {"model": {"layer": {"kernel": jnp.zeros(5), "bias": jnp.zeros(1)}}}, {}

    def deeper(self, key):
        return {"model": {"layer": {"kernel": jnp.zeros(4), "slope": jnp.zeros(1)}}}, {}

    rules = (*toy_tasks.Linear.partition_rules, ("slope$", (None,)))
    monkeypatch.setattr(toy_tasks.Linear, "partition_rules", rules)
    for init, said in (
        (wider, r"has params/model/layer/kernel of shape \(4,\), and this model .* shape \(5,\)"),
        (deeper, r"has no params/model/layer/slope"),
    ):
        monkeypatch.setattr(toy_tasks.Linear, "init", init)
        with pytest.raises(ConfigError, match=said):
            restore_model(*_opened(base), ema="none")


def test_an_adapted_model_is_sampled_and_reported_merged(base, tmp_path, capsys):
    run("Adapted", tmp_path, f"--toy.base={base}")
    params = params_of(tmp_path)
    merged = params["model"]["layer"]["kernel"] + params["adapter"]["delta"]
    assert np.any(params["adapter"]["delta"])
    capsys.readouterr()
    assert sample.main([f"--workdir={tmp_path}", f"{TASK}Adapted"]) == 0
    printed = np.array(json.loads(capsys.readouterr().out), np.float32)
    np.testing.assert_allclose(printed, merged, rtol=1e-6)
    assert evaluate.main([f"--workdir={tmp_path}", f"{TASK}Adapted"]) == 0
    reported = json.loads(capsys.readouterr().out)["first"]
    assert reported == pytest.approx(float(merged[0]), rel=1e-6)
