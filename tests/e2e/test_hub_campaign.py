"""A campaign whose policy is a hub name: pinned, resumed without the hub, exported and pushed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from campaign_runs import RAYHF
from world import make_world, write_config

from tests.hub import TOKEN, hub_server

pytestmark = pytest.mark.timeout(1200)  # generous: on a shared machine a start takes minutes


def rayhf(world: Path, env: dict[str, str], *arguments: str, code: int = 0) -> str:
    """Run a command in `world`; return its output, and what it wrote to stderr."""
    done = subprocess.run(
        [RAYHF, *arguments],
        cwd=world,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_campaign_from_a_hub_name_to_a_hub_name(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with hub_server(tmp_path / "hub") as hub:
        env = hub.env(tmp_path / "home")
        commit = hub.add("model", "org/base", world / "policy")
        shutil.move(world / "policy", tmp_path / "base")
        write_config(
            world,
            "first",
            policy={"model": "org/base", "lora": {"rank": 2, "alpha": 4}},
            run={"eval_every": 0, "checkpoint_every": 1},
        )
        out = rayhf(world, env, "check", "first.yaml")
        assert f"policy.model: org/base is commit {commit[:12]} (" in out
        assert hub.sent["model.safetensors"] == 0
        rayhf(world, env, "run", "first.yaml", "run.iterations=1")
        # The branch moves, and the hub is out of reach: the run continues from its commit.
        hub.add("model", "org/base", {"config.json": "{}", "model.safetensors": b""})
        gone = env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
        rayhf(world, gone, "run", "first.yaml", "run.iterations=2")
        state = json.loads((world / "first" / "campaign.json").read_text())
        assert state["models"] == {"org/base": commit}
        assert f"org/base at {commit[:12]}" in rayhf(world, env, "status", "first")

        push = ("--push", "org/trained")
        assert "no token" in rayhf(world, env, "export", "first", "out", *push, code=2)
        reader = env | {"HF_TOKEN": "hf_reader"}
        refused = rayhf(world, reader, "export", "first", "out", *push, code=2)
        assert "does not let this token write there" in refused
        writer = env | {"HF_TOKEN": TOKEN}
        out = rayhf(world, writer, "export", "first", "out", *push, "--private")
        assert f"{hub.url}/org/trained at commit " in out
        assert "org/trained" in hub.private
        pushed = hub.files("model", "org/trained")
        weights = (world / "first" / "policy" / "model.safetensors").read_bytes()
        assert (pushed / "model.safetensors").read_bytes() == weights
        rayhf(world, writer, "export", "first", "lora", "--adapter", "--push", "org/lora")
        adapter = hub.files("model", "org/lora")
        check_adapter(adapter, base=tmp_path / "base", merged=pushed)
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "org/base"
        assert settings["revision"] == commit


def check_adapter(adapter: Path, *, base: Path, merged: Path) -> None:
    """Check that the adapter on its base model computes what the merged model does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 20)[None]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        initial = model(ids).logits
        adapted = PeftModel.from_pretrained(model, adapter)(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    assert (adapted - initial).abs().max() > 1e-5
