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


def add(first: int, second: int) -> int:
    """Add two numbers."""
    return first + second


def right(completion, answer) -> float:
    written = [m for m in completion if m["role"] == "assistant"]
    return float(answer in written[-1]["content"])


def load_environment(kind="guess"):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Guess."}], "answer": "7"}])
    rubric = vf.Rubric(funcs=[right], weights=[2.0])
    if kind == "tools":
        return vf.ToolEnv(tools=[add], dataset=rows, rubric=rubric)
    return Guess(dataset=rows, rubric=rubric, system_prompt="You guess.")
