"""Inception FID, computed by torch-fidelity if it and its weights are available."""

import pathlib

import numpy as np

from genai_jax.config import ConfigError


def inception_fid(real: np.ndarray, generated: np.ndarray, weights: str) -> float:
    """FID of uint8 images [n, height, width, 3] and [m, height, width, 3].

    Args:
      real: real images.
      generated: generated images.
      weights: path of torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``.

    Raises:
      ConfigError: a missing file, torch-fidelity not installed, or images that are not RGB.
    """
    if not pathlib.Path(weights).is_file():
        raise ConfigError(f"--inception={weights}: no such file")
    if real.ndim != 4 or real.shape[-1] != 3:
        raise ConfigError(f"--inception is for RGB images, not examples of shape {real.shape[1:]}")
    try:
        import torch
        import torch_fidelity
    except ImportError:
        raise ConfigError(
            '--inception needs torch-fidelity: in the clone, pip install -e ".[fid]"'
        ) from None

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return torch.from_numpy(np.moveaxis(self.images[index], -1, 0).copy())

    result = torch_fidelity.calculate_metrics(
        input1=Images(generated), input2=Images(real), fid=True, verbose=False,
        cuda=torch.cuda.is_available(), feature_extractor_weights_path=weights,
    )  # fmt: skip
    return float(result["frechet_inception_distance"])
