"""Scores of sampled images, for every task that samples them."""

import dataclasses
from typing import ClassVar

import numpy as np

from genai_jax.config import field
from genai_jax.metrics.sample_scores import sample_scores
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.classification.images import load_classifier

MAX_REAL = 10_000  # held-out images to compare with, at most


@dataclasses.dataclass(frozen=True)
class ScoreFlags:
    """Flags of scores of sampled images, to be mixed into an `EvaluateRequest`."""

    classifier: str = field(
        "", "Workdir of a classifier by whose features sampled images are scored."
    )
    inception: str = field(
        "", "File of Inception weights of torch-fidelity, to score sampled images by FID."
    )
    num_samples: int = field(1000, "Images to sample and score.", minimum=10)
    sample_flags: ClassVar[tuple[str, ...]] = ("num_samples",)  # flags that matter to samples only

    def __post_init__(self):
        if self.scores_samples():
            return
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in self.sample_flags and value != f.default:
                raise ValueError(
                    f"--{f.name}={value} is for sampled images, which --classifier or "
                    "--inception scores; neither is set"
                )

    def scores_samples(self) -> bool:
        return bool(self.classifier or self.inception)


def score_images(
    data: ArrayData, images: np.ndarray, labels: np.ndarray | None, flags: ScoreFlags
) -> dict:
    """Distances to the held-out images, and how well the images match what was asked for.

    `modes` counts the labels, or combinations of them, that the classifier sees at least once.

    Args:
      data: of the run.
      images: sampled, uint8 [n, *space, channels].
      labels: what they are samples of, [n, attributes]; None or no attributes if nothing was asked.
      flags: what to score by.
    """
    real = data.loader.examples("validation", MAX_REAL)
    scores = {}
    if flags.classifier:
        describe = load_classifier(flags.classifier, data)
        real_features, real_seen = describe(real["image"])
        features, seen = describe(images)
        scores |= sample_scores(real_features, features, "classifier")
        scores["classifier_accuracy"] = float(np.mean(np.all(real_seen == real["labels"], 1)))
        shares = np.bincount(seen[:, 0], minlength=data.label_sizes[0]) / len(seen)
        scores["smallest_class_share"] = float(shares.min())
        modes = np.unique(seen, axis=0), np.unique(real["labels"], axis=0)
        scores["modes"], scores["modes_real"] = map(len, modes)
        if labels is not None and labels.shape[1]:
            right = seen == labels
            scores["agreement"] = float(np.mean(np.all(right, 1)))
            if right.shape[1] > 1:
                each = right.mean(0)
                scores |= {f"agreement_{i}": float(share) for i, share in enumerate(each)}
    if flags.inception:
        from genai_jax.metrics.inception import inception_fid

        scores["fid_inception"] = inception_fid(real["image"], images, flags.inception)
    return scores
