"""What may import what: scripts -> nanorlhf -> kernels -> torch, triton. And nothing is ever unpickled."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
PACKAGE = sorted((ROOT / "nanorlhf").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
OPTIONAL = {"anthropic", "huggingface_hub", "triton", "wandb"}  # imported where used; absent is one clear sentence


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """First parts of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: a relative import; say where it comes from"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_import_torch_and_triton_only(path):
    assert imported(path) <= {"torch", "triton", "kernels"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_the_package_imports_neither_scripts_nor_tests_nor_the_oracle(path):
    forbidden = {"transformers", "tests", "bench", "conftest", "pytest"} | {script.stem for script in SCRIPTS}
    assert not imported(path) & forbidden


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_imports_neither_another_script_nor_the_oracle(path):
    assert not imported(path) & ({"transformers", "tests", "conftest"} | {script.stem for script in SCRIPTS})


@pytest.mark.parametrize("path", SCRIPTS + PACKAGE + KERNELS, ids=name)
def test_everything_imported_is_a_declared_dependency(path):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    declared = {re.split(r"[<>=!;\[ ]", item)[0].replace("-", "_") for item in groups["run"]}
    assert imported(path) <= declared | OPTIONAL | {"nanorlhf", "kernels"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", SCRIPTS + PACKAGE + KERNELS, ids=name)
def test_nothing_is_pickled(path):
    assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and isinstance(node.value, ast.Name):
            assert node.value.id != "torch", f"{name(path)}:{node.lineno}: torch.{node.attr} pickles; use safetensors"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            pytest.fail(f"{name(path)}:{node.lineno}: {node.arg} belongs to a loader that pickles")


def test_models_and_kernels_import_without_triton_and_without_transformers():
    program = "import sys; sys.modules |= {'triton': None, 'transformers': None}; import kernels, nanorlhf.rollout"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_model_loads_without_torchs_compiler():
    """Its import takes longer than all the others together, and drawing numbers on the meta device asks for it."""
    program = (
        "import sys, train_ppo; from nanorlhf.run.inputs import EMBEDDED; train_ppo.load_policy(EMBEDDED / 'sft');"
        "train_ppo.critic_from(train_ppo.load_scalar(EMBEDDED / 'rm')); assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
