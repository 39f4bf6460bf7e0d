"""Environments of the package `verifiers`, for tests that run them in a process."""

import verifiers as vf
from datasets import Dataset


class Guess(vf.MultiTurnEnv):
    """The number of the row is to be guessed."""

    async def env_response(self, messages, state, **kwargs):
        guess = int(messages[-1].content)
        number = int(state["answer"])
        if guess == number:
            state["final_env_response"] = [{"role": "user", "content": "Right."}]
            return state["final_env_response"]
        return [{"role": "user", "content": "Higher." if guess < number else "Lower."}]


class Ledger(vf.StatefulToolEnv):
    """A sum that calls add to; the policy does not see the argument `state`."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.add_tool(self.put, args_to_skip=["state"])

    async def setup_state(self, state):
        state["sum"] = 0
        return state

    def update_tool_args(self, tool_name, tool_args, messages, state, **kwargs):
        return {**tool_args, "state": state}

    def put(self, number: int, state: dict) -> int:
        """Add a number to the sum."""
        state["sum"] += number
        return state["sum"]


def add(first: int, second: int) -> int:
    """Add two numbers."""
    return first + second


def right(completion, answer) -> float:
    written = [m for m in completion if m["role"] == "assistant"]
    return float(answer in written[-1]["content"])


def best(completions) -> list[float]:
    longest = max(map(len, completions))
    return [float(len(each) == longest) for each in completions]


def raises(completion) -> float:
    raise KeyError("no such field")


def load_environment(kind="guess", rewards="right"):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Guess."}], "answer": "7"}])
    funcs = {"right": [right], "best": [best], "raises": [right, raises]}[rewards]
    rubric = vf.Rubric(funcs=funcs, weights=[2.0] * len(funcs))
    if kind == "tools":
        return vf.ToolEnv(tools=[add], dataset=rows, rubric=rubric)
    if kind == "ledger":
        return Ledger(dataset=rows, rubric=rubric)
    if kind == "single":
        return vf.SingleTurnEnv(dataset=rows, rubric=rubric)
    if kind == "group":
        return vf.EnvGroup([Guess(dataset=rows, rubric=rubric)], env_names=["guess"])
    return Guess(dataset=rows, rubric=rubric, system_prompt="You guess.")
