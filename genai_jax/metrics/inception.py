"""Inception FID by torch-fidelity, where that package and a file of its weights are there."""

import pathlib

import numpy as np

from genai_jax.config import ConfigError


def inception_fid(real: np.ndarray, drawn: np.ndarray, weights: str) -> float:
    """FID of uint8 images [n, height, width, 3] and [m, height, width, 3].

    Args:
      real: real images.
      drawn: drawn images.
      weights: the file ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity.

    Raises:
      ConfigError: no such file, no torch-fidelity, or images that are not RGB.
    """
    if not pathlib.Path(weights).is_file():
        raise ConfigError(f"--inception={weights}: no such file of Inception weights")
    if real.ndim != 4 or real.shape[-1] != 3:
        raise ConfigError(f"--inception is for RGB images, not for shape {real.shape[1:]}")
    try:
        import torch
        import torch_fidelity
    except ImportError:
        raise ConfigError("--inception needs torch-fidelity: pip install genai_jax[fid]") from None

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return torch.from_numpy(np.moveaxis(self.images[index], -1, 0).copy())

    result = torch_fidelity.calculate_metrics(
        input1=Images(drawn), input2=Images(real), fid=True, verbose=False,
        cuda=torch.cuda.is_available(), feature_extractor_weights_path=weights,
    )  # fmt: skip
    return float(result["frechet_inception_distance"])
