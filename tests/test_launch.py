"""The scripts in experiments/pods/launch: the commands they print, and the parts that run here."""

import os
import shlex
import shutil
import subprocess
import time

import pytest

from genai_jax.components import parse_run
from tests.conftest import ROOT

LAUNCH = ROOT / "experiments" / "pods" / "launch"
RUN = ("--flagfile=experiments/pods/llama3_8b_v5p_128.flags", "--workdir=/mnt/my runs/8b")
FLAGS = ("--data.tokenizer=/mnt/it's.json", "--train.steps=5")
TPU = ("--name=pod", "--zone=us-east5-a")


def launch(script: str, *arguments: str, code: int = 0, path: str = "") -> tuple[str, str]:
    """Runs a script, checks its exit code, returns (stdout, stderr)."""
    system_path = os.environ["PATH"]
    done = subprocess.run(
        [str(LAUNCH / script), *arguments],
        env=os.environ | {"PATH": f"{path}{os.pathsep}{system_path}" if path else system_path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def commands(script: str, *arguments: str) -> list[list[str]]:
    """The commands that a dry run prints, split into words."""
    out, _ = launch(script, "--dry_run", *arguments)
    return [shlex.split(line) for line in out.splitlines()]


def parsed(words: list[str]):
    """The configuration of a training command, with its flagfile relative to the repository."""
    where = words.index("genai_jax.train") if "genai_jax.train" in words else words.index("train")
    path = f"--flagfile={ROOT}/"
    return parse_run([w.replace("--flagfile=", path) for w in words[where + 1 :]])


def check(config):
    assert config.run.workdir == "/mnt/my runs/8b"
    assert config.data.tokenizer == "/mnt/it's.json"
    assert config.train.steps == 5 and config.transformer.num_layers == 32


def remote(command: list[str]) -> list[str]:
    """The command that gcloud runs on all workers, without the part that reports exit codes."""
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=us-east5-a", "--worker=all"} <= set(command)
    (text,) = [w.removeprefix("--command=") for w in command if w.startswith("--command=")]
    words, _, rest = text.partition("; code=$?; ")
    assert rest == 'echo "$(hostname): exit code $code"; exit $code'
    return shlex.split(words)


def test_tpu_vm_copies_installs_and_trains_on_all_workers():
    pack, copy, clean, unpack, setup, train = commands("tpu_vm.sh", *TPU, *RUN, "--", *FLAGS)
    assert pack[:2] == ["bash", "-c"] and "ls-files" in pack[2]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and "--worker=all" in copy
    assert copy[5] == clean[2] and clean[:2] == ["rm", "-f"]
    assert copy[6] == "pod:genai_jax.tar.gz" and "genai_jax.tar.gz" in remote(unpack)[2]
    worker = "genai_jax/experiments/pods/launch/worker.sh"
    assert remote(setup) == ["bash", worker, "setup"]
    assert remote(train)[:3] == ["bash", worker, "train"]
    check(parsed(remote(train)))


def test_tpu_vm_clones_a_revision():
    source = ("--repository=https://example.org/a.git", "--revision=v1")
    clone, _, _ = commands("tpu_vm.sh", *TPU, *RUN, *source, "--project=p")
    assert "--project=p" in clone
    shell = remote(clone)[2]
    assert "git clone --quiet https://example.org/a.git genai_jax" in shell
    assert "git fetch --quiet https://example.org/a.git v1" in shell


@pytest.mark.parametrize(("answers", "code"), [("0 0 0", 0), ("0 3 143", 143), ("", 1)])
def test_tpu_vm_exits_with_the_largest_code_of_the_workers(answers, code, tmp_path):
    gcloud = tmp_path / "gcloud"
    lines = "".join(f"echo 'host-{i}: exit code {c}'\n" for i, c in enumerate(answers.split()))
    gcloud.write_text(f"#!/bin/sh\necho training\n{lines}exit {int(code != 0)}\n")
    gcloud.chmod(0o755)
    out, err = launch("tpu_vm.sh", *TPU, "--action=follow", code=code, path=str(tmp_path))
    assert "training" in out
    said = "no worker answered" if not answers else "exit codes of 3 worker(s): "
    assert said in err
    if code == 143:
        assert "1 x 0, 1 x 3, 1 x 143" in err


@pytest.fixture
def worker(tmp_path):
    """(function that starts worker.sh, folder of a repository whose Python is a shell script)."""
    folder = tmp_path / "experiments" / "pods" / "launch"
    folder.mkdir(parents=True)
    shutil.copy(LAUNCH / "worker.sh", folder)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\necho "got $*"\ntrap "echo saved; exit 143" TERM\n'
        'if [[ "$4" == wait ]]; then while true; do sleep 0.1; done; fi\nexit "$4"\n'
    )
    python.chmod(0o755)

    def start(*arguments):
        command = ["bash", str(folder / "worker.sh"), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start, tmp_path


def test_a_worker_exits_with_the_code_of_training(worker):
    start, _ = worker
    process = start("train", "--a=two words", "7")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 7
    assert out == "got -m genai_jax.train --a=two words 7\n"


def test_training_outlives_the_connection_and_is_stopped_by_a_signal(worker):
    start, folder = worker
    lost = start("train", "--a=b", "wait")
    deadline = time.monotonic() + 30
    while not (folder / "train.log").exists() or "got" not in (folder / "train.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lost.kill()
    lost.communicate()
    assert start("train", "--a=b", "0").wait() == 2  # one is already running
    follower = start("follow")
    assert start("stop").wait() == 0
    out, _ = follower.communicate(timeout=30)
    assert follower.returncode == 143
    assert out.splitlines()[-1] == "saved"


def test_gke_creates_a_workload_for_the_slice_of_the_flagfile():
    image = ("--cluster=c", "--image=registry/genai:1", "--num_slices=2", "--zone=z")
    (create,) = commands("gke.sh", *image, *RUN, "--", *FLAGS)
    assert create[:3] == ["xpk", "workload", "create"]
    options = dict(word.split("=", 1) for word in create[3:])
    command = options.pop("--command")
    assert options.pop("--workload").startswith("llama3-8b-v5p-128-")
    assert options == {
        "--cluster": "c",
        "--docker-image": "registry/genai:1",
        "--tpu-type": "v5p-256",  # cores
        "--num-slices": "2",
        "--zone": "z",
        "--max-restarts": "10",
        "--termination-grace-period-seconds": "300",
    }
    check(parsed(shlex.split(command)))


@pytest.mark.parametrize(("processes", "tasks"), [("gpu", 4), ("node", 1)])
def test_slurm_submits_one_process_per_gpu_or_node(processes, tasks):
    where = ("--nodes=3", "--gpus_per_node=4", f"--processes={processes}", "--partition=h200")
    (submit,) = commands("slurm.sh", *where, *RUN, "--", *FLAGS)
    assert submit[0] == "sbatch"
    assert {"--nodes=3", "--gpus-per-node=4", f"--ntasks-per-node={tasks}"} <= set(submit)
    assert "--partition=h200" in submit and not any("account" in word for word in submit)
    assert str(LAUNCH / "slurm.sbatch") in submit
    check(parsed(submit))


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (1, False), (143, True)])
def test_a_slurm_job_stopped_by_sigterm_is_requeued(ended, requeued, tmp_path):
    for name, body in (("srun", f"exit {ended}"), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*"\n{body}\n')
        (tmp_path / name).chmod(0o755)
    job = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "python", "-m", "x"]
    done = subprocess.run(command, env=job, capture_output=True, text=True)
    assert done.returncode == ended
    assert done.stdout.splitlines()[0].endswith(" python -m x")
    assert ("scontrol requeue 12" in done.stdout) == requeued


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("tpu_vm.sh", ("--zone=z",), "--name is not set"),
        ("tpu_vm.sh", (*TPU, "--action=go"), "--action=go is not one of all, copy"),
        ("tpu_vm.sh", (*TPU, "--revision=a"), "--revision=a needs --repository"),
        ("gke.sh", ("--clusters=c",), "--clusters is unknown; the options are cluster, image"),
        ("gke.sh", ("--cluster=c", "--image=i", "--num_slices=0"), "--num_slices=0 is not a whole"),
        ("gke.sh", ("--cluster=c", "--image=i", "--flagfile=no.flags", "--workdir=w"), "no such"),
        ("slurm.sh", ("--nodes=1", "--flagfile=/etc/hostname", "--workdir=w"), "no such"),
        ("slurm.sh", ("--nodes=1", "--flagfile=experiments/../../x", "--workdir=w"), "no such"),
        ("slurm.sh", ("--nodes=1", RUN[0], "--workdir=gs://b/x"), "URLs are not supp"),
        ("gke.sh", ("--cluster=c", "--image=i", RUN[0], "--workdir=runs/x"), "is relative"),
        ("tpu_vm.sh", (*TPU, RUN[0], "--workdir=runs/x"), "is relative"),
        ("slurm.sh", ("--nodes=1", "x"), "x is not an option"),
        ("slurm.sh", ("--nodes=1", *RUN, "--processes=core"), "not one of gpu, node"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, said):
    _, err = launch(script, "--dry_run", *arguments, code=2)
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_usage_is_shown(script):
    out, _ = launch(script, "--help")
    assert out.count("--") > 5 and "set -euo" not in out
