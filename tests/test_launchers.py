"""The launch lines people type: accelerate's in both spellings, the run_train_*.sh scripts, SLURM and SkyPilot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import check_setup
from routewright.errors import UserError
from routewright.textfiles import write_jsonl

ROOT = Path(__file__).resolve().parents[1]
OURS = ("NUM_GPUS", "PROFILE", "DRY_RUN", "NUM_PROCESSES", "NUM_NODES", "RDZV_ENDPOINT", "RDZV_ID", "RANK",
        "WORLD_SIZE")


def environment(**change):
    kept = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("SLURM_")}
    # cmd/test.sh sources env.sh itself, and what is asked here is what that does to a shell that has not.
    path = ":".join(part for part in os.environ["PATH"].split(":") if part != str(ROOT / "cmd" / "bin"))
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{Path(sys.executable).parent}:{path}", **change}


def shell(line, cwd=ROOT, **change):
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=environment(**change), capture_output=True, text=True,
                          timeout=300)


# --- accelerate -------------------------------------------------------------------------------------------------------

KNOWN = {"--config_file": True, "--num_processes": True, "--multi_gpu": False, "-m": False, "--main_process_port": True}


@pytest.mark.parametrize(("words", "made"), [
    ("--config rtx4060.yaml src/x.py", "--config_file {}/rtx4060.yaml src/x.py"),
    ("--config=rtx4060.yaml src/x.py", "--config_file {}/rtx4060.yaml src/x.py"),
    ("--config rtx4060 src/x.py", "--config_file {}/rtx4060.yaml src/x.py"),
    ("--config_file rtx4060.yaml src/x.py", "--config_file {}/rtx4060.yaml src/x.py"),
    ("--config-file=accelerate_configs/rtx4060.yaml x.py", "--config_file {}/rtx4060.yaml x.py"),
    ("--config here.yaml src/x.py", "--config_file here.yaml src/x.py"),
    ("--num_processes 2 --multi_gpu --config rtx4060.yaml x.py --config a.yaml",
     "--num_processes 2 --multi_gpu --config_file {}/rtx4060.yaml x.py --config a.yaml"),
    ("--config rtx4060.yaml -m pkg.train --config=a.yaml",
     "--config_file {}/rtx4060.yaml -m pkg.train --config=a.yaml"),
    ("--num_processes=2 src/x.py --config rtx4060.yaml", "--num_processes=2 src/x.py --config rtx4060.yaml"),
    ("src/x.py --config_file rtx4060.yaml", "src/x.py --config_file rtx4060.yaml"),
    ("--unheard of --config rtx4060.yaml", "--unheard of --config rtx4060.yaml"),
])
def test_only_the_profile_before_the_script_is_spelt_out(tmp_path, monkeypatch, words, made):
    from routewright.torchrun import spelt

    profiles = tmp_path / "accelerate_configs"
    profiles.mkdir()
    (profiles / "rtx4060.yaml").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("here.yaml").touch()
    assert spelt(words.split(), KNOWN, profiles) == made.format(profiles).split()


@pytest.mark.parametrize("words", ["--config", "--config nowhere.yaml x.py", "--config=other/rtx4060.yaml x.py"])
def test_a_profile_that_is_not_there_is_one_sentence(words):
    from routewright.torchrun import spelt

    with pytest.raises(UserError, match="accelerate_configs has cpu.yaml, ddp_4gpu.yaml"):
        spelt(words.split(), KNOWN)


@pytest.mark.slow
def test_the_users_line_trains_four_bit_lora_as_it_is_typed(tmp_path):
    """`accelerate launch --config rtx4060.yaml src/train_dpo.py` from the root, in a shell that sourced env.sh."""
    pairs = [{"prompt": f"{i} + {i * 7 % 10} = ?", "chosen": "1", "rejected": "2"} for i in range(60)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    done = shell(". cmd/env.sh && accelerate launch --config rtx4060.yaml src/train_dpo.py "
                 f"--data {tmp_path}/pairs.json --model_name data/sample/models/cheap --four_bit true --epochs 2 "
                 f"--batch_size 8 --learning_rate 2e-3 --output_dir {tmp_path}/out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "dev_scores.json").read_text())
    assert found["margin"] > found["start/margin"] + 1, found  # every pair prefers the same answer
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.slow
def test_the_spelling_that_works_everywhere_and_the_scripts_own_exit_code():
    done = shell(". cmd/env.sh && "
                 "accelerate launch --config_file accelerate_configs/rtx4060.yaml src/train_dpo.py --help")
    assert done.returncode == 0 and "--warm_start" in done.stdout, done.stderr
    # The script's own exit code and its one sentence, without accelerate's page; --config after it is its own.
    done = shell("cd cmd && . ./env.sh && accelerate launch --config cpu ../src/train_dpo.py --config no.yaml")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: no.yaml"), done.stderr
    assert "Traceback" not in done.stderr


def test_env_puts_our_accelerate_first_once_and_leaves_a_foreign_environment_alone(tmp_path):
    foreign = tmp_path / "bin"
    foreign.mkdir()
    (foreign / "accelerate").write_text("theirs")
    lines = shell(f'VIRTUAL_ENV={tmp_path}; PATH="{foreign}:$PATH"; . cmd/env.sh; . cmd/env.sh; '
                  'command -v accelerate; echo "$PATH"').stdout.splitlines()
    assert lines[0] == str(ROOT / "cmd/bin/accelerate") and lines[1].count(str(ROOT / "cmd/bin")) == 1
    assert (foreign / "accelerate").read_text() == "theirs"


@pytest.mark.parametrize("own", [True, False])
def test_setup_writes_the_pointer_into_the_projects_own_environment_only(tmp_path, own):
    """On a copy of the project whose environment is complete by its stamp."""
    project = tmp_path / "project"
    (project / "cmd").mkdir(parents=True)
    shutil.copy(ROOT / "cmd/setup.sh", project / "cmd")
    (project / "requirements.txt").write_text("torch==2.13.0\n")
    venv = project / ".venv" if own else tmp_path / "theirs"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    (venv / "bin/accelerate").write_text("the library's")
    change = {} if own else {"VIRTUAL_ENV": str(venv)}
    stamp = "wanted=$(sha256sum < requirements.txt | cut -c1-16)"
    shell(f"{stamp}; echo $wanted > {venv}/.routewright-requirements.txt", cwd=project)
    for told in (own, False):
        done = shell("unset VIRTUAL_ENV; " + "".join(f"export {k}={v}; " for k, v in change.items()) + "cmd/setup.sh",
                     cwd=project)
        assert done.returncode == 0 and ("writing" in done.stdout) == told, done
    text = (venv / "bin/accelerate").read_text()
    assert text == "the library's" if not own else str(project / "cmd/bin/accelerate") in text
    if own:
        (venv / "bin/accelerate").write_text("the library's, after pip install -U accelerate")
        assert "writing" in shell("unset VIRTUAL_ENV; cmd/setup.sh", cwd=project).stdout


# --- the run_train_*.sh scripts ---------------------------------------------------------------------------------------

def dry(name, *words, cwd=ROOT, **change):
    done = subprocess.run([str(ROOT / "cmd" / name), *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          env=environment(DRY_RUN="1", **change))
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    at = words.index("--")
    return words[1:at], words[at + 1], dict(zip(words[at + 2::2], words[at + 3::2], strict=True))


def test_the_llm_launcher_takes_eight_positionals_and_has_cobenchs_defaults():
    _, script, flags = dry("run_train_llm.sh", cwd=ROOT / "cmd")
    assert script == str(ROOT / "src/train_llm.py")
    assert flags == {"--data": str(ROOT / "data/sample_alpaca_data.jsonl"), "--cache": str(ROOT / "data/sample"),
                     "--output_dir": str(ROOT / "data/runs/sft")}
    _, _, flags = dry("run_train_llm.sh", "data/sample_alpaca_data.jsonl", "some/base", "out", 2, 32, "1e-4", 5, 256,
                      "--seed", 3, cwd=ROOT / "cmd")
    assert flags == {"--data": str(ROOT / "data/sample_alpaca_data.jsonl"), "--model_name": "some/base",
                     "--output_dir": "out", "--batch_size": "2", "--global_batch_size": "32", "--learning_rate": "1e-4",
                     "--epochs": "5", "--max_length": "256", "--seed": "3"}
    _, script, flags = dry("run_train_dpo.sh", cwd=ROOT / "cmd")
    assert script == str(ROOT / "src/train_dpo.py")
    assert flags == {"--cache": str(ROOT / "data/sample"), "--output_dir": str(ROOT / "data/runs/dpo")}
    done = shell("cmd/run_train_llm.sh 1 2 3 4 5 6 7 8 more")
    assert done.returncode == 2 and "'more' is a ninth positional; eight are known: DATA MODEL OUT" in done.stderr
    done = shell("cmd/run_train_dpo.sh a b c more")
    assert done.returncode == 2 and "'more' is a fourth positional; three are known: DATA MODEL OUT" in done.stderr
    for name in ("llm", "dpo"):
        assert f"run_train_{name}.sh DATA MODEL OUT" in shell(f"cmd/run_train_{name}.sh --help").stdout


def test_profiles_stand_for_deepspeed_and_for_four_bits_and_the_users_word_wins():
    zero2 = str(ROOT / "accelerate_configs/deepspeed_zero2.json")
    for name in ("llm", "dpo"):
        launcher = f"run_train_{name}.sh"
        for change in ({"PROFILE": "4gpu"}, {"NUM_GPUS": "4"}):
            torchrun, _, flags = dry(launcher, **change)
            assert "--nproc_per_node=4" in torchrun and flags["--trainer.deepspeed"] == zero2
        _, _, flags = dry(launcher, "--trainer.deepspeed", "mine.json", PROFILE="4gpu")
        assert flags["--trainer.deepspeed"] == "mine.json"
        torchrun, _, flags = dry(launcher, PROFILE="rtx4060")
        assert "--nproc_per_node=1" in torchrun
        settings = ROOT / f"configs/train_{name}/rtx4060.yaml"
        assert flags["--config"] == str(settings) and settings.is_file()
        assert dry(launcher, "--config", "mine.yaml", PROFILE="rtx4060")[2]["--config"] == "mine.yaml"
        torchrun, _, flags = dry(launcher, PROFILE="cpu", NUM_PROCESSES="2")
        assert "--nproc_per_node=2" in torchrun and not {"--trainer.deepspeed", "--config"} & flags.keys()
    assert "--trainer.deepspeed" not in dry("run_train_deberta.sh", PROFILE="4gpu")[2]  # plain data parallel is enough


@pytest.mark.parametrize(("change", "said"), [
    ({"PROFILE": "rtx4060"}, "PROFILE=rtx4060 with NUM_GPUS=auto asks for 1 GPU(s) but 0 are visible"),
    ({"NUM_GPUS": "2"}, "PROFILE=auto with NUM_GPUS=2 asks for 2 GPU(s) but 0 are visible")])
def test_gpus_that_are_not_there_are_one_sentence_whose_cure_is_not_what_was_given(change, said):
    done = shell("cmd/run_train_dpo.sh", **change)
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and said in done.stderr, done
    assert "use PROFILE=auto with NUM_GPUS=auto, or PROFILE=cpu" in done.stderr


@pytest.mark.parametrize(("memory", "visible", "profile"), [
    ("8188", None, "rtx4060"), ("24564", None, "auto"), ("24564\n8188", "1", "rtx4060"), ("8188\n8188", None, "4gpu"),
    ("[N/A]", None, "auto")])
def test_auto_looks_at_the_gpus_and_their_memory(tmp_path, memory, visible, profile):
    """With a driver's tool of our own, which answers as nvidia-smi does."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"""#!/bin/bash
