"""Who is at fault when a run of several ranks stops: judged from beats, and by threads on one store."""

import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cvx_core import CvxError, watch
from cvx_core.errors import SaidError
from cvx_core.judge import SILENT_S, TORN_S, Beat, Judge
from cvx_core.watch import Watch

NAMES = ["rank 0 (a, process 10)", "rank 1 (a, process 11)", "rank 2 (b, process 12)"]
STEP = Beat(progress=3, what="step 3", at="loop.py:9 in run", waits=True)


def judge(until, timeout_s=100.0, beat_s=1.0, **changes):
    """Return the verdict at a time. changes: {"r1": {time: beat}}; None: silent from then on."""
    result = Judge(NAMES, timeout_s)
    now = 0.0
    while now <= until:
        for rank in range(3):
            beat = STEP
            for start, other in changes.get(f"r{rank}", {}).items():
                beat = other if now >= start else beat
            if beat is not None:
                result.see(rank, replace(beat, count=int(now)), now)
        now += beat_s
    return result.verdict(until)


def test_ranks_that_get_on_are_not_at_fault():
    assert judge(50) is None


def test_a_silent_rank_is_gone():
    assert judge(10 + SILENT_S - 2, r1={10: None}) is None
    verdict = judge(10 + SILENT_S + 2, r1={10: None})
    assert verdict == f"{NAMES[1]} is gone: not heard of for {SILENT_S + 3:.0f} s, last in step 3."


def test_it_is_found_sooner_where_a_collective_has_failed():
    torn = {11: replace(STEP, status="torn")}
    assert judge(10 + TORN_S + 2, r0=torn, r1={10: None}).startswith(f"{NAMES[1]} is gone")


def test_the_limit_may_be_shorter():
    assert judge(15, timeout_s=3, r1={10: None}).startswith(f"{NAMES[1]} is gone")


def test_a_rank_that_failed_is_named_with_its_error():
    failed = {4: replace(STEP, status="failed", why="r.mp4 is damaged")}
    assert judge(5, r2=failed) == f"{NAMES[2]} failed: r.mp4 is damaged."


def test_a_rank_that_is_done_may_stand_still_but_not_be_silent_before_it_has_left():
    done, left = replace(STEP, status="done"), replace(STEP, status="left")
    still = {0: replace(STEP, progress=2, status="done")}
    assert NAMES[2] in judge(101, r2={0: replace(STEP, progress=2)})
    assert NAMES[2] not in judge(101, r2=still)
    assert judge(90, r2={4: done, 5: None}).startswith(f"{NAMES[2]} is gone")
    assert judge(90, r2={4: left, 5: None}) is None


def test_a_rank_that_has_shown_no_sign_yet_gets_the_time_that_the_recipe_gives():
    never = replace(STEP, count=0, what="")
    result = Judge(NAMES, 100.0)
    for now in (0.0, 99.0, 101.0):
        result.see(0, replace(STEP, count=int(now) + 1, what=""), now)
        result.see(1, never, now)
        verdict = result.verdict(now)
        assert verdict == (f"{NAMES[1]} is gone: not heard of for 101 s." if now > 100 else None)


def test_the_rank_that_is_behind_has_stood_still():
    behind = replace(STEP, progress=2, what="step 3 (data)", at="rows.py:7 in decode")
    verdict = judge(101, r1={0: behind})
    assert verdict == f"{NAMES[1]} has stood still for 101 s in step 3 (data), at rows.py:7 in decode."


def test_of_ranks_in_the_same_step_the_one_that_does_not_wait_has_stood_still():
    busy = replace(STEP, waits=False, at="model.py:5 in forward")
    assert judge(101, r2={0: busy}).startswith(f"{NAMES[2]} has stood still")


@pytest.mark.parametrize("what", ["step 3", ""])
def test_only_ranks_with_a_mark_can_stand_still(what):
    verdict = judge(101, r0={0: replace(STEP, what=what)}, r1={0: replace(STEP, what=what)})
    assert (verdict is None or NAMES[0] not in verdict) == (what == "")


class Ranks:
    """Three watches on one store, all heard of. left: {rank: exit code} of those that were ended.

    through: what ranks but the first see of the store.
    """

    def __init__(self, timeout_s=1.0, through=lambda store: store):
        self.left = {}
        store = torch.distributed.HashStore()
        self.watches = [
            Watch(
                through(store) if rank else store,
                rank,
                NAMES,
                timeout_s,
                leave=lambda code, rank=rank: self.left.update({rank: code}),
            )
            for rank in range(3)
        ]
        for one in self.watches:
            one.start()
        first = self.watches[0]._judge
        while not all(first.last(rank).count for rank in range(3)):
            time.sleep(0.02)

    def wait_for(self, count):
        end = time.monotonic() + 10
        while len(self.left) < count and time.monotonic() < end:
            time.sleep(0.02)


@pytest.mark.parametrize("dead", [1, 0])
def test_when_a_rank_dies_all_others_end_and_it_is_named(dead, capsys):
    ranks = Ranks()
    ranks.watches[dead]._ended.set()  # as if killed: its thread ends and says nothing
    ranks.wait_for(2)
    assert ranks.left == {rank: 1 for rank in range(3) if rank != dead}
    assert f"{NAMES[dead]} is gone: not heard of for 1 s. All ranks stop." in capsys.readouterr().err


