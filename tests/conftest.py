"""Every test runs on the CPU, on programs that are compiled quickly and kept between runs."""

import contextlib
import gc
import itertools
import os
import pathlib
import signal
import sys
import threading

ROOT = pathlib.Path(__file__).parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Some containers forbid Python to keep what it compiles. A command of the tests would then spend 3
# more seconds on its imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Compiled programs are kept outside the clone, so that a second clone is warm. jax's keys cover its
# version, XLA's flags and the features of the CPU.
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
CACHE = CACHE / "genai_jax" / "tests"
CACHE_BYTES = 2 << 30
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

# Tests compile more than they compute, and XLA compiles several times faster without what LLVM
# optimizes: the init of a small GAN in 2 s, not 23 s. Its older way of emitting fusions, which the
# newest version no longer has, halves the time again, and not splitting programs for several
# threads saves a quarter of the rest. XLA reads its flags once; a process that compiles for an
# accelerator is not to inherit these.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    FAST_COMPILATION += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
_backend = {"XLA_FLAGS": f"{FAST_COMPILATION} {os.environ.get('XLA_FLAGS', '')}"}
if jax.__version_info__ >= (0, 11):
    # The interpreter of Mosaic GPU runs each warpgroup as a program whose callbacks wait, on XLA's
    # own threads, for other warpgroups. With as many threads as a small machine has cores, all of
    # them can wait for what no thread is left to run. XLA takes their number from here.
    _backend["NPROC"] = str(max(16, os.cpu_count() or 1))
_before = {name: os.environ.get(name) for name in _backend}
os.environ.update(_backend)
jax.devices()
for _name, _value in _before.items():
    if _value is None:
        del os.environ[_name]
    else:
        os.environ[_name] = _value


if threading.current_thread() is threading.main_thread():
    # Ignored under nohup, and in the background of a shell; processes inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.unchanged", "pytester")


def pytest_configure(config):
    """Deletes the oldest programs of a large cache. jax's own limit reads the folder each time."""
    if hasattr(config, "workerinput") or os.environ["JAX_COMPILATION_CACHE_DIR"] != str(CACHE):
        return
    with contextlib.suppress(FileNotFoundError):  # another session deletes them
        files = sorted(CACHE.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = itertools.accumulate(path.stat().st_size for path in files)
        for path, size in zip(files, total, strict=True):
            if size > CACHE_BYTES:
                path.unlink()


MAPS = pathlib.Path("/proc/self/maps")
# Linux ends a process with more than 65,530, and a worker would come to as many.
MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Lets compiled programs go after a file of tests, if there are many: each is several maps."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> pathlib.Path:
    """Forty short documents of made-up sentences, the same every time."""
    folder = tmp_path_factory.mktemp("text")
    line = "the cat saw a red fox near my old barn and it ran home over wet grass"
    words = line.split()
    for i in range(40):
        sentences = [
            " ".join(words[(i * 7 + j * k) % len(words)] for k in range(1, 9)) for j in range(3, 9)
        ]
        (folder / f"{i:02}.txt").write_text(".\n".join(sentences) + ".\n")
    return folder
