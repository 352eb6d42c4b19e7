"""Features and latents of images, of every family that computes them."""

import jax
import numpy as np
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.tasks.arrays import embedding
from genai_jax.tasks.registry import TASKS, task_class
from tests.every_flag import BASES

SHAPES = {
    "autoencoder": (4, 4, 4),
    "image_classifier": (8,),
    "normalizing_flow": (64,),
    "rbm": (5,),
}


def test_which_families_can():
    able = {name for name in TASKS if hasattr(task_class(name), "embed")}
    of_text = {"language_model", "masked_language_model", "discrete_diffusion", "word_vectors"}
    assert able == {*SHAPES, "vae", *of_text}


@pytest.mark.parametrize("family", SHAPES)
def test_every_image_has_its_own(family, monkeypatch):
    task = make_task(parse_run(["--data.batch_size=4", *BASES[family]]))
    params, mutables = jax.jit(task.init)(jax.random.key(0))
    images = task.data.loader.examples("validation", 5)["image"]
    whole = task.embed(params, mutables, images)
    assert whole.shape[0] == 5 and whole.dtype == np.float32 and np.isfinite(whole).all()
    assert whole.shape[1:] == SHAPES[family]
    if family == "rbm":
        machine, white = jax.device_get(params["machine"]), images.reshape(5, -1) / 16
        logits = white @ machine["weights"] + machine["hidden_bias"]
        np.testing.assert_allclose(whole, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    monkeypatch.setattr(embedding, "BATCH", 2)
    np.testing.assert_allclose(task.embed(params, mutables, images), whole, atol=1e-5)
    for wrong, said in (
        (images[0], r"images are uint8 \[8, 8, 1\]"),
        (images / 16, "images are float64"),
        (images.astype(int) + 1, "values from 1 to 17; this model takes 0 to 16"),
        (images[:0], r"images are uint8 \[0, 8, 8, 1\]"),
    ):
        with pytest.raises(ConfigError, match=said):
            task.embed(params, mutables, wrong)