memory=({" ".join(f"'{m}'" for m in memory.splitlines())})
case "$*" in
    -L) for m in "${{memory[@]}}"; do echo "GPU 0: a card"; done ;;
    -i*) echo "${{memory[$2]}}" ;;
    *) printf '%s\\n' "${{memory[@]}}" ;;
esac
""")
    tool.chmod(0o755)
    seen = f"export CUDA_VISIBLE_DEVICES={visible}" if visible else "unset CUDA_VISIBLE_DEVICES"
    done = shell(f'PATH="{tmp_path}:$PATH"; {seen}; DRY_RUN=1 cmd/run_train_llm.sh')
    assert ("rtx4060.yaml" in done.stdout) == (profile == "rtx4060"), done.stdout
    assert ("zero2" in done.stdout) == (profile == "4gpu")
    assert ("PROFILE=rtx4060" in done.stderr) == (profile == "rtx4060")


@pytest.mark.parametrize(("memory", "status", "said"), [
    ([8188], "OK", "rtx4060"), ([6144], "WARN", "here are 6.0 GiB"), ([24564], "OK", "one GPU"), ([], "OK", "one GPU"),
    ([8188] * 4, "OK", "4 GPUs: DeepSpeed ZeRO-2")])
def test_check_setup_names_the_profile(memory, status, said):
    found = check_setup.profile(memory)
    assert found.status == status and said in found.seen


def test_check_setup_notices_that_pip_wrote_accelerate_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(check_setup, "ROOT", tmp_path)
    own, ours, theirs = tmp_path / ".venv/bin", tmp_path / "cmd/bin", tmp_path / "theirs"
    for folder, text in ((own, "the library's"), (ours, "ours"), (theirs, "the library's")):
        folder.mkdir(parents=True)
        (folder / "accelerate").write_text(text)
        (folder / "accelerate").chmod(0o755)

    def seen(folder):
        monkeypatch.setenv("PATH", str(folder))
        found, = check_setup.accelerate()
        return found.status, found.cure

    assert seen(ours) == ("OK", "")
    status, cure = seen(own)
    assert status == "WARN" and "run cmd/setup.sh" in cure and "--config_file accelerate_configs/rtx4060.yaml" in cure
    assert "source cmd/env.sh" in seen(theirs)[1]
    (own / "accelerate").write_text(f'exec python "{ours}/accelerate" "$@"')
    assert seen(own) == ("OK", "")


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not on this machine")
    files = [*(ROOT / "cmd").glob("*.sh"), ROOT / "cmd/cluster/slurm.sbatch"]
    done = subprocess.run([tool, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- many machines ----------------------------------------------------------------------------------------------------

def cluster(folder, line, nodes=2, restart="0", **change):
    """Run slurm.sbatch under stand-ins for srun and scontrol: every machine of the job is this one."""
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text(
        f'#!/bin/bash\nif [ "$1" = show ]; then printf "localhost\\nother\\n"; else echo "$*" >> {folder}/asked; fi\n')
    (folder / "srun").write_text(f"""#!/bin/bash
