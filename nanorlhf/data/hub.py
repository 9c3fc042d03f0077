"""A model's files from the Hugging Face hub, by id ("meta-llama/Llama-3.2-1B"), through huggingface_hub and its cache.

Only what is read here is fetched: config, safetensors, tokenizer files; not the second copy of Llama 3's weights under
original/. A connection that breaks is resumed; a file that is complete is never fetched again; without a network
(or with HF_HUB_OFFLINE=1) the cache answers. HF_ENDPOINT names a mirror, HF_TOKEN or `hf auth login` who asks.
"""

import errno
import hashlib
import re
import time
from pathlib import Path

from nanorlhf.data.tokenizer import FILES
from nanorlhf.errors import UserError

LLAMA = "meta-llama/Llama-3.2-1B"  # gated: Meta's licence has to be accepted once
UNGATED = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"  # a base model of that size, Apache 2.0
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M"  # ungated, Apache 2.0: what the preset smollm2 starts from
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
WANTED = ("config.json", "generation_config.json", *WEIGHTS, *FILES)
SERIOUS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # the disk's, not the network's: the script says so


def is_hub_id(name: str) -> bool:
    """Whether a --model that is no folder here can be an id of the hub: two plain words, and no path below a folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)) and not Path(name).parent.exists()


def fetch(model_id: str) -> Path:
    """The folder with the model's files, from the cache or from the hub, with progress.

    Raises UserError for a gated or unknown model, one without safetensors, and a hub that cannot be reached or breaks
    off; what was complete by then stays in the cache.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError("--model with a hub id needs huggingface_hub: pip install huggingface_hub") from error
    began = time.time()
    xet_error = getattr(errors, "XetDownloadError", OSError)  # of the hub's own transfer protocol, in newer versions
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=list(WANTED)))
    except errors.GatedRepoError:
        raise UserError(
            f"{model_id} is gated, and the hub did not accept your access: accept the licence on "
            f"https://huggingface.co/{model_id} and run `hf auth login` (in older versions `huggingface-cli login`), "
            f"or pass an ungated Llama such as --model {UNGATED}"
        ) from None
    except errors.HFValidationError as error:  # two words, but none that the hub allows: a "--", 100 letters
        raise UserError(f"model: {model_id} is not a folder here and cannot be an id of the hub: {error}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"{model_id}: neither a folder here nor a model on the hub that you may read: check the name, or run "
            "`hf auth login` if it is private"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{model_id}: not a folder here, not complete in the cache, and the hub cannot be reached: go online "
            "(unset HF_HUB_OFFLINE if it is set) and run the same command again, or pass a folder"
        ) from None
    except (errors.HTTPError, OSError, xet_error) as error:
        if getattr(error, "errno", None) in SERIOUS:
            raise
        said = str(error).strip().split("\n")[0].split(" (Request ID")[0]
        raise UserError(
            f"{model_id}: the download broke off ({type(error).__name__}: {said}): run the same command again, "
            "files that are complete are kept"
        ) from None
    _verify(folder, began)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{model_id}: holds no safetensors, expected {WEIGHTS[0]} or shards: pass a model that has them, nothing "
            "is unpickled here"
        )
    return folder


def _verify(folder: Path, since: float) -> None:
    """Check what was fetched since then against its SHA-256, which is the name of a large file in the cache (2 s for
    2.5 GB; huggingface_hub compares lengths only). Raises UserError for a file that arrived damaged, and drops it."""
    for path in folder.iterdir():
        stored = path.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", stored.name) and stored.stat().st_mtime >= since - 1:
            with open(stored, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != stored.name:
                path.unlink()
                stored.unlink()
                raise UserError(
                    f"{folder}/{path.name}: arrived damaged (SHA-256 {found[:12]}..., expected {stored.name[:12]}...) "
                    "and was dropped: run the same command again"
                )


def base_of_instruct(path: str) -> str | None:
    """The hub's id of the base model of an instruct model in its cache: the same name without the ending."""
    model_id = hub_id_of(path) or ""
    base = re.sub(r"-(instruct|chat|it)(-v[\d.]+)?(-hf)?$", r"\3", model_id, flags=re.IGNORECASE)
    return base if base != model_id else None


def hub_id_of(path: str) -> str | None:
    """The hub's id of a model whose folder lies in its cache (.../models--someone--llama/snapshots/...)."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path)
    return f"{found[1]}/{found[2]}" if found else None
