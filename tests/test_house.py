"""The house: floors, top-level names, the README's tree, and what may not be in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

FLOORS = {
    1: {"schema", "errors"},
    2: {"textfiles", "pool", "prompts", "outcomes", "grading", "reward", "metrics", "stats", "sets", "templates",
        "decide", "importing", "charts", "report", "launch", "scoring", "calibration",
        "training_sets"},
    3: {"backends", "routers", "encoders", "checkpoints", "trainer", "tracking", "samplepool", "evaluation",
        "router_data", "tiny_deberta", "base_models", "torchrun",
        "rank_watch", "training", "language_models", "monitor", "shared_prefix", "hidden_states"},
}
MAY_IMPORT = {
    1: {"numpy"},
    2: {"numpy", "pandas", "pyarrow", "yaml", "fire", "numba", "scipy", "vl_convert", "jinja2", "rich", "datasketch",
        "math_verify", "latex2sympy2_extended"},
    3: {"torch", "transformers", "peft", "litellm", "starlette", "sklearn", "sentence_transformers", "tokenizers",
        "safetensors", "wandb", "datasets", "accelerate", "huggingface_hub", "PIL", "trl", "bitsandbytes", "deepspeed"},
}
TOP_LEVEL = {"README.md", "CHANGELOG.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", ".ci", "cmd",
             "src", "data", "configs", "accelerate_configs", "tests"}
ALLOWED_IN_ROOT_NAMESPACE = {"__init__"}


def tracked(root: Path) -> list[str]:
    """Files git tracks, or would track; the test of a tarball without git sees every file."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return sorted(line for line in set(done.stdout.splitlines()) if (root / line).exists())


def package_files(root: Path) -> list[Path]:
    return sorted((root / "src" / "routewright").rglob("*.py"))


def floor_of(name: str) -> int | None:
    return next((floor for floor, names in FLOORS.items() if name in names), None)


def imports(path: Path, top_only: bool = False) -> list[tuple[str, int]]:
    """(dotted name, line) of every import of a file; `top_only` leaves out those inside functions."""
    found = []
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if top_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node.lineno))
            if node.module == "routewright":
                found += [(f"routewright.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_every_package_file_has_a_floor(root):
    for path in package_files(root):
        name = path.relative_to(root / "src" / "routewright").parts[0].removesuffix(".py")
        assert name in ALLOWED_IN_ROOT_NAMESPACE or floor_of(name), f"{path.name} stands on no floor; add it to FLOORS"


def test_a_file_imports_from_its_own_floor_or_below(root):
    wrong = []
    for path in package_files(root):
        name = path.relative_to(root / "src" / "routewright").parts[0].removesuffix(".py")
        floor = floor_of(name)
        if floor is None:
            continue
        allowed = set().union(*(MAY_IMPORT[f] for f in range(1, floor + 1)), sys.stdlib_module_names, {"__future__"})
        for module, line in imports(path):
            head, *rest = module.split(".")
            if head == "routewright":
                target = floor_of(rest[0]) if rest else None
                if target and target > floor:
                    wrong.append(f"{path.name}:{line} (floor {floor}) imports {module} (floor {target})")
            elif head not in allowed:
                wrong.append(f"{path.name}:{line} (floor {floor}) imports {head}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_a_script(root):
    scripts = {p.stem for p in (root / "src").glob("*.py")}
    for path in [*package_files(root), *(root / "src").glob("*.py")]:
        for module, line in imports(path):
            assert module.split(".")[0] not in scripts, f"{path}:{line} imports the script {module}"


def test_importing_any_module_is_light(root):
    """No weights library at import: it is what keeps --help and error messages quick."""
    modules = []
    for path in package_files(root):
        parts = path.relative_to(root / "src").with_suffix("").parts
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    code = (f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
            "    heavy = {'torch', 'transformers', 'sklearn', 'pandas', 'pyarrow', 'numba', 'wandb', 'litellm',"
            " 'scipy', 'datasets'} & set(sys.modules)\n    assert not heavy, (name, heavy)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root,
                          env={"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr


def test_scripts_shadow_no_library(root):
    names = {p.stem for p in (root / "src").iterdir() if p.name != "__pycache__"} - {"routewright"}
    lines = (root / "requirements.txt").read_text().splitlines()
    pins = {re.split(r"[=\[;]", line)[0].strip().replace("-", "_") for line in lines}
    assert not names & (set(sys.stdlib_module_names) | pins)
    assert not (root / "cmd" / "__init__.py").exists()  # it would hide the standard library's `cmd` and break pdb


def test_top_level_is_as_promised(root):
    assert {name.split("/")[0] for name in tracked(root)} <= TOP_LEVEL


def test_readme_tree_has_every_file_and_only_those(root):
    text = (root / "README.md").read_text()
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", text, re.S)
    assert block, "README.md has no tree between <!-- tree --> and ```"
    listed, stack = set(), []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        match = re.match(r"^( *)(\S+)(\s{2,}\S.*)?$", line)
        assert match, f"README tree: cannot read {line!r}"
        depth, name = len(match[1]) // 2, match[2]
        stack = [*stack[:depth], name.rstrip("/")]
        if name.endswith("/"):
            continue
        assert match[3], f"README tree: {name} has no line that says what it is"
        listed.add("/".join(stack))
    # Folders of many like files are named once, with a star.
    stars = {entry.removesuffix("*") for entry in listed if entry.endswith("*")}
    files = {f for f in tracked(root) if not any(f.startswith(star) for star in stars)}
    listed = {entry for entry in listed if not entry.endswith("*")}
    assert not files - listed, f"not in the README tree: {sorted(files - listed)}"
    assert not listed - files, f"in the README tree but not there: {sorted(listed - files)}"


def test_repository_holds_no_secret_no_pickle_and_little_data(root):
    total = 0
    for name in tracked(root):
        path = root / name
        assert path.suffix not in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}, name
        if name.startswith("data/"):
            total += path.stat().st_size
        if path.suffix in {".py", ".sh", ".md", ".yaml", ".toml", ".txt", ".json"}:
            text = path.read_text(errors="replace")
            assert not re.search(r"\b(sk-[A-Za-z0-9]{20,}|hf_[A-Za-z]{30,})\b", text), name
    assert total < 12 * 2**20, f"data/ holds {total / 2**20:.1f} MiB; at most 12"


def test_no_unsafe_loading(root):
    """No pickle, no eval, no remote code, anywhere in the shipped source."""
    banned = re.compile(r"(?<![\w.])(pickle\.|joblib\.|eval\(|exec\()"
                        r"|allow_pickle=True|trust_remote_code=True|weights_only=False")
    for path in [*package_files(root), *(root / "src").glob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not banned.search(line.split("#")[0]), f"{path}:{number}: {line.strip()}"


def test_requirements_hold_the_promised_packages_and_nothing_forbidden(root):
    pins = {re.split(r"[=\[;]", line)[0].strip() for line in (root / "requirements.txt").read_text().splitlines()
            if line and not line.startswith("#")}
    assert {"torch", "transformers", "accelerate", "deepspeed", "datasets", "peft", "bitsandbytes", "trl", "fire",
            "wandb", "litellm"} <= pins
    assert not {"ray", "vllm", "sglang"} & {p.lower() for p in pins}
    assert "torch==2.13.0" in (root / "requirements.txt").read_text().splitlines()


def test_shell_scripts_parse_and_say_what_they_do(root):
    for path in sorted((root / "cmd").rglob("*.sh")):
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0, path
        assert path.read_text().splitlines()[1 if path.read_text().startswith("#!") else 0].startswith("#"), path
