"""Which process this is, by flags, SLURM and TPU pods; and who does not answer the roll call."""

import subprocess
import sys
import threading

import pytest

from genai_jax.config import ConfigError
from genai_jax.training import distributed
from genai_jax.training.distributed import DistributedConfig, Place, find_place
from genai_jax.training.roll_call import RollCall
from tests.commands import environment
from tests.training.test_processes import free_port

FLAGS = {"coordinator": "host:1234", "num_processes": 4, "process_id": 3}
SLURM = {
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],other",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
}
GKE = {"TPU_WORKER_HOSTNAMES": "w0,w1,w2,w3", "TPU_WORKER_ID": "2"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
}


def test_flags_come_first():
    assert find_place(DistributedConfig(**FLAGS), SLURM) == Place("host", 1234, 4, 3)
    v6 = DistributedConfig("[::1]:80", 2, 0)
    assert find_place(v6, {}) == Place("::1", 80, 2, 0)
    assert find_place(DistributedConfig("host:1234", 1, 0), {}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"process_id": None}, "coordinator is set without --distributed.process_id"),
        ({"coordinator": "", "process_id": None}, "without --distributed.coordinator, --dist"),
        ({"coordinator": "host"}, "coordinator=host is not HOST:PORT"),
        ({"coordinator": "host:65535"}, "a port from 1 to 65534"),
        ({"process_id": 4}, "process_id=4 is not below --distributed.num_processes=4"),
    ],
)
def test_half_given_and_impossible_flags(changes, said):
    with pytest.raises(ConfigError, match=said):
        find_place(DistributedConfig(**FLAGS | changes), {})


@pytest.mark.smoke
def test_a_slurm_step():
    place = find_place(DistributedConfig(), SLURM)
    assert place == Place("gpu07", place.port, 6, 4, [1]) and 61440 <= place.port < 65535
    nodes = lambda text: find_place(DistributedConfig(), SLURM | {"SLURM_STEP_NODELIST": text}).host
    assert nodes("a1,b[2-3]") == "a1" and nodes("n-[003,5]") == "n-003" and nodes("solo") == "solo"
    # One task a node has all devices; and SLURM may have given each task its own.
    for changes in ({"SLURM_STEP_TASKS_PER_NODE": "1(x6)"}, {"CUDA_VISIBLE_DEVICES": "1"}):
        assert find_place(DistributedConfig(), SLURM | changes).local_devices is None
    assert find_place(DistributedConfig(detect=False), SLURM) is None
    assert find_place(DistributedConfig(), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    without_step = {k: v for k, v in SLURM.items() if "STEP" not in k}  # a batch script's own
    assert find_place(DistributedConfig(), without_step) is None


def test_a_tpu_pod(monkeypatch):
    port = distributed.TPU_PORT
    assert find_place(DistributedConfig(), GKE) == Place("w0", port, 4, 2)
    assert find_place(DistributedConfig(), GKE | SLICES) == Place("first", port, 8, 6)
    assert find_place(DistributedConfig(), GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    facts = {
        "worker-network-endpoints": "a:1:10.0.0.5,b:2:10.0.0.6",
        "agent-worker-number": "1\n",
        "tpu-env": "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }
    monkeypatch.setattr(distributed, "_is_tpu_vm", lambda environ: True)
    monkeypatch.setattr(distributed, "_metadata", facts.get)
    assert find_place(DistributedConfig(), {}) == Place("10.0.0.5", port, 4, 3)
    facts.clear()
    assert find_place(DistributedConfig(), {}) is None


def call_all(indices, count, seconds=0.5, counts=None):
    """What every one of the processes, played by threads, gets of a roll call."""
    port, found = free_port(), {}

    def join(index):
        try:
            ours = (counts or {}).get(index, count)
            found[index] = RollCall("localhost", port, ours, index, seconds)
        except ConfigError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=join, args=(i,)) for i in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_there():
    found = call_all(range(4), 4, seconds=20)
    provers = [threading.Thread(target=call.prove, args=(b"secret",)) for call in found.values()]
    for prover in provers:
        prover.start()
    for prover in provers:
        prover.join()
    for call in found.values():
        call.bye()
    assert not any(call.wait_for_end(0.05) for call in found.values())


@pytest.mark.smoke
def test_those_who_do_not_join_are_named_to_all():
    found = call_all([0, 2], 4)
    assert set(found.values()) == {"processes 1, 3 of 4 did not join within 0.5 s"}
    found = call_all([1], 2)
    assert found[1].startswith("process 0 did not join within 0.5 s: nothing answers at localhost:")


PROCESS = """
import sys, time
from genai_jax.training.roll_call import RollCall
port, index, fails = map(int, sys.argv[1:])
call = RollCall("localhost", port, 3, index, 60)
call.prove(b"secret")
print("there", flush=True)
if index == fails:
    sys.stdin.readline()  # until the others are there
    call.tell("no space left", 2)
    call.leave("no space left", 2)
time.sleep(60)
"""


@pytest.mark.parametrize(("killed", "fails"), [(0, -1), (1, -1), (-1, 0), (-1, 1)])
def test_all_leave_when_one_is_lost_or_fails(killed, fails):
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(index), str(fails)],
            env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(3)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in processes] == ["there\n"] * 3
    if killed >= 0:
        processes[killed].kill()
    else:
        processes[fails].stdin.write("\n")
        processes[fails].stdin.flush()
    for index, process in enumerate(processes):
        _, said = process.communicate(timeout=60)
        if killed >= 0 and index != killed:
            assert process.returncode == 1
            assert said.startswith(f"error: process {killed} is gone; run the same command")
        elif killed < 0:
            assert process.returncode == 2
            who = "" if index == fails else f"process {fails}: "
            assert said == f"error: {who}no space left\n"


def test_processes_of_different_runs_do_not_mix():
    found = call_all([0, 1], 2, counts={1: 3})
    refused = "process 1 of 3 tried to join a run of 2 processes"
    assert found == {1: refused, 0: f"process 1 of 2 did not join within 0.5 s; {refused}"}
