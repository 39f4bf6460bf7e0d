"""Reward models: tiny classifiers with random weights, and a tokenizer that no policy shares."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from rayhf.errors import ConfigError
from rayhf.scorer.build import build_scorer
from rayhf.scorer.pair_encoder import PairEncoderConfig
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.reward_model import RewardModel, RewardModelConfig
from rayhf.scorer.rule_config import RuleConfig
from rayhf.types import (
    Compared,
    Completion,
    Failed,
    Invalid,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
    float_array,
    token_array,
)

PAD, END, UNKNOWN = 256, 257, 258
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role + ': ' + m.content }}<end>{% endfor %}"
)


FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    # It reads its first token and attends to padding unless that is masked.
    "bert": (BertConfig, BertForSequenceClassification),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: ids 0-255, then <pad>, <end>, <unk>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {
        "<pad>": PAD,
        "<end>": END,
        "<unk>": UNKNOWN,
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def make_model(
    directory: Path, *, family: str = "llama", pad_token_id: int | None = PAD, labels: int = 1
) -> Path:
    torch.manual_seed(0)
    common = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "num_labels": labels, "pad_token_id": pad_token_id, "bos_token_id": None,
        "eos_token_id": END, "initializer_range": 0.3,
    }  # fmt: skip
    config_class, model_class = FAMILIES[family]
    model_class(config_class(**common)).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def load(directory: Path, **settings: Any) -> RewardModel:
    return RewardModel(RewardModelConfig(model=directory, **settings), ScorerSetup(base=Path()))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def changed(directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model directory with other values in its config.json."""

    def change(**values: object) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        config = json.loads((copy / "config.json").read_text()) | values
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return change


def request(*texts: str, question: str = "Why?", role: str = "user") -> ScoreRequest:
    # token ids of another vocabulary: a reward model that used them would fail or score nonsense
    prompt = Prompt(
        prompt_id=question, messages=({"role": role, "content": question},), token_ids=(99_999,)
    )
    completions = [
        Completion(
            prompt_id=question,
            index=index,
            seed=index,
            text=text,
            token_ids=token_array((88_888,)),
            logprobs=float_array((0.0,)),
            finish_reason="stop",
            policy_version=0,
        )
        for index, text in enumerate(texts)
    ]
    return ScoreRequest(prompt=prompt, completions=tuple(completions))


REQUESTS = [
    request("yes", "no, because the sky is blue today", "a", ""),
    request("x" * 100, "y" * 3, question="Explain at length, please."),
    request("<end>", "<pad>", "ends in <pad><pad>", "é漢😀\n\x00"),
]


def values(outcomes: list[tuple[Outcome, ...]]) -> list[float]:
    scored = [outcome for row in outcomes for outcome in row if isinstance(outcome, Scored)]
    assert len(scored) == sum(map(len, outcomes))
    return [outcome.value for outcome in scored]


