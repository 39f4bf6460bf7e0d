"""Every metric of a campaign: name, unit, meaning, and who writes it.

The one place for them: `rayhf list metrics` and the documentation print this table, and a test
fails for a metric that is not in it. `<...>` in a name stands for a name of the campaign's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalog."""

    name: str
    unit: str
    """Of the value; "share" is from 0 to 1, "" is a plain number."""
    meaning: str
    writer: str
    """The part of rayhf that writes it."""

    def matches(self, name: str) -> bool:
        """Return whether `name` is this metric."""
        pattern = re.sub(r"<[^>]*>", "\0", self.name)
        return re.fullmatch(re.escape(pattern).replace("\0", "[^ ]+"), name) is not None


def _rows(writer: str, *rows: tuple[str, str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(name, unit, meaning, writer) for name, unit, meaning in rows)


METRICS: tuple[Metric, ...] = (
    *_rows(
        "controller",
        ("iteration", "", "number of the iteration; 0 is before training"),
        ("<policy>/version", "", "weights that the policy's engines hold after the iteration"),
        ("time/iteration_s", "s", "whole iteration"),
        ("time/explore_s", "s", "exploration of the iteration's prompts, from start to end"),
        ("time/rollout_s", "s", "at least one generation was under way"),
        ("time/scorer_s", "s", "at least one scoring call was under way"),
        ("time/environment_s", "s", "at least one step of an environment was under way"),
        ("time/reference_s", "s", "log-probs and values of the examples"),
        (
            "time/reference_busy_s",
            "s",
            "replicas of the reference with a chunk, added up, evaluations included",
        ),
        ("time/learner_s", "s", "optimizer steps"),
        ("time/sync_s", "s", "weights to engines and reference"),
        (
            "time/engine_paused_s",
            "s",
            "longest time that an engine did not generate while it took the last weights",
        ),
        ("time/evaluate_s", "s", "evaluations"),
        ("time/population_s", "s", "writing the policy into the population of past policies"),
        ("learner/steps", "steps", "optimizer steps of the iteration"),
        (
            "reference/chunks",
            "count",
            "forward passes of the reference's replicas, evaluations included",
        ),
        (
            "reference/streamed",
            "share",
            "rows whose log-probs were requested while other prompts were still explored; where "
            "reference.stream is on",
        ),
        (
            "critic/streamed",
            "share",
            "rows whose values were requested while other prompts were still explored; where "
            "learner.stream_values is on",
        ),
        (
            "policy/drift_kl",
            "nats/response",
            "KL(initial policy || policy), never negative, on samples of the first iteration; "
            "where the reference moves",
        ),
        (
            "selection/no_signal",
            "share",
            "groups or pairs that teach nothing: all their completions score alike",
        ),
    ),
    *_rows(
        "exploration",
        ("rollout/tokens", "tokens", "generated"),
        ("rollout/context_tokens", "tokens", "read as context, once per completion"),
        (
            "rollout/refilled",
            "prompts",
            "explored in place of prompts without a signal, up to the budget of refills",
        ),
        (
            "rollout/refill_missing",
            "prompts",
            "groups with a signal that are missing to prompts.batch when the budget is used",
        ),
        ("rollout/length_mean", "tokens", "mean length of completions"),
        (
            "rollout/truncated",
            "share",
            "completions cut at rollout.max_tokens, or whose thinking did not end",
        ),
        ("rollout/thinking_tokens", "tokens", "mean length of a thinking model's thinking"),
        ("rollout/answer_tokens", "tokens", "mean length of what follows the thinking"),
        ("rollout/thinking_unfinished", "share", "completions whose thinking did not end"),
        ("environment/turns", "turns", "mean number of the policy's turns in an episode"),
        ("environment/reply_tokens", "tokens", "mean length of an environment's replies, in all"),
        ("environment/reward_mean", "score", "mean sum of an episode's rewards"),
        ("environment/ended/done", "share", "episodes that the environment ended"),
        ("environment/ended/turns", "share", "episodes ended at max_turns"),
        (
            "environment/ended/tokens",
            "share",
            "episodes with a turn that was cut, or without tokens left for another",
        ),
        ("environment/ended/reply_tokens", "share", "episodes ended at reply_tokens"),
        ("environment/ended/failed", "share", "episodes in which the environment failed"),
        (
            "environment/own/<name>",
            "",
            "mean per episode of a number of the environment's own; of type tools, tool_calls and "
            "tool_errors",
        ),
        ("staleness/max", "versions", "oldest weights that a completion was generated with"),
        (
            "staleness/token_max",
            "versions",
            "oldest weights that a token was generated with; with rollout.in_flight_updates",
        ),
        (
            "staleness/tokens/<age>",
            "share",
            "tokens by the number of versions that their weights are behind those trained now; "
            "with rollout.in_flight_updates",
        ),
        (
            "rollout/completions_mixed",
            "share",
            "completions that several versions of the weights wrote; with "
            "rollout.in_flight_updates",
        ),
        ("scorer/reward_mean", "score", "mean of the scores"),
        ("scorer/reward_std", "score", "standard deviation of the scores"),
        (
            "scorer/<name>/reward_mean",
            "score",
            "mean of one scorer's scores, where several combine",
        ),
        ("scorer/invalid", "count", "completions whose scorer responded without a score"),
        ("scorer/skipped", "count", "completions that no scorer applies to"),
        ("scorer/failed", "count", "completions whose scorer did not respond"),
        ("scorer/<name>/<part>/reward_mean", "score", "mean of a part of one scorer's scores"),
        (
            "scorer/<name>/<part>/curriculum",
            "",
            "factor on the weight of a criterion in this iteration (rubric.curriculum)",
        ),
        (
            "scorer/<name>/requests",
            "count",
            "sent by a judge to its endpoint, evaluations included",
        ),
        ("scorer/<name>/retries", "count", "of these, repeated requests"),
        ("scorer/<name>/refused", "count", "of these, refused by the endpoint"),
        ("scorer/<name>/prompt_tokens", "tokens", "read by a judge's endpoint"),
        ("scorer/<name>/completion_tokens", "tokens", "generated by a judge's endpoint"),
        ("scorer/<name>/cost", "", "of these tokens, in the currency of endpoint.price"),
        (
            "scorer/<name>/comparisons",
            "count",
            "pairs that a scorer with `comparisons` was asked about, evaluations included",
        ),
        ("scorer/<name>/pairs", "count", "compared by a judge in both orders"),
        (
            "scorer/<name>/pairs_order_dependent",
            "count",
            "of these, where the same position won in both orders",
        ),
        ("source/<name>/reward", "score", "mean score of one source, where there are several"),
        ("source/<name>/length", "tokens", "mean length of one source's completions"),
        ("source/<name>/share", "share", "prompts of the iteration that are of this source"),
        ("source/<name>/kept", "share", "the source's prompts that gave a training example"),
        (
            "scorer/pointwise",
            "share",
            "prompts compared by score differences, not by a pairwise scorer",
        ),
    ),
    *_rows(
        "learner",
        ("learner/loss", "", "mean over the iteration's optimizer steps"),
        ("learner/grad_norm", "", "global gradient norm before clipping"),
        ("learner/lr", "", "learning rate"),
        (
            "learner/tokens_fed",
            "tokens",
            "tokens of a step that are fed, with padding",
        ),
        (
            "learner/tokens_distinct",
            "tokens",
            "tokens of a step, prefixes that rows of a prompt share once",
        ),
        ("critic/loss", "", "the critic's loss"),
        ("critic/grad_norm", "", "the critic's gradient norm before clipping"),
        ("critic/lr", "", "the critic's learning rate"),
        ("critic/tokens_fed", "tokens", "learner/tokens_fed of the critic"),
        ("critic/tokens_distinct", "tokens", "learner/tokens_distinct of the critic"),
        ("critic/explained_variance", "", "1 - Var(return - value) / Var(return); 1 is perfect"),
        ("<objective>/loss", "", "loss of a further objective"),
        ("<objective>/grad_norm", "", "gradient norm of a further objective"),
        ("<objective>/lr", "", "learning rate of a further objective"),
        ("<objective>/tokens_fed", "tokens", "learner/tokens_fed of a further objective"),
        ("<objective>/tokens_distinct", "tokens", "learner/tokens_distinct of a further objective"),
        ("<objective>/steps", "steps", "optimizer steps of a further objective"),
        ("<objective>/sft/nll", "nats/token", "sft/nll of a further objective"),
        ("<objective>/sft/nll_response", "nats", "sft/nll_response of a further objective"),
        ("<objective>/policy/entropy", "nats/token", "policy/entropy of a further objective"),
        ("<objective>/rollout/<metric>", "", "rollout/<metric> of a further objective's loss"),
        ("<objective>/ppo/<metric>", "", "ppo/<metric> of a further objective"),
    ),
    *_rows(
        "weight sync without LoRA",
        (
            "sync/changed_fraction",
            "share",
            "weights with another value in the engines than after the sync before",
        ),
        (
            "sync/update_lost",
            "share",
            "of the update since the start that rounding keeps from the engines",
        ),
        ("<policy>/sync/changed_fraction", "share", "sync/changed_fraction of a further policy"),
        ("<policy>/sync/update_lost", "share", "sync/update_lost of a further policy"),
    ),
    *_rows(
        "every loss of a policy",
        (
            "rollout/mismatch_kl",
            "nats/token",
            "KL(rollout engine || learner before its first step) of the same tokens: precision "
            "and staleness",
        ),
        ("rollout/mismatch_abs_max", "nats", "largest gap of one token's log-probs"),
        (
            "reference/kl",
            "nats/response",
            "KL(policy || reference) on what is trained on; for pairs that is chosen and rejected, "
            "not fresh samples, whose KL is eval/<task>/reference_kl",
        ),
        (
            "reference/kl_k3",
            "nats/response",
            "the same by the estimator k3, never negative; single rare tokens can dominate it",
        ),
        ("policy/entropy", "nats/token", "entropy of the next-token distribution"),
    ),
    *_rows(
        "loss of a policy-gradient algorithm",
        ("ppo/surrogate", "", "loss without KL term and entropy bonus"),
        ("ppo/clip_low", "share", "tokens at the lower bound of the ratio"),
        ("ppo/clip_high", "share", "tokens at the upper bound of the ratio"),
        ("ppo/dual_clip", "share", "tokens at the bound for negative advantages"),
        ("ppo/old_kl", "nats/token", "KL(policy before the iteration || policy)"),
        ("ppo/importance_mean", "", "mean importance weight of tokens"),
        ("ppo/importance_capped", "share", "tokens whose importance weight is truncated or masked"),
        ("ppo/kl_loss", "nats", "KL term of the loss"),
    ),
    *_rows(
        "loss of distill with top_k",
        ("distill/kl", "nats/response", "KL(policy || teacher) over its top_k tokens and the rest"),
        ("distill/policy_mass", "share", "the policy's probability of the teacher's top_k tokens"),
        ("distill/teacher_mass", "share", "the teacher's probability of its top_k tokens"),
    ),
    *_rows(
        "policy-gradient algorithms",
        ("ppo/groups_uniform", "share", "prompts whose responses all have one score"),
        ("ppo/groups_dropped", "count", "prompts with too few scored responses"),
        (
            "ppo/reward_clipped",
            "share",
            "responses whose score (with a group baseline: advantage) was beyond "
            "algorithm.reward_clip",
        ),
        ("ppo/truncated_dropped", "count", "truncated responses that are not trained on"),
        ("ppo/kl_coef", "", "coefficient of the KL penalty"),
        ("ppo/entropy_coef", "", "coefficient of the adaptive entropy bonus"),
    ),
    *_rows(
        "preference losses",
        ("dpo/chosen_reward", "nats", "implicit reward of the chosen response"),
        ("dpo/rejected_reward", "nats", "implicit reward of the rejected response"),
        ("dpo/margin", "nats", "difference of the implicit rewards"),
        ("dpo/accuracy", "share", "pairs whose chosen response has the larger implicit reward"),
        ("dpo/chosen_logp", "nats/response", "log-prob of the chosen response"),
        ("dpo/rejected_logp", "nats/response", "log-prob of the rejected response"),
        ("dpo/importance_mean", "", "mean importance weight of pairs"),
        ("dpo/importance_capped", "share", "pairs whose importance weight is truncated"),
    ),
    *_rows(
        "algorithms that train on pairs",
        ("pairs/kept", "count", "pairs of the iteration's own samples"),
        ("pairs/ties", "count", "pairs dropped because their scores do not differ"),
        ("pairs/margin_mean", "score", "mean difference of the scores"),
        ("pairs/length_gap", "tokens", "mean length of chosen minus rejected"),
        ("pairs/human", "count", "pairs labeled by people"),
        ("pairs/routed", "count", "pairs left to people in this iteration (algorithm.people)"),
        ("pairs/expired", "count", "pairs that people did not judge in time: the scorer's verdict"),
        ("pairs/given", "count", "pairs from a file"),
        ("pairs/earlier", "count", "pairs of earlier iterations"),
    ),
    *_rows(
        "sppo",
        ("sppo/ties", "count", "prompts whose best and worst win rates do not differ"),
        ("sppo/dropped", "count", "prompts with fewer than two compared completions"),
        ("sppo/kept", "count", "prompts trained on"),
        ("sppo/spread_mean", "share", "mean difference of best and worst win rate"),
        ("sppo/residual_abs", "", "mean distance of log-ratio / eta from its target"),
        ("sppo/target_abs", "", "mean |P(win) - 1/2|: how much there is to win"),
    ),
    *_rows(
        "inpo",
        ("inpo/gap", "nats", "log-prob of chosen minus rejected"),
        ("inpo/accuracy", "share", "pairs whose gap is larger than the reference's"),
    ),
    *_rows(
        "mnpo",
        ("mnpo/gap", "nats", "log-prob of chosen minus rejected"),
        ("mnpo/accuracy", "share", "pairs whose gap is larger than the reference's"),
        ("mnpo/past", "count", "past policies among the opponents, besides the current one"),
    ),
    *_rows(
        "nash_md",
        ("nash_md/win_rate", "share", "mean P(a completion beats the mixture)"),
        ("nash_md/opponents", "", "mean effective number of opponents of a completion"),
    ),
    *_rows(
        "xpo",
        ("xpo/initial_chosen", "share", "pairs whose chosen completion is the initial policy's"),
        (
            "xpo/initial_logp",
            "nats/response",
            "log-prob of the initial policy's completions under the policy",
        ),
    ),
    *_rows(
        "dno",
        ("dno/too_long", "share", "prompts whose teacher's answer is too long to train on"),
    ),
    *_rows(
        "tpo",
        ("tpo/lists", "count", "trees trained on, a ranked list of branches each"),
        ("tpo/ties", "count", "trees whose branches all have one value"),
        ("tpo/branches", "", "mean length of a list"),
        (
            "tpo/accuracy",
            "share",
            "pairs of branches that the implicit reward ranks as their values",
        ),
        ("tpo/margin", "", "mean implicit reward of the better minus the worse branch of a pair"),
    ),
    *_rows(
        "hypo",
        ("hypo/dpo_loss", "", "DPO loss on the given pairs"),
        ("hypo/dpo_accuracy", "share", "given pairs whose chosen response is preferred"),
        ("hypo/online_kl", "nats/response", "KL(policy || reference) of the fresh samples"),
    ),
    *_rows(
        "supervised loss",
        ("sft/nll", "nats/token", "negative log-likelihood, mean over tokens"),
        ("sft/nll_response", "nats", "negative log-likelihood of a response, mean over responses"),
    ),
    *_rows(
        "sft",
        ("sft/tokens", "tokens", "trained on in the iteration: those of the assistant"),
    ),
    *_rows(
        "kto, online_kto",
        ("kto/kl", "nats/response", "estimate of KL(policy || reference) in the loss, at least 0"),
        ("kto/desirable", "share", "examples with a thumb up"),
        ("kto/human", "count", "thumbs of people on single completions"),
        ("kto/routed", "count", "completions left to people in this iteration (algorithm.people)"),
        ("kto/expired", "count", "those that people did not judge in time: the scorer's thumb"),
        ("kto/desirable_reward", "nats", "mean implicit reward of thumbs up"),
        ("kto/undesirable_reward", "nats", "mean implicit reward of thumbs down"),
        ("kto/margin", "nats", "difference of the two mean rewards"),
        ("kto/desirable_weight", "", "weight of thumbs up (online_kto)"),
        ("kto/undesirable_weight", "", "weight of thumbs down (online_kto)"),
    ),
    *_rows(
        "mcts_dpo",
        ("mcts/nodes", "nodes", "mean size of a tree"),
        ("mcts/depth", "steps", "mean depth of the deepest node"),
        ("mcts/no_answer", "share", "trees without a whole answer"),
        ("mcts/duplicates", "steps", "mean number of steps that were sampled more than once"),
        ("mcts/unscored", "nodes", "nodes that could not be valued"),
        ("mcts/mute_votes", "votes", "self-evaluations that say neither yes nor no"),
        ("mcts/rollouts", "completions", "completions that only valued a step"),
        ("mcts/cut_steps", "steps", "steps cut at step_tokens"),
        ("mcts/gold_steps", "steps", "steps of the reference answer in the tree"),
        ("mcts/solved", "share", "trees with a right answer"),
        ("mcts/path_correct", "share", "trees whose chosen path ends in a right answer"),
        ("mcts/unvisited_pairs", "count", "pairs left out because a step was visited too seldom"),
        ("mcts/label_smoothing", "share", "mean soft label of the pairs"),
    ),
    *_rows(
        "spar",
        ("spar/failing", "share", "answers that the refiner rejects"),
        ("spar/ties", "share", "answers with even votes"),
        ("spar/searches", "count", "searches for a refinement"),
        ("spar/refined", "share", "searches that found an accepted refinement"),
        ("spar/nodes", "nodes", "mean size of a search"),
        ("spar/malformed", "share", "refinements without the expected form"),
        ("spar/dropped", "share", "refinements whose votes stayed even"),
        (
            "spar/value_gain",
            "share",
            "mean gain of votes from the failing answer to the refinement",
        ),
        ("spar/too_long", "count", "texts too long for the refiner"),
        ("spar/judge_unparsable", "share", "judgements without a verdict"),
        ("spar/judge_accuracy", "share", "majority verdicts that agree with the scorer"),
        ("spar/identical", "count", "pairs dropped because both responses are the same"),
        ("spar/empty", "count", "pairs dropped because a response is empty"),
        ("spar/refiner_<kind>", "count", "the refiner's examples of one kind"),
        ("spar/refiner_capped", "count", "the refiner's examples above their cap"),
        ("spar/refiner_repeats", "count", "the refiner's examples dropped as repeats"),
    ),
    *_rows(
        "self_rewarding",
        ("self_rewarding/gold_mean", "score", "mean of the scorers' scores of completions"),
        ("self_rewarding/gold_missing", "count", "completions that the scorers gave no score"),
        ("self_rewarding/gold_margin", "score", "the scorers' score of chosen minus rejected"),
        ("self_rewarding/judge_unparsable", "share", "judgments without a verdict"),
        ("self_rewarding/judge_accuracy", "share", "verdicts that agree with the scorers"),
        (
            "self_rewarding/pair_accuracy",
            "share",
            "pairs of a prompt's completions that the judge orders as the scorers do, of those "
            "that both order",
        ),
        (
            "self_rewarding/pair_ties",
            "share",
            "pairs that the judge scores alike, of those that the scorers order",
        ),
        ("self_rewarding/too_long", "count", "completions too long to be judged, mean per prompt"),
    ),
    *_rows(
        "challenger_solver",
        ("tasks/valid", "share", "the challenger's texts with a valid task"),
        ("tasks/distinct", "share", "clusters of similar tasks per valid task"),
        ("tasks/rate", "share", "mean success rate of the solver on valid tasks"),
        ("tasks/reward", "", "mean reward of the challenger"),
        ("tasks/accepted", "count", "tasks that the solver is trained on"),
        ("tasks/unlabeled", "count", "tasks without a most common answer"),
        ("tasks/unscored", "count", "tasks none of whose answers could be scored"),
        ("tasks/label_accuracy", "share", "most common answers that the scorers confirm"),
        ("tasks/too_long", "count", "requests too long for a policy, mean per prompt"),
    ),
    *_rows(
        "evaluation of type scored, and prompts.heldout",
        ("eval/<task>/sampled", "score", "mean score at temperature 1"),
        (
            "eval/<task>/<source>/sampled",
            "score",
            "the same of one source, where there are more",
        ),
        ("eval/<task>/greedy", "score", "mean score of greedy decoding (temperature 0)"),
        ("eval/<task>/reward", "score", "training scorer's mean, where evaluation has its own"),
        ("eval/<task>/refined", "score", "mean score after the algorithm's test-time work"),
        (
            "eval/<task>/unscored",
            "share",
            "completions at temperature 1 without a score, left out of the means",
        ),
        ("eval/<task>/length", "tokens", "mean length at temperature 1"),
        ("eval/<task>/truncated", "share", "completions cut at rollout.max_tokens, temperature 1"),
        ("eval/<task>/thinking_tokens", "tokens", "mean length of the thinking"),
        ("eval/<task>/answer_tokens", "tokens", "mean length of what follows the thinking"),
        ("eval/<task>/thinking_unfinished", "share", "completions whose thinking did not end"),
        (
            "eval/<task>/reference_kl",
            "nats/response",
            "KL(policy || reference): how far the policy is from the reference",
        ),
    ),
    *_rows(
        "evaluations of type validation_loss and pair_accuracy",
        ("eval/<task>/nll", "nats/token", "negative log-likelihood of held-out demonstrations"),
        ("eval/<task>/pair_accuracy", "share", "held-out pairs that the implicit reward ranks"),
        ("eval/<task>/pair_margin", "nats", "mean margin of the implicit reward on them"),
    ),
    *_rows(
        "evaluation of type win_rate",
        ("eval/<task>/win_rate", "share", "answers better than the baseline's; a tie is half"),
        ("eval/<task>/win_rate_low", "share", "lower end of its 95 % interval, over prompts"),
        ("eval/<task>/win_rate_high", "share", "upper end"),
        (
            "eval/<task>/win_rate_length_controlled",
            "share",
            "win rate that answers as long as the baseline's would have, by logistic regression",
        ),
        ("eval/<task>/win_rate_length_controlled_low", "share", "lower end of its 95 % interval"),
        ("eval/<task>/win_rate_length_controlled_high", "share", "upper end"),
        ("eval/<task>/ties", "share", "comparisons without a better answer"),
        ("eval/<task>/length_gap", "characters", "mean length of answers minus the baseline's"),
    ),
    *_rows(
        "evaluation of type exploitability",
        ("<task>/exploitability", "share", "what the best answer wins beyond a draw"),
        ("<task>/exploitability_average", "share", "the same against the average of all policies"),
        ("<task>/mass", "probability", "probability of all answers of the game together"),
        ("<task>/share/<answer>", "probability", "of one answer, given that it is one of the game"),
    ),
    *_rows(
        "losses of fit-scorer",
        ("scorer/accuracy", "share", "pairs whose chosen completion is scored or judged better"),
        ("scorer/margin", "score", "mean difference of the scores of a pair"),
    ),
    *_rows(
        "critic's loss",
        ("value/loss", "", "squared error of the values, clipped"),
        ("value/clip", "share", "values at the bound of their clipping"),
        ("value/return_mean", "score", "moment for critic/explained_variance"),
        ("value/return_square", "score^2", "moment for critic/explained_variance"),
        ("value/error_mean", "score", "moment for critic/explained_variance"),
        ("value/error_square", "score^2", "moment for critic/explained_variance"),
    ),
)


def find(name: str) -> Metric | None:
    """Return the metric of that name; exact names before patterns; None where there is none."""
    exact = (metric for metric in METRICS if metric.name == name)
    pattern = (metric for metric in METRICS if metric.matches(name))
    return next(exact, None) or next(pattern, None)


def describe(name: str) -> str:
    """Return a metric's meaning as text for a table, with its unit; empty for an unknown name."""
    metric = find(name)
    if metric is None:
        return ""
    return metric.meaning if metric.unit in ("", "score") else f"{metric.meaning} ({metric.unit})"
