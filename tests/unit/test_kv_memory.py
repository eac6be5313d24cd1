"""The memory of kept user KV: blocks never overlap, and all of it comes back when nobody reads it any more."""

import gc
import itertools
import queue
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.protocol.errors import ServerFaultError
from kvcast.serving.kv_memory import ALIGNMENT, Floats, KVMemory, align, bytes_of

JOIN_SECONDS = 20
SIZE = 64 * ALIGNMENT


def address_of(array: Floats) -> int:
    return int(array.__array_interface__["data"][0])


def find_start(memory: KVMemory) -> int:
    """Return where the region starts: where a block of all of it does."""
    whole = memory.allocate([(memory.size // 4,)])
    assert whole is not None, "nothing is given out yet"
    return address_of(whole[0])


@dataclass
class Given:
    """A block that was given out, as its reader sees it."""

    arrays: tuple[Floats, ...]
    start: int
    size: int
    number: int

    def write(self) -> None:
        for array in self.arrays:
            array[...] = self.number

    def check(self) -> None:
        for array in self.arrays:
            np.testing.assert_array_equal(array, self.number)


class Reader:
    """Takes and drops blocks, and knows from their addresses alone which gaps there are."""

    def __init__(self, size: int) -> None:
        self.memory = KVMemory(size)
        self.start = find_start(self.memory)
        self.given: list[Given] = []
        self.taken = 0

    def find_gaps(self) -> list[tuple[int, int]]:
        """Return start and size of every gap between the blocks that are out."""
        edges = [(self.start, 0), *sorted((each.start, each.size) for each in self.given)]
        ends = [start + size for start, size in edges]
        starts = [start for start, _ in edges[1:]] + [self.start + self.memory.size]
        assert all(start >= end for start, end in zip(starts, ends, strict=True)), "blocks overlap"
        return [(end, start - end) for start, end in zip(starts, ends, strict=True) if start > end]

    def take(self, shapes: list[tuple[int, ...]]) -> None:
        size, gaps = bytes_of(shapes), self.find_gaps()
        arrays = self.memory.allocate(shapes)
        if not size or all(size > gap for _, gap in gaps):
            assert arrays is None
            return
        assert arrays is not None, "there is a gap that is large enough"
        assert [array.shape for array in arrays] == shapes
        assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)
        filled = [array for array in arrays if array.size]
        assert not any(address_of(array) % ALIGNMENT for array in filled)
        offsets = [(address_of(array), align(array.nbytes)) for array in filled]
        assert all(one + length == two for (one, length), (two, _) in itertools.pairwise(offsets))
        self.taken += 1
        self.given.append(Given(arrays, offsets[0][0], size, self.taken))
        self.given[-1].write()

    def check(self) -> None:
        for each in self.given:
            each.check()
            place = each.start - self.start
            assert self.memory.locate(each.arrays) == (place, place + each.size)
        gaps = [(start - self.start, start - self.start + size) for start, size in self.find_gaps()]
        assert sorted(self.memory.list_free()) == gaps, "each gap once, and no two that touch"
        assert self.memory.count_free() + sum(each.size for each in self.given) == self.memory.size


def overwrite_rest(memory: KVMemory) -> list[tuple[Floats, ...]]:
    """Ask for all that is free, line by line, and write into it."""
    blocks = list(iter(lambda: memory.allocate([(ALIGNMENT // 4,)]), None))
    for block in blocks:
        block[0][...] = -1
    assert memory.count_free() == 0
    return blocks


shapes_of_a_user = st.lists(
    st.one_of(st.tuples(st.integers(0, 300)), st.tuples(st.just(1), st.integers(0, 8), st.integers(0, 20))), max_size=3
)
takes = st.tuples(st.just("take"), shapes_of_a_user)
drops = st.tuples(st.just("drop"), st.integers(0, 100))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.one_of(takes, takes, drops), max_size=60))
def test_blocks_never_overlap_and_free_and_given_out_are_always_the_whole(steps):
    reader = Reader(SIZE)
    for kind, what in steps:
        if kind == "take":
            reader.take(what)
        elif reader.given:
            reader.given.pop(what % len(reader.given))
        reader.check()
    reader.given.clear()
    # Only if all neighbours were joined is there one block of everything.
    assert find_start(reader.memory) == reader.start
    assert reader.memory.count_free() == SIZE


@pytest.mark.parametrize("seed", range(20))
def test_weeks_of_comings_and_goings_leave_one_whole_region(seed):
    """Long runs, where hypothesis makes short ones: about 30 blocks out at a time, of any length, in any order."""
    generator = np.random.default_rng(seed)
    reader = Reader(100 * SIZE)
    for _ in range(300):
        if generator.random() < 0.5 or not reader.given:
            reader.take([(1, int(generator.integers(1, 40)), 16), (int(generator.integers(0, 2000)),)])
        else:
            reader.given.pop(int(generator.integers(len(reader.given))))
        if generator.random() < 0.05:
            reader.check()
    reader.given.clear()
    assert find_start(reader.memory) == reader.start


def test_nothing_is_given_where_nothing_fits_and_nothing_is_lost_by_asking():
    memory = KVMemory(SIZE)
    assert memory.allocate([(SIZE // 4 + 1,)]) is None
    whole = memory.allocate([(SIZE // 4,)])
    assert whole is not None
    assert memory.allocate([(1,)]) is None
    assert memory.count_free() == 0
    del whole
    assert memory.count_free() == SIZE


def test_room_in_two_halves_is_not_room_for_a_whole():
    memory = KVMemory(4 * ALIGNMENT)
    blocks = [memory.allocate([(16,)]) for _ in range(4)]
    blocks[0] = blocks[2] = None
    assert memory.count_free() == 2 * ALIGNMENT
    assert memory.allocate([(32,)]) is None
    blocks[1] = None
    assert memory.allocate([(48,)]) is not None


def test_the_tightest_gap_is_taken():
    memory = KVMemory(8 * ALIGNMENT)
    wide, _wall, tight, _end = (memory.allocate([(lines * 16,)]) for lines in (3, 1, 2, 2))
    assert wide is not None
    assert tight is not None
    place = address_of(tight[0])
    del wide, tight
    again = memory.allocate([(2 * 16,)])
    assert again is not None
    assert address_of(again[0]) == place


@pytest.mark.parametrize("size", [0, 1, ALIGNMENT - 1])
def test_a_region_without_a_whole_line_gives_nothing(size):
    memory = KVMemory(size)
    assert memory.size == 0
    assert memory.count_free() == 0
    assert memory.allocate([(1,)]) is None
    assert memory.allocate([]) is None


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0, 5), (3, 0)]])
def test_a_block_of_no_bytes_is_not_given(shapes):
    memory = KVMemory(SIZE)
    assert memory.allocate(shapes) is None
    assert memory.count_free() == SIZE


def test_an_empty_array_beside_a_full_one_keeps_its_shape():
    memory = KVMemory(SIZE)
    for shapes in ([(0, 5), (3, 2)], [(3, 2), (0, 5)], [(2, 0, 2), (SIZE // 4,), (0,)]):
        arrays = memory.allocate(shapes)
        assert arrays is not None
        assert [array.shape for array in arrays] == shapes
        assert memory.count_free() == SIZE - bytes_of(shapes)
        del arrays


def test_a_size_between_lines_is_rounded_down():
    memory = KVMemory(SIZE + ALIGNMENT - 1)
    assert memory.size == SIZE
    assert memory.count_free() == SIZE


def test_more_memory_than_there_is_is_refused_in_a_sentence():
    with pytest.raises(ServerFaultError, match=r"cannot reserve .* MB of memory"):
        KVMemory(1 << 62)


@pytest.mark.parametrize(
    "derive",
    [
        lambda arrays: arrays[1],
        lambda arrays: arrays[0][0, 2:5, ::2],
        lambda arrays: arrays[0].reshape(-1)[3:].view(np.int32),
        lambda arrays: memoryview(arrays[0]),
        lambda arrays: np.asarray(memoryview(arrays[0]))[:1],
        lambda arrays: np.broadcast_to(arrays[0][:, :1], (1, 9, 8)),
        lambda arrays: np.frombuffer(arrays[0], np.uint8),
    ],
    ids=["second array", "slice", "other type", "buffer", "array of a buffer", "broadcast", "bytes"],
)
def test_any_view_however_derived_keeps_the_block(derive):
    memory = KVMemory(SIZE)
    arrays = memory.allocate([(1, 8, 8), (1, 8)])
    assert arrays is not None
    arrays[0][...] = arrays[1][...] = 7
    view = derive(arrays)
    before = bytes(view)
    del arrays
    others = overwrite_rest(memory)
    assert bytes(view) == before
    del view
    assert memory.count_free() == bytes_of([(1, 8, 8), (1, 8)])
    del others
    assert memory.count_free() == SIZE


def test_arrays_outlive_the_memory_they_came_from():
    memory = KVMemory(SIZE)
    arrays = memory.allocate([(1, 10, 10)])
    assert arrays is not None
    arrays[0][...] = 7
    del memory
    gc.collect()
    np.testing.assert_array_equal(arrays[0], 7)


def test_a_block_in_a_cycle_comes_back_when_the_cycle_is_collected():
    memory = KVMemory(SIZE)
    cycle: list[object] = [memory.allocate([(10,)])]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert memory.count_free() == SIZE


Handed = queue.SimpleQueue[tuple[int, tuple[Floats, ...]] | None]


def read_blocks(handed: Handed, wrong: list[int]) -> None:
    """Keep the last few blocks for a while; look at each once more before it is dropped."""
    kept: list[tuple[int, tuple[Floats, ...]]] = []
    while (block := handed.get()) is not None:
        kept.append(block)
        if len(kept) > 3:
            wrong += [number for number, arrays in kept[:1] for array in arrays if not (array == number).all()]
            kept.pop(0)


def test_readers_in_other_threads_may_drop_blocks_while_one_allocates():
    # 12 blocks of at most 6 lines are kept, and the 13 gaps between them cannot all be shorter than 6.
    memory = KVMemory(150 * ALIGNMENT)
    start = find_start(memory)
    handed: Handed = queue.SimpleQueue()
    wrong: list[int] = []
    readers = [threading.Thread(target=read_blocks, args=(handed, wrong), daemon=True) for _ in range(4)]
    for reader in readers:
        reader.start()
    generator = np.random.default_rng(0)
    for number in range(3000):
        shapes = [(int(generator.integers(1, 60)),), (int(generator.integers(1, 30)),)]
        deadline = time.monotonic() + JOIN_SECONDS
        while (arrays := memory.allocate(shapes)) is None:
            assert time.monotonic() < deadline, "what the readers drop does not come back"
            time.sleep(0)
        arrays[0][...] = arrays[1][...] = number
        handed.put((number, arrays))
    del arrays
    for _ in readers:
        handed.put(None)
    for reader in readers:
        reader.join(JOIN_SECONDS)
    assert not any(reader.is_alive() for reader in readers)
    assert not wrong
    assert find_start(memory) == start, "the whole region is one block again"
