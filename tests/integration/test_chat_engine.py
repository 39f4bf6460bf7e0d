"""A real engine over a thinking model: stop tokens, the split of completions, a wide embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from engines import MAX_LENGTH, WORDS, make_request, mean_gap, snapshot_of
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rayhf.config.schema import RolloutConfig, ThinkingConfig
from rayhf.errors import WeightSyncError
from rayhf.rollout.engine import RolloutEngine
from rayhf.types import Completion

TOKENS = [*WORDS, "<think>", "</think>"]
PAD, END, TURN, LETTER_C, THINK, THOUGHT = (
    TOKENS.index(token) for token in ("<pad>", "<end>", "<turn>", "c", "<think>", "</think>")
)
WIDE = len(TOKENS) + 9
"""Rows of the embedding: more than the tokenizer has tokens."""
TEMPLATE = "{% for m in messages %}{{ m.content ~ '<turn>' }}{% endfor %}"


@pytest.fixture(scope="module")
def thinker(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RolloutEngine, Qwen2ForCausalLM]]:
    """A random model, whose generation_config.json names one of its two stop tokens."""
    import torch

    directory = tmp_path_factory.mktemp("thinker")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=WIDE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.02,
        )
    ).eval()
    model.generation_config = GenerationConfig(eos_token_id=END)
    model.save_pretrained(directory)
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=["<turn>", "<pad>"],
        chat_template=TEMPLATE,
    ).save_pretrained(directory)
    engine = RolloutEngine(
        directory,
        RolloutConfig(max_num_seqs=192, kv_cache_gib=0.05, thinking=ThinkingConfig()),
        dtype="float32",
        max_length=MAX_LENGTH,
        seed=0,
        device="cpu",
        stop_token_ids=(LETTER_C,),
    )
    yield engine, model
    engine.close()


def generate(engine: RolloutEngine, *, opened: bool, **sampling: object) -> tuple[Completion, ...]:
    prompt = (5, 6, 7, THINK) if opened else (5, THINK, 7)
    request = make_request(prompt, seeds=tuple(range(96)), **sampling)
    return engine.generate([request], version=0)[0]


def plain(token_ids: Iterable[int]) -> str:
    return "".join(TOKENS[i] for i in token_ids if i < len(TOKENS) and i not in (PAD, END, TURN))


def test_stop_tokens_of_all_places_end_a_completion(
    thinker: tuple[RolloutEngine, Qwen2ForCausalLM],
) -> None:
    """generation_config.json, the chat template, and the caller (a template of the config)."""
    stops = {END, TURN, LETTER_C}
    for names, ids in ((), set()), (("<pad>", "x"), {PAD, TOKENS.index("x")}):
        completions = generate(thinker[0], opened=False, stop=names)
        ends = {c.token_ids[-1] for c in completions if len(c.token_ids) < 24}
        assert ends == stops | ids
        assert not any((stops | ids) & set(c.token_ids[:-1]) for c in completions)


@pytest.mark.parametrize("opened", [True, False])
def test_completions_are_split_on_their_tokens(
    thinker: tuple[RolloutEngine, Qwen2ForCausalLM], opened: bool
) -> None:
    engine, model = thinker
    completions = generate(engine, opened=opened, max_tokens=40)
    kinds = set()
    for c in completions:
        if THOUGHT in c.token_ids:
            kinds.add("finished")
            count = c.token_ids.tolist().index(THOUGHT) + 1
            assert (c.thinking_tokens, c.text) == (count, plain(c.token_ids[count:]))
            stopped = c.token_ids[-1] in (END, TURN, LETTER_C)
            assert c.finish_reason == ("stop" if stopped else "length")
        elif opened or THINK in c.token_ids:
            kinds.add("unfinished")
            assert (c.text, c.finish_reason) == ("", "length")
            assert c.thinking_tokens == len(c.token_ids)
        else:
            kinds.add("none")
            assert (c.text, c.thinking) == (plain(c.token_ids), None)
    assert kinds == {"finished", "unfinished"} | (set() if opened else {"none"})
    assert any(max(c.token_ids) >= len(TOKENS) for c in completions)  # tokens without a text
    prompt = (5, 6, 7, THINK) if opened else (5, THINK, 7)
    assert mean_gap(model, make_request(prompt), completions[:8]) <= 1e-4


def test_version_0_is_compared_with_the_learner(
    thinker: tuple[RolloutEngine, Qwen2ForCausalLM],
) -> None:
    engine, model = thinker
    probe = snapshot_of(model, 0).probe
    engine.verify(probe)
    other = replace(probe, logprobs=tuple(logp - 0.01 for logp in probe.logprobs))
    with pytest.raises(WeightSyncError, match=r"weights 0 do not compute .* by 0\.01 nats"):
        engine.verify(other)
