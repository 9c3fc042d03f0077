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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    declared = {re.split(r"[<>=!;\[ ]", item)[0].replace("-", "_") for item in groups["run"]}
    assert imported(path) <= declared | OPTIONAL | {"nanorlhf", "kernels"} | sys.stdlib_module_names


def test_what_runs_in_trls_environment_asks_for_nothing_of_ours():
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()} | {script.stem for script in SCRIPTS}
    found = imported(ROOT / "bench" / "trl_ppo.py")
    assert "trl" in found and not found & ours


@pytest.mark.parametrize("path", SCRIPTS + PACKAGE + KERNELS, ids=name)
def test_nothing_is_pickled(path):
    assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and isinstance(node.value, ast.Name):
            assert node.value.id != "torch", f"{name(path)}:{node.lineno}: torch.{node.attr} pickles; use safetensors"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            pytest.fail(f"{name(path)}:{node.lineno}: {node.arg} belongs to a loader that pickles")


def test_models_and_kernels_import_without_triton_and_without_transformers():
    program = "import sys; sys.modules |= {'triton': None, 'transformers': None}; import kernels, nanorlhf.rollout"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_model_loads_without_torchs_compiler():
    """Its import takes longer than all the others together, and drawing numbers on the meta device asks for it."""
    program = (
        "import sys, train_ppo; from nanorlhf.run.inputs import EMBEDDED; train_ppo.load_policy(EMBEDDED / 'sft');"
        "train_ppo.critic_from(train_ppo.load_scalar(EMBEDDED / 'rm')); assert 'torch._dynamo' not in sys.modules;"
        "assert 'torch.distributed.fsdp' not in sys.modules, 'what several processes need takes 0.7 s'"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr


# The house, from the ground up. A file imports from its own floor and from those below it; files on one floor may use
# one another, but never in a circle.
LESSON = {"llama", "attention", "packing", "pairs", "models", "ensemble", "sharding"}
LESSON |= {"decoder", "rollout", "losses", "ppo", "optim"}
FLOORS = ["kernels", "errors", "parallel", "data", "lesson", "storage", "run", "evaluation", "monitoring", "tiny"]
FLOORS += ["scripts"]
ASK_THE_TINY_WORLD = {  # for its data and its truth, where they are wanted
    ("nanorlhf.run.inputs", "nanorlhf.tiny.data"),
    ("nanorlhf.evaluation.judge", "nanorlhf.tiny.gold"),
    ("nanorlhf.evaluation.judge", "nanorlhf.tiny.posts"),
    ("nanorlhf.monitoring.monitor", "nanorlhf.tiny.gold"),
}
HOUSE = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SCRIPTS + PACKAGE + KERNELS}


def floor(module: str) -> str:
    first, *rest = module.split(".")
    if first == "kernels":
        return "kernels"
    if first != "nanorlhf" or rest == ["__main__"]:
        return "scripts"
    return "lesson" if rest[0] in LESSON else rest[0]


def edges() -> set[tuple[str, str]]:
    """(importing file, imported file), imports inside functions included; types of arguments (TYPE_CHECKING) too."""
    found = set()
    for module, path in HOUSE.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            found |= {(module, name) for name in names if name in HOUSE}
    return found


def test_the_lesson_stands_alone_beside_its_folders():
    beside = {path.stem for path in (ROOT / "nanorlhf").glob("*.py")} - {"__init__", "__main__", "errors", "parallel"}
    assert beside == LESSON


def test_imports_between_folders_point_one_way():
    up = {(a, b) for a, b in edges() if FLOORS.index(floor(b)) > FLOORS.index(floor(a))}
    assert up == ASK_THE_TINY_WORLD


def test_no_file_imports_itself_in_a_circle():
    left = edges()
    while left:  # what imports nothing that is left cannot stand in a circle
        ends = {b for _, b in left} - {a for a, _ in left}
        assert ends, f"circles among {sorted({a for a, _ in left} & {b for _, b in left})}"
        left = {(a, b) for a, b in left if b not in ends}


ROOMS = [ROOT / "nanorlhf" / name for name in FLOORS if (ROOT / "nanorlhf" / name).is_dir()]


@pytest.mark.parametrize("folder", [*ROOMS, ROOT / "experiments", ROOT / "faults"], ids=name)
def test_a_folder_has_a_door_sign_and_nothing_behind_it(folder):
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 1, "one paragraph, no re-exports"
