"""What each score of a run means: its unit, direction, and convention."""

_OF_DIMENSIONS = "bits per dimension (pixel and channel), {}; lower is better"
_EXACT = _OF_DIMENSIONS.format("exact")
_BOUND = _OF_DIMENSIONS.format("from the variational bound, which is above the exact value")
_DEQUANTIZED = _OF_DIMENSIONS.format(
    "an upper bound: of the density of values with uniform noise added (Theis et al. 2016)"
)
_OF_BYTES = "bits per byte of UTF-8 text, {}; lower is better"
_AVERAGE = "of the averaged parameters"
# Task -> the convention of its bits per dimension.
BITS_PER_DIM = {
    "language_model": _EXACT,
    "discrete_diffusion": _BOUND,
    "normalizing_flow": _DEQUANTIZED,
    "vae": _BOUND,
    "diffusion": _BOUND,
    "rbm": _OF_DIMENSIONS.format("with a normalizer estimated by annealed importance sampling"),
}
# Task -> the convention of its bits per byte, where they are not exact.
BITS_PER_BYTE = {
    "discrete_diffusion": _OF_BYTES.format(
        "an upper bound, estimated at random times; exact for blocks of one token"
    ),
    "sequence_to_sequence": _OF_BYTES.format(
        "exact; of pairs those of the targets, given their sources"
    ),
}
# Sizes of what was scored.
COUNTS = {
    "tokens": "held-out tokens scored",
    "bytes": "bytes of held-out text scored",
    "images": "held-out examples scored",
    "answers": "held-out answers scored",
    "pairs": "held-out pairs scored",
    "num_real": "held-out examples compared",
    "num_drawn": "samples compared",
}
# By the last part of a metric's name: the first that it starts with.
NOTES = (
    ("bits_per_byte", _OF_BYTES.format("exact")),
    ("ode_bits_per_dim", f"by the probability-flow ODE, {_DEQUANTIZED}"),
    ("elbo_bits_per_dim", _BOUND),
    ("importance_bits_per_dim", _OF_DIMENSIONS.format("from the importance-weighted bound")),
    ("bits_per_code", "bits per code of the autoencoder, exact; lower is better"),
    ("perplexity", "exponential of the loss per token; lower is better"),
    ("loss", "objective of the training on held-out data; lower is better"),
    ("accuracy", "share of correct predictions; higher is better"),
    ("exact_match", "share of answers or pairs that are right in full; higher is better"),
    ("kl", "Kullback-Leibler divergence from the prior, in nats per example"),
    ("reconstruction", "negative log-likelihood of the reconstruction, in nats per example"),
    ("psnr", "peak signal-to-noise ratio of reconstructions, in dB; higher is better"),
    ("mse", "mean squared error of reconstructions, of values in -1 to 1; lower is better"),
    ("fid_inception", "Frechet Inception distance (FID); lower is better"),
    ("fd_", "Frechet distance to held-out examples in these features, not FID; lower is better"),
    ("kd_", "kernel distance to held-out examples in these features, not KID; lower is better"),
    ("precision", "share of samples near real examples (Kynkäänniemi et al. 2019)"),
    ("recall", "share of real examples near samples (Kynkäänniemi et al. 2019)"),
    ("agreement", "share of samples that the classifier assigns to the requested class"),
    ("classifier_accuracy", "accuracy of the classifier on held-out examples, for comparison"),
)  # fmt: skip


def note_of(metric: str, task: str) -> str:
    """The convention of a metric such as ``eval/bits_per_byte`` of a task; empty if unknown."""
    name = metric.rpartition("/")[2]
    if name in COUNTS:
        return COUNTS[name]
    if name == "bits_per_dim":
        note = BITS_PER_DIM.get(task, _OF_DIMENSIONS.format("as the task defines it"))
    elif name.startswith("bits_per_byte") and task in BITS_PER_BYTE:
        note = BITS_PER_BYTE[task]
    else:
        note = next((note for start, note in NOTES if name.startswith(start)), "")
    average = _AVERAGE if "ema/" in metric else ""
    return "; ".join(filter(None, (average, note)))
