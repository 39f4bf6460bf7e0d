"""Slow file operations beside the controller's event loop."""

import asyncio
import threading

from campaigns import make_config, run_campaign

from rayhf.blocking import in_thread, release
from rayhf.run_dir.store import RunDir


def test_commits_and_exports_do_not_run_on_the_event_loop(tmp_path, monkeypatch):
    """Sealing a checkpoint reads all of it: 170 s for one of 90 GiB."""
    used = {}
    for name in ("commit", "publish_policy", "latest"):
        original = getattr(RunDir, name)

        def noted(self, *args, original=original, name=name, **kwargs):
            used[name] = threading.current_thread()
            return original(self, *args, **kwargs)

        monkeypatch.setattr(RunDir, name, noted)
    run_campaign(make_config(tmp_path, run={"iterations": 2, "checkpoint_every": 1}))
    assert set(used) == {"commit", "publish_policy", "latest"}
    assert threading.main_thread() not in used.values()


def test_cancelled_caller_waits_for_the_thread():
    begun = threading.Event()
    release = threading.Event()
    done = []

    def work():
        begun.set()
        release.wait(30)
        done.append(True)

    async def run():
        task = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(begun.wait, 30)
        for _ in range(2):  # a second signal changes nothing
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not task.done()
        release.set()
        await asyncio.wait([task])
        assert task.cancelled() and done

    asyncio.run(run())


def test_other_tasks_run_while_a_list_is_released():
    items = list(range(10_000))
    seen = []

    async def scenario():
        releasing = asyncio.create_task(release(items))
        while not releasing.done():
            seen.append(len(items))
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert not items and len(set(seen)) > 2
