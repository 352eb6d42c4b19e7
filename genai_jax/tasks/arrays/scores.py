"""Scores of sampled images, for all tasks that sample images."""

import dataclasses
from typing import ClassVar

import numpy as np

from genai_jax.config import field
from genai_jax.media import checked_levels
from genai_jax.metrics.sample_scores import sample_scores
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.classification.images import load_classifier

MAX_REAL = 10_000  # held-out images to compare with, at most


@dataclasses.dataclass(frozen=True)
class ScoreFlags:
    """Flags for scoring sampled images; a mixin of `EvaluateRequest`."""

    classifier: str = field(
        "",
        "Workdir of a classifier whose features are used to score sampled images.",
        path=True,
    )
    inception: str = field(
        "",
        "File of torch-fidelity's Inception weights, to compute the FID of sampled images.",
        path=True,
    )
    num_samples: int = field(1000, "Images to sample and score.", minimum=10)
    sample_flags: ClassVar[tuple[str, ...]] = ("num_samples",)  # flags that affect only samples

    def __post_init__(self):
        if self.scores_samples():
            return
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in self.sample_flags and value != f.default:
                raise ValueError(
                    f"--{f.name}={value} is for sampled images and needs --classifier or "
                    "--inception, to score them"
                )

    def scores_samples(self) -> bool:
        """Whether to sample images and score them."""
        return bool(self.classifier or self.inception)


def score_images(
    data: ArrayData, images: np.ndarray, labels: np.ndarray | None, flags: ScoreFlags
) -> dict:
    """Distances to the held-out images, and how well the images match the requested labels.

    `modes` counts the labels, or combinations of them, that the classifier sees at least once.

    Args:
      data: of the run.
      images: samples in levels, [n, *space, channels].
      labels: requested for each sample, [n, attributes]; None or without attributes if none were.
      flags: what to score with.
    """
    real, images = data.loader.examples("validation", MAX_REAL), checked_levels(images)
    scores = {}
    if flags.classifier:
        describe = load_classifier(flags.classifier, data)
        real_features, real_predicted = describe(real["image"])
        features, predicted = describe(images)
        scores |= sample_scores(real_features, features, "classifier")
        scores["classifier_accuracy"] = float(np.mean(np.all(real_predicted == real["labels"], 1)))
        shares = np.bincount(predicted[:, 0], minlength=data.label_sizes[0]) / len(predicted)
        scores["smallest_class_share"] = float(shares.min())
        modes = np.unique(predicted, axis=0), np.unique(real["labels"], axis=0)
        scores["modes"], scores["modes_real"] = map(len, modes)
        if labels is not None and labels.shape[1]:
            correct = predicted == labels
            scores["agreement"] = float(np.mean(np.all(correct, 1)))
            if correct.shape[1] > 1:
                each = correct.mean(0)
                scores |= {f"agreement_{i}": float(share) for i, share in enumerate(each)}
    if flags.inception:
        from genai_jax.metrics.inception import inception_fid

        scores["fid_inception"] = inception_fid(real["image"], images, flags.inception)
    return scores
