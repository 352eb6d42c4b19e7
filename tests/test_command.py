"""What a command sets up before jax starts."""

import os

from genai_jax import command


def test_simulated_devices_get_threads_for_collectives_that_overlap(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    command._give_simulated_devices_threads()
    assert "NPROC" not in os.environ

    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    command._give_simulated_devices_threads()
    assert os.environ["NPROC"] == "64"

    monkeypatch.setenv("NPROC", "5")  # the user's choice stays
    command._give_simulated_devices_threads()
    assert os.environ["NPROC"] == "5"
