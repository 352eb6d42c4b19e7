"""Several processes as one program, connected by `jax.distributed`.

Every process runs the same command. Its index and the address of process 0 come from
``--distributed.*`` or are detected from the environment of a SLURM step, the environment of a TPU
pod under GKE, or the metadata of a TPU VM.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from genai_jax.config import ConfigError, field
from genai_jax.standard_streams import STDOUT, text_stream
from genai_jax.training.roll_call import RollCall

TPU_PORT = 8790  # of the coordinator on a TPU pod, which names none


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    coordinator: str = field(
        "", "HOST:PORT of process 0, which listens on that port and the next one; detected on "
        "SLURM and TPU pods if empty.", changeable=True,
    )  # fmt: skip
    num_processes: int | None = field(
        None, "Number of processes; needs --distributed.coordinator.", minimum=1, changeable=True
    )
    process_id: int | None = field(
        None,
        "Index of this process, from 0; needs --distributed.coordinator.",
        minimum=0,
        changeable=True,
    )
    detect: bool = field(
        True, "Detect and join the other processes of a SLURM step or TPU pod.", changeable=True
    )
    timeout_s: int = field(
        300, "Seconds to wait for all processes to join.", minimum=1, changeable=True
    )
    heartbeat_s: int = field(
        40,
        "Seconds without a heartbeat after which a process counts as lost.",
        minimum=5,
        changeable=True,
    )


class Place(NamedTuple):
    """The index of this process, and where process 0 is."""

    host: str  # of process 0
    port: int
    count: int
    index: int
    local_devices: list[int] | None = None  # the devices to use; None: all that are visible


def find_place(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process, from the flags or else detected; None if it is the only one.

    Raises:
      ConfigError: some of the flags are missing or contradict each other.
    """
    names = ("coordinator", "num_processes", "process_id")
    given = [name for name in names if getattr(config, name) not in ("", None)]
    if given and len(given) < len(names):
        missing = ", ".join(f"--distributed.{name}" for name in names if name not in given)
        raise ConfigError(f"--distributed.{given[0]} is set without {missing}")
    if given:
        place = _from_flags(config)
    elif config.detect:
        place = _from_slurm(environ) or _from_tpu_pod(environ)
    else:
        place = None
    return place if place and place.count > 1 else None


def _from_flags(config: DistributedConfig) -> Place:
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ConfigError(
            f"--distributed.coordinator={config.coordinator} is not HOST:PORT with a port from 1 "
            "to 65534"
        )
    if config.process_id >= config.num_processes:
        raise ConfigError(
            f"--distributed.process_id={config.process_id} is not below "
            f"--distributed.num_processes={config.num_processes}"
        )
    return Place(host.strip("[]"), int(port), config.num_processes, config.process_id)


def _from_slurm(environ: Mapping[str, str]) -> Place | None:
    """The place of a task in a SLURM step, as srun starts it.

    Several tasks on one node use one device each, unless SLURM already assigned each task its own.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")
    if not all(name in environ for name in names):
        return None
    job, count, index, nodes = (environ[name] for name in names)
    # The first node of "node1", "node[003-017,021]", or "node1,other2".
    host = "".join(re.match(r"([^,\[]+)\[?(\w*)", nodes).groups())
    together = int(re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    bound = bool(visible) and "," not in visible
    local = [int(environ.get("SLURM_LOCALID", 0))] if together > 1 and not bound else None
    port = 61440 + 2 * (int(job) % 2000)  # two jobs on a node rarely collide
    return Place(host, port, int(count), int(index), local)


def _from_tpu_pod(environ: Mapping[str, str]) -> Place | None:
    """The place of a worker of one or more TPU slices, from GKE's environment or VM metadata."""
    hosts, index = environ.get("TPU_WORKER_HOSTNAMES"), environ.get("TPU_WORKER_ID")
    facts = environ
    if hosts is None or index is None:
        if not _is_tpu_vm(environ):
            return None
        hosts, index = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
        if hosts is None or index is None:
            return None
        facts = _tpu_env() | dict(environ)
    # A worker is listed as its host, or as name:number:address.
    workers = [worker.split(":")[-1] for worker in hosts.split(",")]
    slices, which = (int(facts.get(f"MEGASCALE_{n}") or d) for n, d in
                     (("NUM_SLICES", 1), ("SLICE_ID", 0)))  # fmt: skip
    first = (facts.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    return Place(first, TPU_PORT, slices * len(workers), which * len(workers) + int(index.strip()))


def _is_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPUs: device files, and Google's PCI vendor ID."""
    if environ.get("TPU_SKIP_MDS_QUERY") or "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    devices = pathlib.Path("/dev")
    if not [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]:
        return False
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text(encoding="utf-8").strip() == "0x1ae0" for path in vendors)


