"""One device and eight give the same state."""

import pytest

from tests.commands import report_of

pytestmark = pytest.mark.depends_on("whole runs")

# Penalties of a GAN are differentiated twice, which multiplies what eight devices round otherwise:
# less than 1e-5 on one kind of CPU, 7e-5 on another.
TOLERANCES = {"gan": 2e-4}


@pytest.mark.parametrize(
    "names",
    [
        ("dit_text", "unet_class", "shortcut"),
        ("classifier", "gan", "ladder", "flow", "rbm"),
        (
            "skip_gram", "glove", "neural_lm", "blocks_of_text", "encoder_decoder",
            "latent_reader", "additive_attention",
        ),
    ],
    ids=["diffusion", "others", "text"],
)  # fmt: skip
def test_the_whole_state_of_tasks(names):
    report = report_of("tasks/eight_devices.py", *names)
    assert set(report) == set(names)
    for name, facts in report.items():
        assert facts["difference"] < TOLERANCES.get(name, 1e-5), (name, facts)
        assert facts["sharded"], name


def test_codebooks_and_parameters_of_a_quantized_autoencoder():
    for name, facts in report_of("tasks/autoencoder/eight_devices_vq.py").items():
        assert facts["codebooks"] == pytest.approx(0, abs=1e-5), (name, facts)
        assert facts["params"] == pytest.approx(0, abs=2e-5), (name, facts)
