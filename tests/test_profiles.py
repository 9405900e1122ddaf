"""Hardware profiles: they load in accelerate, DeepSpeed's files decide nothing that a script decides, and ZeRO trains
what plain data parallel trains, in the safety net, on two CPU ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import kill_training as kt
import pytest
import yaml

PROFILES = {"cpu", "rtx4060", "ddp_4gpu", "deepspeed_zero2_4gpu", "deepspeed_zero3_4gpu", "fsdp_4gpu", "multi_node"}


def test_every_profile_loads_and_its_head_is_its_launch_line(root):
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((root / "accelerate_configs").glob("*.yaml"))
    assert {f.stem for f in files} == PROFILES
    for path in files:
        config = load_config_from_file(str(path))
        assert config.num_processes == {"cpu": 1, "rtx4060": 1, "multi_node": 8}.get(path.stem, 4), path
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        line = next(line for line in head if "accelerate launch --config " in line).split()
        assert line[line.index("--config") + 1] == path.name
        script = next(word for word in line if word.startswith("src/"))
        assert (root / script).is_file(), f"{path.name} names {script}"


def test_deepspeed_files_leave_the_sizes_to_the_script_and_build_nothing(root):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (2, 3):
        file = root / "accelerate_configs" / f"deepspeed_zero{stage}.json"
        settings = json.loads(file.read_text())
        # An optimizer block would compile one at the start, for minutes.
        assert settings.keys() == {"zero_optimization", "bf16", "train_batch_size", "train_micro_batch_size_per_gpu",
                                   "gradient_accumulation_steps", "gradient_clipping"}
        assert settings.pop("bf16") == {"enabled": "auto"}
        zero = settings.pop("zero_optimization")
        assert set(settings.values()) == {"auto"}
        assert not {"offload_optimizer", "offload_param"} & zero.keys()  # they need a compiled optimizer
        # DeepSpeed's own schema: names and types of what is not left to the script.
        known = DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
        assert zero.keys() <= {field.alias or name for name, field in type(known).model_fields.items()}
        assert known.stage == stage and known.gather_16bit_weights_on_model_save == (stage == 3)
        profile = yaml.safe_load((root / "accelerate_configs" / f"deepspeed_zero{stage}_4gpu.yaml").read_text())
        assert root / profile["deepspeed_config"]["deepspeed_config_file"] == file
        assert "mixed_precision" not in profile  # accelerate refuses it beside a DeepSpeed file
        assert profile["deepspeed_config"]["zero3_init_flag"] is False


@pytest.mark.parametrize("name", sorted(PROFILES - {"cpu", "rtx4060"}))
def test_accelerate_makes_a_torchrun_job_of_every_profile(root, monkeypatch, name):
    """As far as torchrun's own door: how many ranks, over which rendezvous, and what the workers are told."""
    import torch.distributed.run as torchrun

    from routewright.torchrun import accelerate

    seen = {}
    monkeypatch.setattr(torchrun, "run", lambda args: seen.update(vars(args), **{
        key: value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_"))}))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(root)
    # accelerate reads no rdzv_backend from a profile, so the head of multi_node.yaml has it on the line.
    more = ["--rdzv_backend", "c10d"] if name == "multi_node" else []
    assert all(word in (root / "accelerate_configs" / f"{name}.yaml").read_text() for word in more)
    assert accelerate(["launch", "--config", f"{name}.yaml", *more, "--main_process_port", "29871", "src/train_llm.py",
                       "--config", "mine.yaml"]) == 0
    assert seen["training_script"] == "src/train_llm.py" and seen["training_script_args"] == ["--config", "mine.yaml"]
    assert int(seen["nproc_per_node"]) == 4
    if name == "multi_node":
        assert (seen["nnodes"], seen["rdzv_backend"], seen["rdzv_endpoint"]) == ("2", "c10d", "localhost:29871")
    if "zero" in name:
        assert seen["ACCELERATE_USE_DEEPSPEED"] == "true" and seen["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
        assert Path(seen["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).is_file()
        from accelerate.utils import DeepSpeedPlugin
        for key in [key for key in seen if key.startswith("ACCELERATE_")]:
            monkeypatch.setenv(key, str(seen[key]))
        assert DeepSpeedPlugin().zero_stage == (2 if "zero2" in name else 3)
    if "fsdp" in name:
        assert seen["FSDP_VERSION"] == "2" and seen["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


# --- ZeRO on two CPU ranks --------------------------------------------------------------------------------------------

STOP = 7


def rank_life(rank: int, ranks: int, port: int, out: Path, stop: int, arguments: dict) -> None:
    """One rank's whole life: train to the end and save, or get SIGTERM in step `stop` on rank 1 alone."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      # Nothing may be compiled: no compiler is found, and no extension built before.
                      PATH="/nowhere", TORCH_EXTENSIONS_DIR=str(out.parent / "extensions"))
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = kt.make(out, per_device_train_batch_size=2, num_train_epochs=2, save_steps=6, **arguments)
    trainer.add_callback(Stop())
    trainer.run()
    trainer.save_model(str(out / "final"))  # on every rank: under ZeRO-3 each holds a part


def life(out: Path, stop: int = 0, ranks: int = 2, **arguments) -> list[int]:
    """Forked ranks train into `out`; their exit codes."""
    import transformers.trainer  # noqa: F401 - imported once, before the fork

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            code = 1
            sys.stdout = sys.stderr = open(out.parent / f"{out.name}_{rank}.log", "a", buffering=1)  # noqa: SIM115
            os.dup2(sys.stdout.fileno(), 2)
            try:
                rank_life(rank, ranks, port, out, stop, arguments)
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                code = getattr(error, "exit_code", 1)
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def said(out: Path) -> str:
    return "".join(path.read_text() for path in sorted(out.parent.glob(f"{out.name}_*.log")))


def log(out: Path, *names: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / "train_log.jsonl").read_text().splitlines() for name in names]


@pytest.mark.slow
def test_zero_trains_as_data_parallel_does_and_resumes_to_the_same_bits(tmp_path, root):
    from transformers import BertForSequenceClassification

    from routewright import checkpoints as ck

    assert life(tmp_path / "ddp") == [0, 0], said(tmp_path / "ddp")
    plain = log(tmp_path / "ddp", "loss", "grad_norm")
    assert len(plain) == 2 * 24 and plain[-2] != plain[0]
    for stage in (2, 3):
        settings = {"deepspeed": str(root / "accelerate_configs" / f"deepspeed_zero{stage}.json")}
        whole, broken = tmp_path / f"zero{stage}", tmp_path / f"broken{stage}"
        assert life(whole, **settings) == [0, 0], said(whole)
        # The same steps as DDP's but for the order of additions: 6e-8 seen.
        assert log(whole, "loss", "grad_norm") == pytest.approx(plain, abs=1e-5)
        final, known = whole / "final", tmp_path / "ddp" / "final"
        model, like = (BertForSequenceClassification.from_pretrained(folder) for folder in (final, known))
        for (name, a), b in zip(model.state_dict().items(), like.state_dict().values(), strict=True):
            assert (a - b).abs().max() < 1e-4, name
        # Pickles are the library's resumable internals, inside checkpoints, and its copy of the arguments.
        assert {p.name for p in whole.rglob("*.bin")} <= {"training_args.bin"}
        assert not [p for p in whole.rglob("*.pt") if not p.relative_to(whole).parts[0].startswith("checkpoint-")]

        # SIGTERM to one rank: both write the checkpoint and end with 3; the same line again goes on.
        assert life(broken, stop=STOP, **settings) == [3, 3], said(broken)
        step, folder = ck.checkpoints(broken)[-1]
        assert STOP <= step <= STOP + 1
        manifest = ck.verify(folder).manifest
        parts = [name for name in manifest["files"] if "optim_states" in name]
        assert len(parts) == 2 and manifest["world_size"] == 2  # a part per rank, both sealed
        if stage == 2:  # the parts fit the same ranks in the same way alone: a sentence, not the library's traceback
            assert life(broken, ranks=1, **settings) == [2]
            assert "written by 2 ranks under DeepSpeed" in said(broken)
            assert life(broken) == [2, 2] and "trainer sharding: ZeRO-2 then, nothing now" in said(broken)
        if stage == 2:  # a torn part is noticed and the checkpoint before it taken
            with open(folder / parts[0], "r+b") as file:
                file.truncate(100)
        assert life(broken, **settings) == [0, 0], said(broken)
        assert bool(list(broken.glob("torn-checkpoint-*"))) == (stage == 2)
        assert (broken / "train_log.jsonl").read_text() == (whole / "train_log.jsonl").read_text()
        assert (broken / "final/model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
        shutil.rmtree(broken)
    assert not (tmp_path / "extensions").exists()


def test_a_bad_loss_stops_both_ranks_of_zero_before_the_update(tmp_path, root):
    out = tmp_path / "run"
    codes = life(out, data=kt.rows(poison=5), deepspeed=str(root / "accelerate_configs" / "deepspeed_zero2.json"))
    assert codes == [3, 3], said(out)
    assert "stopped before the update" in said(out)
    told = json.loads((out / "nan_batch.json").read_text())
    assert told["what"] == "loss" and 5 in [row for part in told["ranks"] for row in part["rows"]]