def _metadata(name: str) -> str | None:
    """An attribute of this machine from Google Cloud's metadata server; None if it is not set."""
    server = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        raise ConfigError(
            f"this TPU VM's metadata server does not answer ({error}): set "
            "--distributed.coordinator, .num_processes, and .process_id, or "
            "--distributed.detect=false"
        ) from None


def _tpu_env() -> dict[str, str]:
    """The attribute "tpu-env" of a TPU VM, which has lines of the form NAME: 'value'."""
    pairs = re.findall(r"^(\w+):\s*'?(.*?)'?$", _metadata("tpu-env") or "", re.MULTILINE)
    return dict(pairs)


@contextlib.contextmanager
def join_processes(config: DistributedConfig) -> Iterator[None]:
    """Within this context, all processes of the run are one program; does nothing for a single one.

    Must be entered before anything touches a device. If a process fails inside, all others end and
    show its error; if a process is lost, the others name it.

    Raises:
      ConfigError: bad flags, or some process did not join in time.
    """
    place = find_place(config)
    if place is None:
        yield
        return
    call = RollCall(place.host, place.port + 1, place.count, place.index, config.timeout_s)
    with _fail_together(call, config.heartbeat_s):
        # XLA's handler of SIGTERM would replace ours, by which all processes agree when to stop.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            f"{place.host}:{place.port}",
            place.count,
            place.index,
            place.local_devices,
            "deactivate",  # cluster detection: everything is given
            initialization_timeout=config.timeout_s + 10,  # the roll call has given up by then
            heartbeat_timeout_seconds=config.heartbeat_s,
            shutdown_timeout_seconds=config.timeout_s,
        )
        call.confirm()
        if jax.default_backend() == "cpu":
            _keep_stdout_clean()
            # On CPU only process 0 gets hits in the compilation cache, and Gloo gives up on a
            # process that is 30 s late, so all processes have to compile at the same time.
            jax.config.update("jax_enable_compilation_cache", False)
        call.prove(_shared_secret())
        yield
        jax.distributed.shutdown()
    call.bye()


def _shared_secret() -> bytes:
    """A secret of process 0 that all processes of the run know, and nobody else.

    The key-value store of jax.distributed has no public interface; a collective is the public way
    to share anything.
    """
    return bytes.fromhex(gather_records(secrets.token_hex(32) if is_main() else "")[0])


def _keep_stdout_clean():
    """Redirects what libraries print to standard error: Gloo reports every connection.

    Standard output is reserved for what the command itself prints.
    """
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = text_stream(STDOUT, original, sys.stdout.encoding)


@contextlib.contextmanager
def _fail_together(call: RollCall, heartbeat_s: int) -> Iterator[None]:
    """Ends all processes, with the reason, if this one fails within this context."""
    try:
        yield
    except (ConfigError, OSError) as error:
        call.tell(str(error), 2)
        call.leave(str(error), 2)
    except KeyboardInterrupt:
        call.tell("interrupted", 130)
        call.leave("interrupted", 130)
    except BaseException as error:
        # If another process is lost, a collective fails here; the roll call knows which process.
        if isinstance(error, jax.errors.JaxRuntimeError) and call.wait_for_end(heartbeat_s):
            call.leave(call.reason, call.code)
        call.tell(f"{type(error).__name__}: {error}", 1)
        traceback.print_exc()
        call.exit(1)


def is_main() -> bool:
    """Whether this is the process that writes and prints for all."""
    return jax.process_index() == 0


def gather_records(record: Any) -> list[Any]:
    """The JSON-serializable `record` of every process, in the order of the processes."""
    if jax.process_count() == 1:
        return [record]
    data = np.frombuffer(json.dumps(record).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(data.size, np.int32))
    padded = np.pad(data, (0, int(lengths.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def all_processes(condition: bool) -> bool:
    """Whether `condition` holds in every process; waits for all processes."""
    return all(gather_records(bool(condition)))


def barrier():
    """Waits until every process has called this."""
    gather_records(None)


def to_host(tree: Any) -> Any:
    """Copies a tree of global arrays to host memory in full; all processes have to call this."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)
