"""Several processes as one program: found by flags, SLURM or a TPU pod, joined by jax.distributed.

Every process runs the same command. Which one it is comes from ``--distributed.*``, or from what
the machine says: the environment of a SLURM step, that of a TPU pod under GKE, or the metadata of a
TPU VM.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
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
from genai_jax.training.roll_call import RollCall

TPU_PORT = 8790  # of the coordinator on a TPU pod, where nobody names one


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    coordinator: str = field(
        "", "HOST:PORT of process 0, which listens there and on the port above; from SLURM or the "
        "TPU pod if unset", changeable=True,
    )  # fmt: skip
    num_processes: int | None = field(
        None, "processes of the run, with --distributed.coordinator", minimum=1, changeable=True
    )
    process_id: int | None = field(
        None, "which of them this is, with --distributed.coordinator", minimum=0, changeable=True
    )
    detect: bool = field(
        True, "join the other processes of a SLURM step or TPU pod", changeable=True
    )
    timeout_s: int = field(
        300, "seconds in which all processes have to join", minimum=1, changeable=True
    )
    heartbeat_s: int = field(
        40, "seconds of silence after which a process is given up", minimum=5, changeable=True
    )


class Place(NamedTuple):
    """Which process this is, and how to find the others."""

    host: str  # of process 0
    port: int
    count: int
    index: int
    local_devices: list[int] | None = None  # the only ones to use; None: all that are visible


def find_place(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among others by the flags or, without them, by the machine; else None.

    Raises:
      ConfigError: flags that are half given or contradict each other.
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
    """Of a step of several tasks that srun started.

    Several tasks of one node take one device each, unless SLURM itself gave each task its own.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")
    if not all(name in environ for name in names):
        return None
    job, count, index, nodes = (environ[name] for name in names)
    # The first of "node1", "node[003-017,021]", "node1,other2".
    host = "".join(re.match(r"([^,\[]+)\[?(\w*)", nodes).groups())
    together = int(re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    bound = bool(visible) and "," not in visible
    local = [int(environ.get("SLURM_LOCALID", 0))] if together > 1 and not bound else None
    port = 61440 + 2 * (int(job) % 2000)  # two jobs on a node seldom meet
    return Place(host, port, int(count), int(index), local)


def _from_tpu_pod(environ: Mapping[str, str]) -> Place | None:
    """Of a worker of a TPU slice, or of several slices: GKE's environment, or a VM's metadata."""
    hosts, index = environ.get("TPU_WORKER_HOSTNAMES"), environ.get("TPU_WORKER_ID")
    facts = environ
    if hosts is None or index is None:
        if not _is_tpu_vm(environ):
            return None
        hosts, index = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
        if hosts is None or index is None:
            return None
        facts = _tpu_env() | dict(environ)
    # A worker is named by its host, or by name:number:address.
    workers = [worker.split(":")[-1] for worker in hosts.split(",")]
    slices, which = (int(facts.get(f"MEGASCALE_{n}") or d) for n, d in
                     (("NUM_SLICES", 1), ("SLICE_ID", 0)))  # fmt: skip
    first = (facts.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    return Place(first, TPU_PORT, slices * len(workers), which * len(workers) + int(index.strip()))


def _is_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPUs, by its device files and Google's PCI vendor number."""
    if environ.get("TPU_SKIP_MDS_QUERY") or "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    devices = pathlib.Path("/dev")
    if not [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]:
        return False
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == "0x1ae0" for path in vendors)


def _metadata(name: str) -> str | None:
    """An attribute that Google's cloud keeps of this machine, None if it does not."""
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
            "--distributed.coordinator, .num_processes and .process_id, or "
            "--distributed.detect=false"
        ) from None


def _tpu_env() -> dict[str, str]:
    """The attribute "tpu-env" of a TPU VM: lines of NAME: 'value'."""
    pairs = re.findall(r"^(\w+):\s*'?(.*?)'?$", _metadata("tpu-env") or "", re.MULTILINE)
    return dict(pairs)


@contextlib.contextmanager
def join_processes(config: DistributedConfig) -> Iterator[None]:
    """Inside, all processes of the run are one program; nothing happens where there is only one.

    To be entered before anything touches a device. A process that fails inside ends all others,
    which show its error; one that is lost is named by the others.

    Raises:
      ConfigError: bad flags, or some process did not join in time.
    """
    place = find_place(config)
    if place is None:
        yield
        return
    call = RollCall(place.host, place.port + 1, place.count, place.index, config.timeout_s)
    with _ending_all(call, config.heartbeat_s):
        # Our own handler of SIGTERM takes part in the agreement on stops; XLA's would displace it.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            f"{place.host}:{place.port}",
            place.count,
            place.index,
            place.local_devices,
            "deactivate",  # of the automatic search: all is said
            initialization_timeout=config.timeout_s,
            heartbeat_timeout_seconds=config.heartbeat_s,
            shutdown_timeout_seconds=config.timeout_s,
        )
        if jax.default_backend() == "cpu":
            _keep_stdout_clean()
            # There only process 0 finds its programs again, and gloo gives up on a process that is
            # 30 s late: all are to compile at the same time.
            jax.config.update("jax_enable_compilation_cache", False)
        yield
        jax.distributed.shutdown()
    call.bye()


def _keep_stdout_clean():
    """Sends what libraries print to standard error: Gloo reports every connection that it makes.

    Standard output stays for what the command itself prints.
    """
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(original, "w", buffering=1, encoding=sys.stdout.encoding)


@contextlib.contextmanager
def _ending_all(call: RollCall, heartbeat_s: int) -> Iterator[None]:
    """A failure in here ends this process and, with its reason, all the others."""
    try:
        yield
    except (ConfigError, OSError) as error:
        call.tell(str(error), 2)
        call.leave(str(error), 2)
    except KeyboardInterrupt:
        call.tell("interrupted", 130)
        call.leave("interrupted", 130)
    except BaseException as error:
        # What breaks here when another process is lost is a collective; the line says who.
        if isinstance(error, jax.errors.JaxRuntimeError) and call.wait_for_end(heartbeat_s):
            call.leave(call.reason, call.code)
        call.tell(f"{type(error).__name__}: {error}", 1)
        traceback.print_exc()
        call.exit(1)


def is_main() -> bool:
    """Whether this is the process that writes what only one may write."""
    return jax.process_index() == 0


def gather_records(record: Any) -> list[Any]:
    """What every process has as `record` (JSON serialisable), in the order of the processes."""
    if jax.process_count() == 1:
        return [record]
    data = np.frombuffer(json.dumps(record).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(data.size, np.int32))
    padded = np.pad(data, (0, int(lengths.max()) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def all_processes(condition: bool) -> bool:
    """Whether `condition` holds in every process; waits for all of them."""
    return all(gather_records(bool(condition)))


def barrier():
    """Waits until every process is here."""
    gather_records(None)


def to_host(tree: Any) -> Any:
    """All of every global array of a tree, in host memory; all processes have to call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)
