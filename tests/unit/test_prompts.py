import pytest

from rayhf.data.prompts import deal, prompt_id, read_rows
from rayhf.errors import ConfigError
from rayhf.types import Prompt


def prompts(n):
    return [
        Prompt(
            prompt_id=f"{i:04d}", messages=({"role": "user", "content": str(i)},), token_ids=(i,)
        )
        for i in range(n)
    ]


def test_every_prompt_once_per_epoch_and_never_twice_in_a_round():
    world = prompts(10)
    rounds = [deal(world, batch=5, iteration=i, seed=3) for i in range(1, 5)]
    for first in (0, 2):
        assert sorted(p.prompt_id for r in rounds[first : first + 2] for p in r) == [
            p.prompt_id for p in world
        ]
    seen = [{p.prompt_id for p in deal(world, batch=7, iteration=i, seed=3)} for i in range(1, 40)]
    assert {len(ids) for ids in seen} == {7} and set().union(*seen) == {p.prompt_id for p in world}


def test_deal_depends_on_seed_and_iteration_only():
    world = prompts(20)
    assert deal(world, batch=4, iteration=3, seed=1) == deal(world, batch=4, iteration=3, seed=1)
    assert deal(world, batch=4, iteration=3, seed=1) != deal(world, batch=4, iteration=3, seed=2)


def test_prompt_id_depends_on_content():
    message = ({"role": "user", "content": "x"},)
    assert prompt_id(message, None) == prompt_id(message, None) != prompt_id(message, "1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "row 2: not valid JSON"),
        (b"[1]\n", "row 1: expected an object, got list"),
        (b'{"prompt": "\xff"}\n', "row 1: not valid UTF-8"),
    ],
)
def test_malformed_rows_are_named(tmp_path, content, expected):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        list(read_rows(path, key="prompts.train"))


def test_parquet_and_other_endings(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "p.parquet")
    assert [row["prompt"] for _, row in read_rows(tmp_path / "p.parquet", key="k")] == ["a", "b"]
    (tmp_path / "q.parquet").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        list(read_rows(tmp_path / "q.parquet", key="k"))
    with pytest.raises(ConfigError, match="no such file"):
        list(read_rows(tmp_path / "nothing.jsonl", key="k"))
