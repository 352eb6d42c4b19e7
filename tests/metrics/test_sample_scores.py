"""Metrics of generated examples, on features whose metrics are known."""

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.metrics.frechet import frechet_distance, gaussian_distance
from genai_jax.metrics.inception import inception_fid
from genai_jax.metrics.kernel_distance import kernel_distance
from genai_jax.metrics.precision_recall import precision_recall
from genai_jax.metrics.sample_scores import sample_scores

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(400, 5))


def test_frechet_distance_of_gaussians_in_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])  # diagonal covariances
    expected = 9.0 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    mean = np.array([3.0, 0, 0])
    distance = gaussian_distance(np.zeros(3), np.diag(a), mean, np.diag(b))
    assert distance == pytest.approx(expected, rel=1e-12)
    rotation, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    rotated = lambda variances: rotation @ np.diag(variances) @ rotation.T
    distance = gaussian_distance(np.zeros(3), rotated(a), rotation @ mean, rotated(b))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_equal_and_of_shifted_features():
    assert 0 <= frechet_distance(FEATURES, FEATURES) < 1e-9
    for seed in range(20):  # never negative, whatever the rounding
        features = 100 * np.random.default_rng(seed).normal(size=(20, 8))
        assert 0 <= frechet_distance(features, features) < 1e-6
    assert frechet_distance(FEATURES, FEATURES + 2) == pytest.approx(4 * 5, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 feature vectors, not 1"):
        frechet_distance(FEATURES[:1], FEATURES)


def test_kernel_distance_is_unbiased_and_matches_its_formula():
    same = [
        kernel_distance(RNG.normal(size=(100, 3)), RNG.normal(size=(100, 3)))[0] for _ in range(60)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)
    a, b = RNG.normal(size=(6, 2)), RNG.normal(size=(6, 2)) + 1
    kernel = lambda x, y: (x @ y / 2 + 1) ** 3
    within = lambda x: np.mean([kernel(p, q) for i, p in enumerate(x) for q in np.delete(x, i, 0)])
    across = np.mean([kernel(p, q) for p in a for q in b])
    distance, error = kernel_distance(a, b)
    assert distance == pytest.approx(within(a) + within(b) - 2 * across)
    without = [
        [kernel_distance(np.delete(a, i, 0), b)[0] for i in range(6)],
        [kernel_distance(a, np.delete(b, i, 0))[0] for i in range(6)],
    ]
    assert error == pytest.approx(np.sqrt(sum(5 * np.var(x) for x in without)))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_standard_error_of_a_kernel_distance_is_the_spread_over_independent_draws(shift):
    estimates = np.array(
        [
            kernel_distance(RNG.normal(size=(60, 5)), RNG.normal(size=(80, 5)) + shift)
            for _ in range(200)
        ]
    )
    spread, error = np.std(estimates[:, 0]), np.mean(estimates[:, 1])
    assert 0.8 * spread < error < 1.6 * spread  # up to sqrt(2) too large for equal distributions


def test_precision_and_recall_of_half_the_data():
    left = RNG.normal(size=(200, 2))
    right = left + np.array([100.0, 0])
    both = np.concatenate([left, right])
    precision, recall = precision_recall(both, left)
    assert precision == 1 and recall == pytest.approx(0.5, abs=0.02)
    precision, recall = precision_recall(left, both)
    assert precision == pytest.approx(0.5, abs=0.02) and recall == 1


def test_metrics_are_named_after_their_features_and_never_fid():
    scores = sample_scores(FEATURES, FEATURES[:100] + 0.1, "classifier")
    assert not any("fid" in name for name in scores)
    assert scores["fd_classifier"] > 0 and scores["fd_classifier_real_halves"] > 0
    assert scores["num_real"] == 400 and scores["num_drawn"] == 100


def test_inception_needs_its_weights_rgb_images_and_its_package(tmp_path):
    rgb = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"--inception=.*none\.pth: no such file"):
        inception_fid(rgb, rgb, str(tmp_path / "none.pth"))
    weights = tmp_path / "weights.pth"
    weights.touch()
    with pytest.raises(ConfigError, match="is for RGB images"):
        inception_fid(rgb[..., :1], rgb[..., :1], str(weights))
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install -e .\.\[fid\]"):
            inception_fid(rgb, rgb, str(weights))
