"""The public call: identities that hold for every backend, errors, and the choice of a backend."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    Alibi,
    Causal,
    Full,
    Unsupported,
    Window,
    attention,
    backends,
    cudnn,
    explain,
    merge,
)
from tests.conftest import ROOT

from .cases import FAST, close, make, run

module = importlib.import_module("kernels_pallas.attention")
both = pytest.mark.parametrize("backend", ["xla", "xla_chunked"])


def call(backend="auto", **features):
    arrays, static = make(**features)
    return run(arrays, static, backend)


@both
def test_identities(backend):
    causal = call(backend)
    close(call(backend, logits_soft_cap=1e4), causal, 1e-6)
    close(call(backend, mask=Window(100)), causal, 1e-6)
    close(call(backend, mask=Full(), q_offset=60), call(backend, q_offset=60), 1e-6)
    arrays, static = make()
    close(run(arrays | dict(sinks=np.full(4, -1e9)), static, backend), causal, 1e-6)
    zero = Alibi(np.zeros(4))
    close(run(arrays | dict(bias=zero), static, backend), causal, 1e-6)


@both
def test_alibi_is_its_bias_array(backend):
    arrays, static = make(q_offset=5)
    slopes = np.array([0.1, 0.2, 0.3, 0.4])
    distance = np.abs(np.arange(53)[:, None] + 5 - np.arange(61))
    got = run(arrays | dict(bias=Alibi(slopes)), static, backend)
    bias = -slopes[:, None, None] * distance
    close(got, run(arrays | dict(bias=bias), static, backend), 2e-6)


@both
def test_packed_documents_do_not_see_each_other(backend):
    arrays, _ = make(q_length=61, kv_heads=2)
    ids = np.where(np.arange(61) < 24, 1, 2) * np.ones((2, 1), int)
    packed = np.asarray(run(arrays, dict(segment_ids=ids), backend))
    for part in (slice(0, 24), slice(24, 61)):
        separate = run({n: x[:, part] for n, x in arrays.items()}, {}, backend)
        close(packed[:, part], separate, 1e-6)


@both
def test_queries_that_see_no_key(backend):
    arrays, static = make(mask=Window(3), q_offset=-100)
    out, lse = map(np.asarray, run(arrays, static, backend, return_lse=True))
    assert (out == 0).all() and (lse == -np.inf).all()
    gradient = jax.grad(lambda a: attention(**a, **static, backend=backend).sum())
    gradients = jax.jit(gradient, compiler_options=FAST)(arrays)
    assert all((np.asarray(g) == 0).all() for g in gradients.values())
    arrays["sinks"] = sinks = np.arange(4.0)
    out, lse = map(np.asarray, run(arrays, static, backend, return_lse=True))
    assert (out == 0).all() and (lse == sinks[:, None]).all()


def test_decoding_token_by_token_matches_the_full_call():
    arrays, _ = make(q_length=9, kv_length=9, kv_heads=2)
    step = jax.jit(lambda q, i: attention(q, arrays["k"], arrays["v"], q_offset=i))
    steps = [np.asarray(step(arrays["q"][:, i : i + 1], i)) for i in range(9)]
    close(np.concatenate(steps, 1), run(arrays, {}), 1e-6)
    per_row = step(np.stack([arrays["q"][0, 3:4], arrays["q"][1, 7:8]]), np.array([3, 7]))
    close(per_row, np.stack([steps[3][0], steps[7][1]]), 1e-6)


@pytest.mark.parametrize("sinks", [False, True])
def test_merging_two_halves_gives_the_whole(sinks):
    arrays, static = make(kv_heads=2, mask=Full(), sinks=sinks)
    whole = run(arrays, static, return_lse=True)
    first = {n: x[:, :20] if n in "kv" else x for n, x in arrays.items()}
    second = {n: x[:, 20:] if n in "kv" else x for n, x in arrays.items() if n != "sinks"}
    parts = [run(half, static, return_lse=True) for half in (first, second)]
    close(merge(*parts[0], *parts[1]), whole, 1e-6)


def test_merge_with_parts_that_see_no_key():
    out, lse = map(np.asarray, run(make()[0], {}, return_lse=True))
    nothing = np.zeros_like(out), np.full_like(lse, -np.inf)
    close(merge(out, lse, *nothing), (out, lse), 1e-7)
    close(merge(*nothing, out, lse), (out, lse), 1e-7)
    out, lse = map(np.asarray, merge(*nothing, *nothing))
    assert (out == 0).all() and (lse == -np.inf).all()
    gradient = jax.jit(jax.grad(lambda *a: merge(*a)[0].sum(), (0, 1, 2, 3)))
    gradients = gradient(*nothing, *nothing)
    assert all(np.isfinite(g).all() for g in gradients)


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


Q, K = zeros(2, 6, 4, 8), zeros(2, 7, 2, 8)
INTS = jnp.zeros((2, 6), int)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(q=zeros(2, 6, 8)), r"q has shape \(2, 6, 8\); allowed: \[batch, length, heads"),
        (dict(v=zeros(7, 2, 8)), r"v has shape \(7, 2, 8\)"),
        (dict(k=K[:1], v=K[:1]), r"q has batch 2 and k, v 1; they must be equal"),
        (dict(v=K[:, :5]), r"k has shape \(2, 7, 2, 8\) and v \(2, 5, 2, 8\)"),
        (dict(q=Q[..., :4]), r"q has head_dim 4 and k, v 8"),
        (dict(q=Q[:, :, :3]), r"q has 3 heads and k, v 2; the first must be a multiple"),
        (dict(q=Q[:, :0]), r"q has shape \(2, 0, 4, 8\); every size must be >= 1"),
        (dict(q=Q.astype(int)), r"q has dtype int32; allowed: float32, bfloat16, float16"),
        (dict(q=Q.astype("float16")), r"dtypes float16, float32, float32; must be equal"),
        (dict(mask="causal"), r"mask is 'causal'; allowed: Full, Causal, Window"),
        (dict(bias=zeros(3, 6, 7)), r"bias has shape \(3, 6, 7\).*=\[2, 4, 6, 7\]"),
        (dict(bias=zeros(1, 1, 1, 6, 7)), r"bias has shape \(1, 1, 1, 6, 7\)"),
        (dict(bias=zeros(6, 7, dtype=bool)), r"bias has shape \(6, 7\), dtype bool"),
        (dict(bias=Alibi(zeros(2))), r"Alibi slopes has shape \(2,\).*\[heads\]=\[4\]"),
        (dict(sinks=zeros(4, 1)), r"sinks has shape \(4, 1\).*\[heads\]=\[4\]"),
        (dict(segment_ids=INTS), r"one segment_ids array for q_length 6 and kv_length 7"),
        (dict(segment_ids=(INTS, INTS)), r"kv segment_ids have shape \(2, 6\).*=\[2, 7\]"),
        (dict(segment_ids=(INTS * 1.0, INTS)), r"q segment_ids have .* float32; allowed: integers"),
        (dict(segment_ids=(INTS,)), r"segment_ids has 1 entries; allowed: an array or a pair"),
        (dict(q_offset=zeros(3, dtype=int)), r"q_offset has shape \(3,\).*\[batch\]=\[2\]"),
        (dict(q_offset=2**31), r"q_offset is 2147483648; allowed: -2\*\*30 to 2\*\*30"),
        (dict(scale=float("nan")), r"scale is nan; allowed: a number"),
        (dict(q_offset=0.5), r"q_offset has shape \(\), dtype float64; allowed: an int or"),
        (dict(scale="big"), r"scale is 'big'; allowed: a Python number"),
        (dict(logits_soft_cap=0), r"logits_soft_cap is 0.0; allowed: None or a finite"),
        (dict(backend="flash"), r"backend 'flash' is unknown; for cpu: allowed: auto, xla, xla_ch"),
        (dict(backend="tpu"), r"backend 'tpu' is not available on cpu: allowed: auto, xla, xla_c"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, match):
    arguments = dict(q=Q, k=K, v=K) | change
    for f in (attention, explain):
        with pytest.raises(ValueError, match=match) as error:
            f(**arguments)
        assert "\n" not in str(error.value)


def test_auto_on_cpu():
    def why(q_length, kv_length, **call):
        q = jax.ShapeDtypeStruct((2, q_length, 4, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((2, kv_length, 2, 8), jnp.float32)
        return explain(q, k, k, **call)

    assert why(64, 64).startswith("xla_chunked on cpu: ")
    assert why(1, 4096).startswith("xla on cpu: q_length <= 16")
    assert why(64, 64, q_offset=np.array([1, 2])).startswith("xla on cpu: q_offset is an array")
    assert why(64, 2**17, q_offset=np.array([1, 2])).startswith("xla_chunked on cpu")
    assert why(64, 64, backend="xla") == "xla on cpu: requested"
    assert backends() == ("xla", "xla_chunked")


@pytest.mark.parametrize(
    "platform, length, call, name",
    [
        ("tpu", 4096, {}, "tpu"),
        ("tpu", 64, dict(q_offset=np.array([0, 3])), "tpu"),
        ("tpu", 64, dict(bias=jnp.zeros((64, 64))), "xla"),
        ("gpu", 4096, {}, "gpu"),  # cuDNN needs the GPU on this machine
        ("gpu", 4096, dict(chip="NVIDIA A100"), "xla_chunked"),
        ("gpu", 64, dict(bias=jnp.zeros((64, 64)), return_lse=True), "xla"),
    ],
)
def test_auto_elsewhere(platform, length, call, name, monkeypatch):
    chip = call.pop("chip", "NVIDIA H200") if platform == "gpu" else "TPU v5"
    monkeypatch.setattr(module.choose.device, "platform", lambda: platform)
    monkeypatch.setattr(module.choose.device, "device_kind", lambda: chip)
    q = jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16)
    assert explain(q, q, q, **call).startswith(f"{name} on {platform}: ")
    assert set(backends()) >= {"xla", "xla_chunked"}
    assert ("tpu" in backends(), "cudnn" in backends()) == (platform == "tpu", platform == "gpu")


def reason_of_cudnn(needs_lse=False, **features):
    arrays, static = make(**dict(head_dim=64, q_length=61) | features)
    operands, spec = module.prepare(**arrays, **static)
    half = {n: jax.ShapeDtypeStruct(getattr(operands, n).shape, jnp.bfloat16) for n in "qkv"}
    try:
        cudnn.check(operands._replace(**half), spec, needs_lse)
    except Unsupported as error:
        return str(error)
    return ""


def test_calls_that_cudnn_supports(monkeypatch):
    assert "only on a machine with the GPU" in reason_of_cudnn()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "compute_capability", lambda: 8.0)
    assert "head_dim 192; allowed: multiples of 8 up to 128" in reason_of_cudnn(head_dim=192)
    monkeypatch.setattr(cudnn, "compute_capability", lambda: 7.5)
    assert reason_of_cudnn() == "compute capability 7.5; allowed: 8.0 and later"
    monkeypatch.setattr(cudnn, "compute_capability", lambda: 9.0)
    for features in ({}, dict(mask=Full(), q_length=9), dict(mask=Window(5) & Causal())):
        assert reason_of_cudnn(**features) == ""
    assert cudnn.window(Causal() & Window(7, 3)) == 7 and cudnn.window(Causal()) is None
    for features, reason in (
        (dict(q_length=9), "q_offset 0, q_length 9 and kv_length 61"),
        (dict(offsets=True), "q_offset as an array"),
        (dict(mask=Window(5, 2)), "allowed: Full, Causal, a window to the left"),
        (dict(head_dim=260), "head_dim 260; allowed: multiples of 8 up to 256"),
        (dict(needs_lse=True), "return_lse; cuDNN's log-sum-exp has no gradient"),
        (dict(sinks=True), "sinks; not supported with cuDNN"),
        (dict(segments=True), "segment_ids; "),
        (dict(alibi=True), "Alibi; "),
        (dict(logits_soft_cap=2.0), "logits_soft_cap; "),
    ):
        assert reason in reason_of_cudnn(**features), features


def test_a_backend_that_cannot_run_the_call(monkeypatch):
    def check(operands, spec, needs_lse):
        if spec.logits_soft_cap is not None:
            raise Unsupported("no soft cap")

    rule = module.Rule("fake", "fastest")
    monkeypatch.setattr(module, "AUTO", (rule, *module.AUTO))
    monkeypatch.setitem(module.BACKENDS, "fake", module.Backend(print, ("tpu",), check))
    with pytest.raises(ValueError, match=r"'fake' is not available on cpu: allowed: auto, xla, xl"):
        attention(Q, K, K, backend="fake")
    assert explain(Q, K, K).startswith("xla on cpu")
    monkeypatch.setitem(module.BACKENDS, "fake", module.Backend(print, ("cpu",), check))
    assert explain(Q, K, K) == "fake on cpu: fastest"
    assert explain(Q, K, K, logits_soft_cap=2.0).endswith("; not fake: no soft cap")
    with pytest.raises(ValueError, match="backend 'fake' cannot run this call: no soft cap"):
        attention(Q, K, K, logits_soft_cap=2.0, backend="fake")


def test_jit_with_static_arguments():
    f = jax.jit(attention, static_argnames=("mask", "backend", "scale", "return_lse"))
    arrays, _ = make()
    got = f(**arrays, mask=Causal(), bias=Alibi(np.ones(4, np.float32)))
    close(got, run(arrays, dict(bias=Alibi((1.0,) * 4))), 1e-6)


def test_importing_the_package_does_not_import_kernels():
    code = "import kernels_pallas, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "kernels_pallas.attention" in modules.stdout.split()
    assert "jax.experimental.pallas" not in modules.stdout.split()
