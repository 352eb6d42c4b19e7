"""Which checkpoints are kept, and which are trusted."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.training.checkpoint import CheckpointConfig, Checkpointer, Unreadable
from genai_jax.training.checksum import checksums
from genai_jax.training.reports import last_good


def state_of(step):
    return {"w": jnp.full((3, 4), float(step)), "n": jnp.int32(step), "key": jax.random.key(step)}


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [2, 4]), (False, [4])])
def test_the_newest_and_the_best_are_kept(tmp_path, keep_best, kept):
    open_again = lambda: Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_best=keep_best))
    checkpointer = open_again()
    for step, loss in [(1, 1.0), (2, 0.5), (3, 0.9), (4, None)]:
        checkpointer.save(step, state_of(step), {"at": step}, {"seconds": 0}, loss)
        if step == 2:  # another process goes on
            checkpointer.close()
            checkpointer = open_again()
    checkpointer.wait()
    assert checkpointer.steps() == kept
    step, state, data, _ = checkpointer.restore(state_of(0))
    assert step == 4 and data == {"at": 4}
    np.testing.assert_array_equal(state["w"], 4.0)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3; there are \["):
        checkpointer.restore(state_of(0), 3)
    checkpointer.close()


def test_parts_of_a_state_are_restored_alone(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    state = {"params": {"a": jnp.ones(3), "b": jnp.ones(2)}, "ema": {"0.9": 2.0, "0.99": 3.0}}
    state["ema"] = jax.tree.map(jnp.float32, state["ema"])
    checkpointer.save(1, state, {}, {})
    _, found, _, _ = checkpointer.restore(state, only=("params/b", "ema/0.9"))
    assert found["params"]["a"] is None and found["ema"]["0.99"] is None
    np.testing.assert_array_equal(found["params"]["b"], 1.0)
    assert found["ema"]["0.9"] == 2.0
    checkpointer.close()


def test_checkpoints_set_aside_are_moved_and_not_deleted(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep=3))
    for step in (1, 2, 3):
        checkpointer.save(step, state_of(step), {}, {})
    checkpointer.wait()
    checkpointer.set_aside_after(1)
    assert checkpointer.steps() == [1]
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    checkpointer.save(2, state_of(2), {}, {})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_a_checksum_sees_a_changed_bit_and_a_swap():
    x = jnp.arange(6.0).reshape(2, 3)
    sums = [checksums({"x": y})["x"] for y in (x, x.at[1, 2].add(1e-6), x[::-1], x.T)]
    assert len(set(sums)) == 4 and checksums({"x": x + 0})["x"] == sums[0]


@pytest.mark.parametrize(
    ("failed", "loss_failed", "good"),
    [(7, True, 5), (7, False, 6), (6, True, None), (6, False, 5), (2, True, None)],
)
def test_the_last_good_checkpoint_is_not_the_one_whose_loss_failed(failed, loss_failed, good):
    assert last_good([5, 6] if failed == 7 else [5], failed, loss_failed) == good


def system_error(number):
    return OSError(number, os.strerror(number))


def wrapped(number):
    error = RuntimeError("restoring failed")
    error.__cause__ = system_error(number)
    return error


def quoted(number):
    return ValueError(
        f"DATA_LOSS: Error reading d/8f1 [OS error {number}: E... {os.strerror(number)}]"
    )


@pytest.mark.parametrize("error", [system_error, wrapped, quoted])
@pytest.mark.parametrize(
    ("number", "damaged"),
    [(n, False) for n in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
                          errno.EMFILE, errno.ETIMEDOUT)]
    + [(errno.ENOENT, True), (errno.EISDIR, True)],
)  # fmt: skip
def test_only_a_damaged_checkpoint_is_passed_over(
    tmp_path, monkeypatch, capsys, error, number, damaged
):
    """One that cannot be read now, whatever the system's error went through, ends the run."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep=3))
    for step in (1, 2):
        checkpointer.save(step, state_of(step), {}, {})
    checkpointer.wait()
    restore = checkpointer._manager.restore

    def fails(step, **options):
        if step == 2:
            raise error(number)
        return restore(step, **options)

    monkeypatch.setattr(checkpointer._manager, "restore", fails)
    if damaged:
        assert checkpointer.restore(state_of(0))[0] == 1
        assert "/2 is damaged: " in capsys.readouterr().err
    else:
        with pytest.raises(Unreadable, match=f"2 in .* cannot be read now: {os.strerror(number)}"):
            checkpointer.restore(state_of(0))
    assert checkpointer.steps() == [1, 2] and not (tmp_path / "damaged").exists()
    checkpointer.close()