def by_hand(directory: Path, requests: list[ScoreRequest]) -> list[float]:
    """Return scores of transformers, one unpadded row at a time, special tokens broken up."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    scores = []
    for each in requests:
        for completion in each.completions:
            answer = re.sub(r"<(pad|end|unk)>", r"< \1>", completion.text)
            messages = [*map(dict, each.prompt.messages), {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(float(model(input_ids=ids).logits[0, 0]))
    return scores


@pytest.mark.parametrize(
    ("family", "pad_token_id"),
    [
        ("llama", PAD),
        ("llama", None),
        ("llama", END),
        ("qwen2", PAD),
        ("qwen2", None),
        ("bert", PAD),
    ],
)
def test_padding_and_budget_do_not_change_a_score(
    tmp_path: Path, family: str, pad_token_id: int | None
) -> None:
    """Also for a model without a pad id, and one whose pad id is its end of turn."""
    directory = make_model(tmp_path / "model", family=family, pad_token_id=pad_token_id)
    wanted = by_hand(directory, REQUESTS)
    assert max(wanted) - min(wanted) > 0.1
    for token_budget in (1, 150, 400, 100_000):
        engine = load(directory, token_budget=token_budget)
        assert values(engine.score(REQUESTS)) == pytest.approx(wanted, abs=1e-5)


def test_same_requests_same_bits(directory: Path) -> None:
    engine = load(directory, token_budget=400)
    assert engine.score(REQUESTS) == engine.score(REQUESTS)
    assert engine.score([]) == []


def test_order_of_requests_does_not_matter(directory: Path) -> None:
    engine = load(directory, token_budget=400)
    forwards, backwards = engine.score(REQUESTS), engine.score(REQUESTS[::-1])
    assert values(forwards) == pytest.approx(values(backwards[::-1]), abs=1e-5)


def test_bfloat16_is_close(directory: Path) -> None:
    wanted = by_hand(directory, REQUESTS)
    assert values(load(directory, dtype="bfloat16").score(REQUESTS)) == pytest.approx(
        wanted, abs=0.5
    )


def test_too_long_is_invalid_never_truncated(directory: Path) -> None:
    [(long, short)] = load(directory, max_length=64).score([request("x" * 60, "x")])
    # "user: Why?" + <end> + "assistant: " + 60 + <end>
    assert long == Invalid(reason="too long: 83 tokens, the reward model reads 64")
    assert isinstance(short, Scored)
    [(over,)] = load(directory).score([request("x" * 1000)])
    assert over == Invalid(reason="too long: 1023 tokens, the reward model reads 256")


def test_text_that_cannot_be_encoded_does_not_affect_others(directory: Path) -> None:
    [(lone, good), (tool,)] = load(directory).score(
        [request("\ud800", "fine"), request("x", role="tool")]
    )
    assert lone == Invalid(reason="the text cannot be encoded as UTF-8: surrogates not allowed")
    assert isinstance(good, Scored)
    assert isinstance(tool, Failed)
    assert "the chat template refuses the messages" in tool.reason
    assert "no tools" in tool.reason


def test_non_finite_logit_is_invalid(directory: Path) -> None:
    engine = load(directory)
    with torch.no_grad():
        engine._classifier.model.score.weight.fill_(float("nan"))
    [outcomes] = engine.score([request("a", "b")])
    assert outcomes == (Invalid(reason="the reward model's logit is nan"),) * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, r"it has 2 outputs \(a, b\).*outputs: {a: 1.0}"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is LlamaForCausalLM"),
        ({"model_type": "no-such-model"}, "no-such-model"),
    ],
)
def test_wrong_config_is_refused(
    changed: Callable[..., Path], values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load(changed(**values))
    assert "\n" not in str(refused.value)


def test_head_without_weights_is_refused(directory: Path, tmp_path: Path) -> None:
    """A language model under a classifier's name would score with a random head."""
    config = LlamaConfig.from_pretrained(directory)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["LlamaForSequenceClassification"]
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
        load(tmp_path)


def test_tokenizer_beyond_the_embeddings_is_refused(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "copy")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "copy")
    with pytest.raises(ConfigError, match="ids up to 259, the model embeds 259"):
        load(tmp_path / "copy")


def test_max_length_beyond_the_model_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="max_length is 512, the model reads at most 256"):
        load(directory, max_length=512)