def test_a_rank_that_stands_still_is_named(capsys):
    ranks = Ranks(timeout_s=0.5)
    stop = threading.Event()

    def work():
        while not stop.wait(0.05):
            for rank in (0, 2):
                ranks.watches[rank].mark("step 5")

    ranks.watches[1].mark("step 4")
    worker = threading.Thread(target=work)
    worker.start()
    ranks.wait_for(3)
    stop.set()
    worker.join()
    assert ranks.left == {0: 1, 1: 1, 2: 1}
    assert f"{NAMES[1]} has stood still for" in capsys.readouterr().err


def test_an_error_of_one_rank_ends_all_and_is_told(capsys):
    ranks = Ranks()
    error = ranks.watches[2].final(CvxError("row 7 is damaged. Remove it."))
    assert str(error) == "rank 2: row 7 is damaged. Remove it."
    ranks.wait_for(2)
    assert ranks.left == {0: 1, 1: 1}
    assert f"{NAMES[2]} failed: row 7 is damaged. Remove it. All ranks stop." in capsys.readouterr().err


def test_an_error_that_the_first_rank_has_too_is_said_once():
    ranks = Ranks()
    same = CvxError("the loss is nan. Lower the lr.")
    assert ranks.watches[0].final(same) is same
    assert isinstance(ranks.watches[1].final(CvxError(str(same))), SaidError)


def test_a_broken_collective_is_not_the_fault_of_those_who_see_it(capsys):
    ranks = Ranks(timeout_s=0.5)
    ranks.watches[1]._ended.set()
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    finals = [threading.Thread(target=ranks.watches[rank].final, args=(broken,)) for rank in (0, 2)]
    for final in finals:
        final.start()
    ranks.wait_for(2)
    assert ranks.left == {0: 1, 2: 1}
    assert f"{NAMES[1]} is gone" in capsys.readouterr().err
    for final in finals:
        final.join()


def ending(ranks, *which):
    """Let ranks end, each in a thread as in a process of its own; return the threads by rank."""
    threads = {rank: threading.Thread(target=ranks.watches[rank].end, daemon=True) for rank in which}
    for thread in threads.values():
        thread.start()
    return threads


def test_ranks_that_are_done_leave_the_others_alone_and_end_when_all_are():
    ranks = Ranks(timeout_s=0.5)
    threads = ending(ranks, 0, 1)
    for thread in threads.values():
        thread.join(0.5)
        assert thread.is_alive()
    assert ranks.left == {}
    for thread in {**threads, **ending(ranks, 2)}.values():
        thread.join(10)
        assert not thread.is_alive()
    assert ranks.left == {}


@pytest.mark.parametrize("dead", [1, 0])
def test_a_rank_that_dies_while_others_are_done_is_named(dead, capsys):
    ranks = Ranks()
    threads = ending(ranks, *({0, 1, 2} - {dead}))
    ranks.watches[dead]._ended.set()
    ranks.wait_for(2)
    assert ranks.left == dict.fromkeys(threads, 1)
    assert f"{NAMES[dead]} is gone" in capsys.readouterr().err
    for thread in threads.values():
        thread.join(10)


class Gate:
    """A store as another rank holds it, whose calls do not return while it is shut."""

    def __init__(self, store, opened):
        self._store, self._opened = store, opened

    def __getattr__(self, name):
        def call(*args):
            self._opened.wait()
            return getattr(self._store, name)(*args)

        return call


@pytest.fixture
def opened():
    opened = threading.Event()
    opened.set()
    yield opened
    opened.set()


def test_a_first_rank_whose_store_does_not_answer_is_named(opened, capsys):
    ranks = Ranks(through=lambda store: Gate(store, opened))
    ranks.watches[0].mark("step 7")
    while any(ranks.watches[rank]._judge.last(0).what != "step 7" for rank in (1, 2)):
        time.sleep(0.02)
    opened.clear()  # the first rank stands still whole: its threads too
    ranks.watches[0]._ended.set()
    ranks.wait_for(2)
    assert ranks.left == {1: 1, 2: 1}
    named = rf"{re.escape(NAMES[0])} is gone: not heard of for \d s, last in step 7\. All ranks stop\."
    assert len(re.findall(named, capsys.readouterr().err)) == 2


def test_a_rank_that_fails_does_not_wait_for_a_store_that_does_not_answer(opened, monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.2)
    ranks = Ranks(timeout_s=60.0, through=lambda store: Gate(store, opened))
    opened.clear()
    began = time.monotonic()
    assert str(ranks.watches[1].final(CvxError("row 7 is damaged."))) == "rank 1: row 7 is damaged."
    torn = RuntimeError("Connection closed by peer")
    assert ranks.watches[2].final(torn) is torn
    assert time.monotonic() - began < 10
    assert ranks.left == {}


def test_a_rank_that_did_not_run_itself_blames_nobody(monkeypatch):
    """Its clock jumps, as that of a process which was stopped and goes on."""
    skipped = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + skipped[0], sleep=time.sleep)
    monkeypatch.setattr(watch, "time", clock)
    ranks = Ranks(timeout_s=2.0)
    for _ in range(3):
        skipped[0] += 100
        count = ranks.watches[1]._count
        while ranks.watches[1]._count < count + 4 and not ranks.left:
            time.sleep(0.02)
    assert ranks.left == {}
    for thread in ending(ranks, 0, 1, 2).values():
        thread.join(10)
