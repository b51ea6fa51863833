"""Writers that are killed at any moment, or write beside readers: all of the old or of the new, nothing left over."""

import os
import random
import signal
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from processes import START
from writers import KINDS, VERSIONS, write_in_children

KILLS = {"save_adapter": 100, "export_peft": 80, "merge_files": 60, "checkpoint": 60}
SECONDS = {"save_adapter": 0.02, "export_peft": 0.03, "merge_files": 0.15, "checkpoint": 0.06}  # until a kill, at most
READS = {"save_adapter": 600, "export_peft": 400}


class Nursery:
    """A process that forks writers."""

    def __init__(self, kind, folder):
        self.pipe, inner = START.Pipe()
        self.process = START.Process(target=write_in_children, args=(kind, folder, inner), daemon=True)
        self.process.start()
        assert self.pipe.poll(120)
        self.pipe.recv()

    @contextmanager
    def writer(self):
        self.pipe.send(True)
        child = self.pipe.recv()
        try:
            yield
        finally:
            os.kill(child, signal.SIGKILL)
            self.pipe.send(True)
            assert self.pipe.recv() == "ended"

    def close(self):
        self.process.kill()
        self.process.join()


@pytest.fixture
def nursery():
    opened = []

    def started(*arguments):
        opened.append(Nursery(*arguments))
        return opened[-1]

    yield started
    for each in opened:
        each.close()


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith(".partial")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_a_kill_loses_neither_the_old_nor_the_new_and_leaves_nothing(kind, nursery, memory):
    place, found, left = KINDS[kind](memory), Counter(), 0
    place.write(1)
    writers, draw = nursery(kind, memory), random.Random(0)
    for _ in range(KILLS[kind]):
        with writers.writer():
            time.sleep(draw.uniform(0.002, SECONDS[kind]))
        found[place.read()] += 1
        left += len(leftovers(memory))
        place.write(1)
        assert leftovers(memory) == []
        assert place.read() == 1
    print(f"\n{kind}: {KILLS[kind]} kills; found {dict(found)}; {left} leftovers, 0 after the next call")
    assert set(found) <= {*VERSIONS, *([0] if kind == "merge_files" else [])}
    assert sum(found.values()) == KILLS[kind]
    assert min(found[version] for version in VERSIONS) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", READS)
def test_a_reader_beside_two_writers_never_fails_and_finds_one_of_both_in_the_end(kind, nursery, memory):
    place = KINDS[kind](memory)
    place.write(1)
    one, other = nursery(kind, memory), nursery(kind, memory)
    with one.writer(), other.writer():
        found = Counter(place.read() for _ in range(READS[kind]))
    print(f"\n{kind}: {READS[kind]} reads beside two writers; found {dict(found)}; 0 failed")
    assert set(found) == {*VERSIONS}
    assert place.read() in VERSIONS
