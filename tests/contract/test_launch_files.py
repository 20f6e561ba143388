"""The files of `launch/`: shells and schedulers can read them, and what they start is a run that pixtune knows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from pixtune.config import load_config
from tests.runs import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
WORDS = ["train_configs/demo.yaml", "output_dir=/tmp/a run"]


def test_every_file_is_one_that_this_test_knows() -> None:
    known = {*SCRIPTS, LAUNCH / "kubernetes.yaml", LAUNCH / "skypilot.yaml"}
    assert {*LAUNCH.iterdir()} == known and len(known) == 5
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert all(f"launch/{path.name}" in page for path in known)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shells_can_read_it(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def known_to_torchrun(words: list[str]) -> Any:
    """What torchrun itself makes of its words; a config's words are what pixtune makes of them."""
    args = get_args_parser().parse_args(words)
    assert (ROOT / args.training_script).is_file() and args.max_restarts > 0
    name, config, *overrides = args.training_script_args
    assert name == "--config"
    load_config(ROOT / config, overrides, folders_must_exist=False)
    return args


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Stand-ins for torchrun and SLURM's programs that write down how they were called."""
    for name, does in {
        "torchrun": "",
        "srun": "trap 'echo TERM >> \"$LOG\"; exit 0' TERM; for i in $(seq 100); do sleep 0.05; done; exit 3",
        "scontrol": "[ $1 = show ] && printf 'node7\\nnode8\\n'",
    }.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\n(printf "%q " {name} "$@"; echo) >> "$LOG"\n{does}\n')
        path.chmod(0o755)
    return tmp_path


def environment_of(commands: Path, **changes: str) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "LOG": str(commands / "log"), **job, **changes}


def log_of(commands: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (commands / "log").read_text().splitlines()]


def test_one_host_and_several_start_what_is_meant(commands: Path) -> None:
    subprocess.run([LAUNCH / "one_host.sh", *WORDS], env=environment_of(commands, GPUS="2"), cwd="/", check=True)
    several = environment_of(commands, HOSTS="3", HEAD="node1", RESTARTS="5")
    subprocess.run([LAUNCH / "several_hosts.sh", *WORDS], env=several, cwd="/", check=True)
    one, more = (known_to_torchrun(words[1:]) for words in log_of(commands))
    assert (one.standalone, one.nproc_per_node, one.training_script_args) == (True, "2", ["--config", *WORDS])
    assert (more.nnodes, more.max_restarts, more.rdzv_endpoint) == ("3", 5, "node1:29500")
    for script in ("one_host.sh", "several_hosts.sh"):
        assert "usage: " in refusal_of(LAUNCH / script, environment_of(commands))
    assert "HOSTS: the number of machines" in refusal_of(LAUNCH / "several_hosts.sh", environment_of(commands), *WORDS)


def refusal_of(script: Path, env: dict[str, str], *words: str) -> str:
    """What a script prints that refuses to start."""
    ended = subprocess.run([script, *words], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    return ended.stderr


def test_slurm_saves_before_the_time_limit_and_goes_back_into_the_queue(commands: Path) -> None:
    script = LAUNCH / "slurm.sbatch"
    with subprocess.Popen(["bash", script, *WORDS], env=environment_of(commands), cwd=ROOT) as batch:
        while not (commands / "log").exists() or "srun" not in (commands / "log").read_text():
            time.sleep(0.01)
        time.sleep(0.2)
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(5) == 0
    calls = log_of(commands)
    assert [words[0] for words in calls] == ["scontrol", "srun", "TERM", "scontrol"]
    assert calls[-1] == ["scontrol", "requeue", "4711"]
    args = known_to_torchrun(calls[1][calls[1].index("torchrun") + 1 :])
    assert (args.nnodes, args.rdzv_id, args.rdzv_endpoint) == ("2", "4711", "node7:24711")
    assert "resume_from_checkpoint=latest" in args.training_script_args
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))
    assert options["requeue"] == "" and options["open-mode"] == "append" and options["ntasks-per-node"] == "1"
    to, seconds = options["signal"].split("@")
    assert to == "B:USR1" and int(seconds) > 300, "longer than torchrun lets a run save"


def test_slurm_passes_on_how_the_run_has_ended(commands: Path) -> None:
    (commands / "srun").write_text("#!/bin/bash\nexit 3\n")
    ended = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *WORDS], env=environment_of(commands), cwd=ROOT, check=False
    )
    assert ended.returncode == 3 and [words[1] for words in log_of(commands)] == ["show"], "nothing is requeued"


def test_kubernetes_file_has_what_the_operator_asks_for() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob") and job["metadata"]["name"]
    spec = job["spec"]
    (worker,) = spec["pytorchReplicaSpecs"].values()
    elastic, pod = spec["elasticPolicy"], worker["template"]["spec"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    assert worker["restartPolicy"] == "OnFailure" and elastic["rdzvBackend"] == "c10d"
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, *words = container["command"]
    args = known_to_torchrun(["--max-restarts", str(elastic["maxRestarts"]), *words])
    assert program == "torchrun" and "resume_from_checkpoint=latest" in args.training_script_args
    (patience,) = (int(each["value"]) for each in container["env"] if each["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert pod["terminationGracePeriodSeconds"] > patience


def test_skypilot_file_starts_the_same_run_on_each_node(commands: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task.keys() == {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run"}
    (mount,) = task["file_mounts"].values()
    assert mount["mode"] == "MOUNT_CACHED" and re.fullmatch(r"[A-Z]\w+:\d+", task["resources"]["accelerators"])
    nodes = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-1",
    }  # fmt: skip
    subprocess.run(["bash", "-c", task["run"]], env=environment_of(commands, **nodes), check=True)
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    ((_, *words),) = log_of(commands)
    args = known_to_torchrun(words)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint) == ("2", "8", "10.0.0.1:29500")
    assert "resume_from_checkpoint=latest" in args.training_script_args
