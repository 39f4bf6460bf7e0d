"""A GGUF file as a Hugging Face model directory.

In: a GGUF file of an architecture that transformers reads. Out: bfloat16 safetensors, config,
tokenizer with its chat template, and a generation config with the end-of-turn token. A quantized
file is dequantized: the directory's weights are the quantized values, not the original ones.
"""

from __future__ import annotations

import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from rayhf.errors import ConfigError
from rayhf.models.source import AS_DATA


def convert_gguf(file: Path, directory: Path) -> None:
    """Write `directory`, which does not exist yet; it is complete or absent.

    Raises ConfigError where the file cannot be read, or its tokenizer is not understood.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        vocabulary = GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
        # Both print progress bars; what goes wrong is raised.
        with redirect_stderr(StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **AS_DATA)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                **AS_DATA,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{file}: cannot be read as GGUF ({error})") from None
    if tokenizer.convert_ids_to_tokens(range(len(vocabulary))) != vocabulary:
        raise ConfigError(f"{file}: transformers gives tokens other numbers than the file")
    temporary = directory.with_name(f".{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with redirect_stderr(StringIO()):
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(directory)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error.strerror or error})") from None
