"""The coordinate check: activations change by the same amount at all widths, or grow with them."""

import csv

import pytest

from genai_jax import coordinate_check
from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.scaling.coordinate_check import at_width, check, slopes

FLAGS = (
    "--data.dataset=addition:2",
    "--data.batch_size=4",
    "--data.sequence_length=30",
    "--data.prefetch=0",
    "--transformer.num_layers=1",
    "--transformer.embed_dim=32",
    "--transformer.num_heads=4",
    "--transformer.num_kv_heads=2",
    "--transformer.mlp_dim=64",
    "--optimizer.learning_rate=1e-3",
)


def test_activations_of_the_maximal_update_do_not_grow_with_the_width(tmp_path, monkeypatch):
    changes = []
    keep = lambda *request: changes.extend(check(*request)) or changes
    monkeypatch.setattr("genai_jax.scaling.coordinate_check.check", keep)
    coordinate_check.main([*FLAGS, "--widths=32,256", "--steps=2", f"--output={tmp_path}"])
    powers = slopes(changes)
    hidden = [f"layers/attention/{name}" for name in ("query", "key", "value", "out")]
    hidden += [f"layers/mlp/{name}" for name in ("up", "gate", "down")]
    for name in hidden:
        assert abs(powers["maximal_update", name]) < 0.15, name
        assert powers["standard", name] > powers["maximal_update", name] + 0.15, name
    for name in ("layers", "layers/mlp/up", "layers/mlp/down", "logits"):
        assert powers["standard", name] > 0.3, name
    assert powers["maximal_update", "logits"] < 0.1
    # At the base width both parametrizations are the same model.
    at_base = [c for c in changes if c.width == 32]
    half = len(at_base) // 2
    assert [c[1:] for c in at_base[:half]] == [c[1:] for c in at_base[half:]]
    with open(tmp_path / "coordinate_check.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(changes) and rows[-1]["activation"] == "logits"
    assert float(rows[-1]["mean_absolute_change"]) == changes[-1].mean_absolute_change
    assert (tmp_path / "coordinate_check.png").stat().st_size > 10_000


def test_widths_keep_the_proportions_of_the_run():
    config = parse_run(FLAGS)
    wide = at_width(config, 96, "maximal_update", 64).transformer
    assert (wide.num_heads, wide.kv_heads, wide.head_width, wide.mlp_width) == (12, 6, 8, 192)
    assert wide.base_width == 64
    heads = parse_run([
        *FLAGS, "--transformer.parametrization=maximal_update", "--transformer.base_width=32",
        "--transformer.base_head_dim=8",
    ])  # fmt: skip
    wide = at_width(heads, 64, "maximal_update", 32).transformer
    assert (wide.num_heads, wide.head_width, wide.base_head_dim) == (4, 16, 8)
    assert at_width(heads, 64, "standard", 32).transformer.base_head_dim is None
    with pytest.raises(ConfigError, match=r"40 is not in proportion .*num_kv_heads=2 would be 2.5"):
        at_width(config, 40, "standard", 32)
    with pytest.raises(ConfigError, match=r"at 64: .*num_kv_heads=4 is not a multiple"):
        at_width(config, 64, "maximal_update", 24)


def test_incomplete_or_unsupported_requests_are_refused(tmp_path):
    run = lambda *flags: coordinate_check.main([*FLAGS, *flags])
    with pytest.raises(ConfigError, match="--output is not set"):
        run()
    for widths in ("64", "64,x", "", "0,64"):
        with pytest.raises(ConfigError, match=f"--widths={widths}"):
            run(f"--output={tmp_path}", f"--widths={widths}")
    with pytest.raises(ConfigError, match="--task=rbm: the coordinate check works for"):
        coordinate_check.main(["--task=rbm", f"--output={tmp_path}"])