echo "cores ${{SRUN_CPUS_PER_TASK:-1}} $*" > {folder}/srun_said
while [[ "$1" == --* ]]; do shift; done
worst=0; pids=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${{pids[@]}}"; do wait $pid; code=$?; (( code > worst )) && worst=$code; done
exit $worst
""")
    for name in ("scontrol", "srun"):
        (folder / name).chmod(0o755)
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = str(port - 20000 if 20000 <= port < 40000 else 40000 + port % 1000)
    there = environment(SLURM_NNODES=str(nodes), SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID=job,
                        SLURM_SUBMIT_DIR=str(ROOT), SLURM_RESTART_COUNT=restart, PROFILE="cpu", **change)
    there["PATH"] = f"{folder}:{there['PATH']}"
    done = subprocess.run([ROOT / "cmd/cluster/slurm.sbatch", *map(str, line)], env=there, capture_output=True,
                          text=True, timeout=300)
    asked = folder / "asked"
    return done, asked.read_text() if asked.exists() else "", job


def test_the_slurm_job_queues_again_only_when_time_stopped_it(tmp_path):
    now = int(time.time())
    for number, (code, left, again) in enumerate([(3, 120, True), (3, 3000, False), (2, 120, False), (0, 120, False)]):
        done, asked, job = cluster(tmp_path / str(number), ["bash", "-c", f"exit {code}"],
                                   SLURM_JOB_END_TIME=str(now + left))
        assert done.returncode == code and asked == (f"requeue {job}\n" if again else ""), done
    # All the cores of the job reach the ranks, and each machine ends by itself, with its own code.
    cluster(tmp_path / "cores", ["true"], SLURM_CPUS_PER_TASK="16")
    said = (tmp_path / "cores" / "srun_said").read_text().split()
    assert said[:2] == ["cores", "16"] and "--kill-on-bad-exit=0" in said
    done, _, _ = cluster(tmp_path / "none", [])
    assert done.returncode == 2 and done.stderr.startswith("error: name the line to run")
    text = (ROOT / "cmd/cluster/slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "cmd/cluster/slurm.sbatch"]).returncode == 0
    settings = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=1", "--signal=TERM@180", "--requeue", "--open-mode=append"} <= set(settings)


@pytest.mark.slow
def test_two_machines_meet_and_train_one_model(tmp_path):
    """Two agents over the c10d rendezvous, one rank each, from the SLURM file down to the weights."""
    import random

    draw, rows = random.Random(0), []
    for i in range(120):
        text = " ".join(draw.choices("river stone window garden paper silver market morning".split(), k=8))
        rows.append({"question": f"{text} {'hard' if i % 2 else 'plain'} case {i}", "llm_id": "m", "label": 1 - i % 2})
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = [ROOT / "cmd/run_train_deberta.sh", data, "", "tiny", 2, 8, "2e-3", 2, tmp_path / "router"]
    done, _, _ = cluster(tmp_path / "job", line)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "router/train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - .1
    manifest = json.loads((tmp_path / "router/checkpoint_epoch_2/manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["global_batch"] == 16
    assert done.stderr.count("kept the best epoch") == 1  # rank 0 of all machines alone speaks
    assert (tmp_path / "router/router.json").is_file()


def test_the_skypilot_file_launches_the_same_lines():
    task = yaml.safe_load((ROOT / "cmd/cluster/sky.yaml").read_text())
    known = {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run", "file_mounts", "config", "secrets"}
    assert {"name", "resources", "setup", "run", "workdir", "num_nodes", "envs"} <= task.keys() <= known
    assert task["resources"].keys() <= {"accelerators", "disk_size", "cloud", "use_spot", "any_of"}
    assert (ROOT / task["setup"].strip()).is_file()
    many = "--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:29500 --rdzv_id=sky-1 --nproc_per_node=1"
    for line, nodes, words in ((task["envs"]["LINE"], 2, many),
                               ("./cmd/run_train_dpo.sh --epochs '2'", 1, "--standalone --nproc_per_node=1")):
        done = shell(task["run"], LINE=line, DRY_RUN="1", SKYPILOT_NUM_NODES=str(nodes), SKYPILOT_TASK_ID="sky-1",
                     SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2")
        assert done.returncode == 0 and done.stdout.startswith(f"torchrun {words} -- "), done
    assert done.stdout.split()[-2:] == ["--epochs", "2"]
