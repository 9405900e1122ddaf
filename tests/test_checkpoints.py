"""Checkpoint folders: whole or not there; every kind of damage is seen and named."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from routewright import checkpoints as ck
from routewright.errors import UserError

FILES = {"model.safetensors": b"w" * 5000, "optimizer.pt": b"o" * 9000, "scheduler.pt": b"s" * 300,
         "rng_state_0.pth": b"r" * 700, "trainer_state.json": b'{"a": 1}', "config.json": b"{}",
         "sub/extra.bin": b"x" * 10}


def write(run: Path, step: int, **facts) -> Path:
    with ck.staged_folder(run / f"checkpoint-{step}", step=step, **facts) as folder:
        (folder / "sub").mkdir()
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
    return run / f"checkpoint-{step}"


def damage(path: Path, how: str) -> None:
    if how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


def test_a_written_folder_verifies_and_leaves_nothing_beside_it(tmp_path):
    path = write(tmp_path, 4, world_size=2)
    found = ck.verify(path)
    assert found.step == 4 and found.manifest["world_size"] == 2
    assert set(found.manifest["files"]) == set(FILES)
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_a_failed_write_leaves_no_name_and_keeps_the_old_folder(tmp_path):
    path = write(tmp_path, 4, note="old")
    with pytest.raises(RuntimeError), ck.staged_folder(path, step=4, note="new") as folder:
        (folder / "model.safetensors").write_bytes(b"new")
        raise RuntimeError("the disk is full")
    assert ck.verify(path).manifest["note"] == "old" and os.listdir(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(ck, "_exchange", lambda a, b: False)
    write(tmp_path, 4, note="old")
    with ck.staged_folder(tmp_path / "checkpoint-4", step=4, note="new") as folder:
        (folder / "model.safetensors").write_bytes(b"new")
    found = ck.verify(tmp_path / "checkpoint-4")
    assert found.manifest["note"] == "new" and list(found.manifest["files"]) == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize("how", ["half", "empty", "missing"])
@pytest.mark.parametrize("name", [*FILES, ck.MANIFEST])
def test_damage_falls_back_and_names_the_file(tmp_path, name, how):
    write(tmp_path, 4)
    damage(write(tmp_path, 8) / name, how)
    said = []
    found = ck.newest_verified(tmp_path, said.append)
    assert found.step == 4
    assert len(said) == 1 and name in said[0] and "torn-checkpoint-8" in said[0]
    assert (tmp_path / "torn-checkpoint-8").is_dir() and not (tmp_path / "checkpoint-8").exists()


def test_a_hundred_random_byte_flips_are_all_seen(tmp_path):
    path, draw = write(tmp_path, 4), random.Random(1)
    for _ in range(100):
        file = path / draw.choice([*FILES, ck.MANIFEST])
        whole = file.read_bytes()
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
        with pytest.raises(ck.DamagedFolder) as seen:
            ck.verify(path)
        assert seen.value.file == file.relative_to(path).as_posix()
        file.write_bytes(whole)
    ck.verify(path)


def test_a_whole_folder_under_a_wrong_step_is_not_taken(tmp_path):
    os.rename(write(tmp_path, 4), tmp_path / "checkpoint-9")
    assert ck.newest_verified(tmp_path, lambda text: None) is None


def test_nothing_there_is_none(tmp_path):
    assert ck.newest_verified(tmp_path) is None and ck.newest_verified(tmp_path / "never") is None


def test_a_path_that_is_no_checkpoint_names_those_that_are(tmp_path):
    write(tmp_path, 4)
    with pytest.raises(UserError, match="checkpoint-4"):
        ck.resolve(tmp_path / "checkpoint-5")


def test_rotation_keeps_the_newest_the_best_and_epoch_targets(tmp_path):
    for step in (2, 4, 6, 8, 10, 12):
        write(tmp_path, step)
    ck.name_epoch(tmp_path, 1, "checkpoint-4")
    gone = ck.rotate(tmp_path, 3, protect=[tmp_path / "checkpoint-2"])
    assert gone == ["checkpoint-6", "checkpoint-8", "checkpoint-10"]
    assert ck.rotate(tmp_path, 1) == ["checkpoint-2"]
    assert [step for step, _ in ck.checkpoints(tmp_path)] == [4, 12]
    assert ck.rotate(tmp_path, None) == []


def test_rotation_spares_the_newest_whole_one_when_the_newest_is_torn(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    damage(tmp_path / "checkpoint-6/optimizer.pt", "half")
    ck.rotate(tmp_path, 1)
    assert ck.newest_verified(tmp_path, lambda text: None).step == 4


def test_epoch_names_are_relative_links_and_are_repaired(tmp_path):
    write(tmp_path, 4, epoch_ended=1)
    write(tmp_path, 8, epoch_ended=2)
    ck.name_epoch(tmp_path, 1, "checkpoint-4")
    ck.name_epoch(tmp_path, 5, "checkpoint-gone")
    ck.repair_epoch_names(tmp_path)
    assert os.readlink(tmp_path / "checkpoint_epoch_2") == "checkpoint-8"
    assert set(ck.epoch_names(tmp_path)) == {"checkpoint_epoch_1", "checkpoint_epoch_2"}
    assert ck.resolve(tmp_path / "checkpoint_epoch_1").name == "checkpoint-4"


def test_epoch_names_without_links(tmp_path, monkeypatch):
    write(tmp_path, 4)

    def no_links(*args, **kwargs):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "symlink", no_links)
    assert ck.name_epoch(tmp_path, 3, "checkpoint-4").name == "checkpoint_epoch_3.json"
    assert ck.resolve(tmp_path / "checkpoint_epoch_3") == tmp_path / "checkpoint-4"


def test_clean_removes_leftovers_and_brings_back_a_folder_between_two_names(tmp_path):
    os.rename(write(tmp_path, 4), tmp_path / ".old-checkpoint-4")
    for name in (".tmp-checkpoint-8-123", ".gone-checkpoint-2"):
        (tmp_path / name).mkdir()
    ck.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]
    ck.verify(tmp_path / "checkpoint-4")


def test_setting_aside_never_overwrites(tmp_path):
    assert [ck.set_aside(write(tmp_path, 4), "torn").name for _ in range(3)] == [
        "torn-checkpoint-4", "torn-checkpoint-4.2", "torn-checkpoint-4.3"]


def test_fingerprints_ignore_key_order_and_see_values(tmp_path):
    assert ck.fingerprint({"a": 1, "b": 2}) == ck.fingerprint({"b": 2, "a": 1}) != ck.fingerprint({"a": 1, "b": 3})
    assert ck.fingerprint(iter([1, 2])) != ck.fingerprint(iter([2, 1]))
    (tmp_path / "rows").write_bytes(b"abc")
    assert ck.fingerprint(tmp_path / "rows") == ck.fingerprint(b"abc") and len(ck.fingerprint(b"")) == 16


def test_differences_name_the_key():
    then = {"data": "aa", "config": {"lr": 0.1, "epochs": 3}}
    assert ck.differences(then, json.loads(json.dumps(then))) == []
    assert ck.differences(then, {"data": "bb", "config": {"lr": 0.1, "epochs": 4}}) == [
        "config epochs: 3 then, 4 now", "data: aa then, bb now"]


def test_two_runs_cannot_share_a_folder(tmp_path):
    lock = ck.RunLock(tmp_path)
    with pytest.raises(UserError, match=str(os.getpid())):
        ck.RunLock(tmp_path, wait=0)
    lock.release()
    ck.RunLock(tmp_path, wait=0).release()


def test_neither_module_imports_torch():
    code = "import sys, routewright.checkpoints, routewright.trainer; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
