"""Hardware profiles load in accelerate, which refuses any key it does not know."""

from __future__ import annotations

import pytest


def test_every_profile_loads(root):
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((root / "accelerate_configs").glob("*.yaml"))
    assert {"cpu", "rtx4060", "ddp_4gpu"} <= {f.stem for f in files}
    for path in files:
        config = load_config_from_file(str(path))
        assert config.num_processes >= 1, path


@pytest.mark.slow
def test_accelerate_launches_a_script(root):
    import subprocess
    import sys

    profile = root / "accelerate_configs" / "cpu.yaml"
    script = root / "src" / "train_deberta.py"
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", profile, script, "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "--cache" in done.stdout, done.stderr