def test_model_that_reads_padding_is_refused(tmp_path: Path) -> None:
    """XLNet reads the last column, whatever stands there."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=259, d_model=32, n_layer=2, n_head=4, d_inner=64, num_labels=1, pad_token_id=PAD
    )
    XLNetForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a score changes with padding"):
        load(tmp_path)


def test_model_of_nans_is_refused(directory: Path, tmp_path: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a score is not finite"):
        load(tmp_path)


def test_model_and_rule_together(directory: Path) -> None:
    entries: list[RuleConfig | RewardModelConfig] = [
        RewardModelConfig(model=Path(directory.name), name="preference", weight=2.0),
        RuleConfig(function="rayhf.scorer.rules:final_number", weight=-1.0),
    ]
    engine = build_scorer(entries, ScorerSetup(base=directory.parent, threads=1))
    prompt = Prompt(
        prompt_id="p",
        messages=({"role": "user", "content": "2+2?"},),
        token_ids=(1,),
        reference_answer="4",
    )
    judged = ScoreRequest(prompt=prompt, completions=request("it is 4", "x" * 1000).completions)
    [(right, long)] = engine.score([judged])
    engine.close()
    assert isinstance(right, Scored)
    assert right.parts["final_number"] == 1.0
    assert right.value == pytest.approx(2.0 * right.parts["preference"] - 1.0)
    assert isinstance(long, Invalid)
    assert long.reason.startswith("preference: too long")


@pytest.mark.parametrize("family", FAMILIES)
def test_several_outputs_are_weighted_and_kept(family: str, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", family=family, labels=3)
    weights = {"LABEL_0": 0.5, "2": -2.0}
    requests = [request("short", "a longer completion")]
    [outcomes] = load(directory, outputs=weights).score(requests)
    [alone] = load(directory, outputs={"LABEL_1": 1.0}).score(requests)
    for outcome, other in zip(outcomes, alone, strict=True):
        assert isinstance(outcome, Scored) and isinstance(other, Scored)
        assert list(outcome.parts) == ["LABEL_0", "LABEL_1", "LABEL_2"]
        expected = 0.5 * outcome.parts["LABEL_0"] - 2.0 * outcome.parts["LABEL_2"]
        assert outcome.value == pytest.approx(expected, rel=1e-5)
        assert other.value == outcome.parts["LABEL_1"]
    with pytest.raises(ConfigError, match="it has no output 'LABEL_9'; did you mean LABEL_"):
        RewardModel.check(RewardModelConfig(model=directory, outputs={"LABEL_9": 1.0}), Path())


class LastToken(torch.nn.Module):
    """A head that reads the last token, with weights in a file of its own."""

    labels = ("kind", "clear")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.score = torch.nn.Linear(config.hidden_size, 2)

    def load(self, directory: Path) -> None:
        self.score.load_state_dict(load_file(directory / "head.safetensors"))

    def forward(self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        last_B = mask_BT.sum(1) - 1
        scores_BO: torch.Tensor = self.score(hidden_BTD[torch.arange(len(last_B)), last_B])
        return scores_BO


def test_a_head_of_ones_own_reads_the_body(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    head = LastToken(LlamaConfig(hidden_size=32))
    save_file(head.score.state_dict(), copy / "head.safetensors")
    path = f"{__name__}:LastToken"
    model = load(copy, head=path, outputs={"kind": 1.0, "clear": 0.25})
    [(first, second)] = model.score([request("short", "a longer completion")])
    body = LlamaForSequenceClassification.from_pretrained(copy).model.eval()
    for text, outcome in (("short", first), ("a longer completion", second)):
        ids = byte_tokenizer()(f"user: Why?<end>assistant: {text}<end>")["input_ids"]
        with torch.no_grad():
            kind, clear = head.score(body(torch.tensor([ids])).last_hidden_state[0, -1]).tolist()
        assert isinstance(outcome, Scored)
        assert outcome.parts == pytest.approx({"kind": kind, "clear": clear}, abs=1e-4)
        assert outcome.value == pytest.approx(kind + 0.25 * clear, abs=1e-4)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("nowhere:Head", "cannot be imported"),
        (f"{__name__}:Nothing", "cannot be imported"),
        ("pathlib:Path", "it has no labels, load, forward"),
        (f"{__name__}:LastToken", "head.safetensors"),
    ],
)
def test_a_head_that_cannot_work_is_refused(directory: Path, head: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(directory, head=head, outputs={"kind": 1.0})


@pytest.mark.parametrize("labels", [1, 2])
def test_a_pair_encoder_reads_both_orders(labels: int, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", family="bert", labels=labels)
    entry = PairEncoderConfig(model=directory, template="{{ prompt }}<end>{{ first }}|{{ second }}")
    scorer = build_scorer([entry], ScorerSetup(base=Path()))
    asked = request("short", "a longer completion", "x<end>y")
    [comparison] = scorer.compare([asked])
    assert isinstance(comparison, Compared)
    model = BertForSequenceClassification.from_pretrained(directory).eval()

    def wins(first: str, second: str) -> float:
        ids = byte_tokenizer()(f"Why?<end>{first}|{second}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        return float(torch.sigmoid(logits[0] if labels == 1 else logits[0] - logits[1]))

    texts = ["short", "a longer completion", "x< end>y"]  # its special token is broken up
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = (wins(texts[i], texts[j]) + 1.0 - wins(texts[j], texts[i])) / 2.0
        assert comparison.win[i, j] == pytest.approx(expected, abs=1e-4)
    [too_long] = scorer.compare([request("a" * 300, "b")])
    assert isinstance(too_long, Invalid) and "too long" in too_long.reason


def test_templates_of_a_pair_encoder_show_both_completions() -> None:
    for template, message in (("{{ first }}", "does not show second"), ("{{ a }}", "no 'a'")):
        with pytest.raises(ValidationError, match=message):
            PairEncoderConfig(model=Path("m"), template=template)
