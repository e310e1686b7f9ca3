"""The allocator simulator: PyTorch's rules on figures worked by hand, and laws under any
program."""

from __future__ import annotations

import time
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget

import micro
from slow_allocator import TIE, Full, SlowAllocator
from vramlab.allocator.allocator import Allocator, OutOfMemory, Shortage
from vramlab.allocator.blocks import Device
from vramlab.allocator.settings import Settings
from vramlab.allocator.simulate import STRIDES, simulate
from vramlab.capture.meter import Meter
from vramlab.regimes.regime import read_row
from vramlab.training.trainer import Schedule, Trainer

MIB = 1 << 20
ROWS = {
    "native": {},
    "full": {"capacity": 300 * MIB},
    "max_split": {"max_split": 24 * MIB},
    "max_split_full": {"max_split": 24 * MIB, "capacity": 250 * MIB},
    "expandable": {"expandable": True},
    "expandable_full": {"expandable": True, "capacity": 300 * MIB},
    "divisions": {"divisions": 4},
    "large": {"large": 32 * MIB},
    "collect": {"collect": 0.6, "capacity": 350 * MIB, "fraction": 0.95},
    "collect_alone": {"collect": 0.2, "capacity": 300 * MIB},
    "fraction": {"capacity": 400 * MIB, "fraction": 0.7},
    "down": {"places": "down"},
    "both": {"places": "both", "capacity": 300 * MIB},
    "reuse": {"reuse": True, "capacity": 300 * MIB},
    "expandable_fraction": {
        "expandable": True,
        "capacity": 400 * MIB,
        "fraction": 0.7,
        "collect": 0.5,
    },
    "everything": {
        "expandable": True,
        "large": 30 * MIB,
        "divisions": 2,
        "max_split": 40 * MIB,
        "capacity": 400 * MIB,
    },
}


COLLECTS = "garbage_collection_threshold:0.5,per_process_memory_fraction:0.99"


def _served(*sizes, text="", **given_):
    """An allocator that served these requests, with keys 0, 1, 2, ..."""
    allocator = Allocator(Settings.parse(text), **given_)
    for key, size in enumerate(sizes):
        allocator.malloc(key, size)
    return allocator


def _address(allocator, key):
    return allocator.address(key)


# requests and segments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (1_000_000, 1_000_448, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded up to 10 MiB, it is no longer below them
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # 2 MiB - 512 are split off
        (33_333_333, 33_554_432, 33_554_432),
    ],
)
def test_a_request_is_rounded_and_so_is_its_segment(asked, allocated, reserved):
    allocator = _served(asked)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


@pytest.mark.parametrize(
    ("asked", "allocated"),
    [(19 * MIB, 20 * MIB), (19 * MIB - 512, 19 * MIB - 512), (20 * MIB - 1, 20 * MIB)],
)
def test_a_large_block_is_split_when_more_than_one_mib_is_left(asked, allocated):
    assert _served(asked).allocated_bytes == allocated


def test_a_small_block_is_split_when_512_bytes_are_left():
    allocator = _served(MIB, MIB - 512)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB - 512, 2 * MIB)
    allocator.malloc(2, 5)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB, 2 * MIB)


def test_the_smallest_block_that_fits_is_taken_and_of_two_the_first():
    allocator = _served(*[8 * MIB, 2 * MIB, 4 * MIB, 2 * MIB, 4 * MIB])  # fills 20 MiB
    first, second = _address(allocator, 2), _address(allocator, 4)
    for key in (4, 2, 0):
        allocator.free(key)
    allocator.malloc("best", 3 * MIB)
    allocator.malloc("next", 3 * MIB)
    assert (_address(allocator, "best"), _address(allocator, "next")) == (first, second)
    assert allocator.reserved_bytes == 20 * MIB


def test_a_freed_block_merges_on_both_sides_and_never_beyond_its_segment():
    allocator = _served(
        12 * MIB, 6 * MIB, 5 * MIB, 9 * MIB
    )  # 12 fills a segment; 6, 5 and 9 fill another
    for key in (0, 1, 3, 2):
        allocator.free(key)
    assert [[block.bytes for block in segment.pieces] for segment in allocator.segments()] == [
        [12 * MIB],
        [20 * MIB],
    ]
    allocator.malloc("both", 32 * MIB)
    assert allocator.reserved_bytes == 64 * MIB


def test_streams_and_size_classes_do_not_share():
    allocator = _served(2 * MIB)
    allocator.free(0)
    allocator.malloc("other stream", 2 * MIB, stream=7)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.malloc("small", 1000)
    assert allocator.reserved_bytes == 42 * MIB
    allocator.malloc("same", 20 * MIB)
    assert allocator.reserved_bytes == 42 * MIB


def test_a_block_that_another_stream_awaits_is_active_and_is_not_used_again():
    allocator = _served(20 * MIB)
    allocator.free_requested(0)
    assert (allocator.allocated_bytes, 0 in allocator) == (0, False)
    allocator.malloc(1, 20 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (20 * MIB, 40 * MIB)
    allocator.free_completed(0)
    allocator.malloc(2, 20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free_requested(2)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, 1 in allocator) == (20 * MIB, True)
    allocator.free_completed(2)  # it came too late, and is no error


def test_empty_cache_returns_only_what_is_whole():
    allocator = _served(12 * MIB, 6 * MIB, 5 * MIB)
    allocator.free(0)
    allocator.free(1)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (20 * MIB, 5 * MIB)


# addresses ----------------------------------------------------------------------------------------


def _mib(allocator):
    """Blocks of each segment by address: (MiB, in use)."""
    return [
        [(block.bytes / MIB, block.state == "active_allocated") for block in segment.pieces]
        for segment in allocator.segments()
    ]


@pytest.mark.parametrize(
    ("used", "blocks"),
    [
        ([(0, 20)], [(20, True)]),
        (
            [(0, 8), (8, 12)],
            [(8, True), (12, True)],
        ),  # no block of 0 bytes between, before or behind them
        ([(0, 8)], [(8, True), (12, False)]),
        ([(8, 4)], [(8, False), (4, True), (8, False)]),
        ([(8, 12)], [(8, False), (12, True)]),
        ([], [(20, False)]),
    ],
)
@pytest.mark.parametrize("text", ["", "expandable_segments:True"])
def test_memory_that_was_there_before_is_cut_exactly_at_the_blocks_in_use(text, used, blocks):
    allocator, base = Allocator(Settings.parse(text)), 1 << 40
    allocator.adopt(
        0, False, [(base, 20 * MIB)], [(base + at * MIB, size * MIB, at) for at, size in used]
    )
    assert _mib(allocator) == [blocks]
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (
        20 * MIB,
        sum(size for _, size in used) * MIB,
    )
    assert allocator.pool(0, False).free == sorted(
        allocator.pool(0, False).free, key=lambda free: free[:2]
    )
    assert (
        sum(free[0] for free in allocator.pool(0, False).free)
        == 20 * MIB - allocator.allocated_bytes
    )


def test_a_new_segment_lies_where_the_trace_has_one_of_its_size_unless_that_is_taken():
    allocator, base = Allocator(), 1 << 40
    allocator.device.recorded = [(base + 2 * MIB, 40 * MIB), (base, 20 * MIB)]
    for key in range(3):
        allocator.malloc(key, 20 * MIB)
    taken = allocator.address(0)
    assert (taken, allocator.address(1), allocator.address(2)) == (
        base,
        base + 20 * MIB,
        base + 40 * MIB,
    )
    allocator.device.recorded = [(base - 30 * MIB, 30 * MIB + 2 * MIB), (base - 32 * MIB, 32 * MIB)]
    allocator.malloc(
        "below", 32 * MIB
    )  # the first would overlap, the second ends where a segment begins
    assert allocator.address("below") == base - 32 * MIB
    allocator.free(0)
    allocator.empty_cache()
    allocator.device.recorded = [(base, 20 * MIB)]
    allocator.malloc("again", 20 * MIB)
    assert allocator.address("again") == base


@pytest.mark.parametrize(("stride", "peak_mib"), [(1, 50), (-1, 30), (3, 50), ((1 << 20) - 1, 30)])
def test_the_lower_of_two_equally_large_blocks_is_taken(stride, peak_mib):
    """Below the other, the half of the large segment is taken, which then is not whole when all of
    it is needed."""
    found = simulate(TIE, stride=stride)
    assert (found.peak_reserved_bytes, found.peak_allocated_bytes) == (peak_mib * MIB, 30 * MIB)


@pytest.mark.parametrize("stride", STRIDES)
def test_an_order_of_addresses_has_a_slot_for_every_segment(stride):
    device = Device()
    device.stride = stride
    placed = [device.place(20 * MIB) for _ in range(1000)]
    assert (
        len(set(placed)) == 1000
        and min(placed) >= 1 << 45
        and all(address % (1 << 45) == 0 for address in placed)
    )
    assert placed != sorted(placed) and stride % 2 == 1
    ups = sum(one < other for one, other in pairwise(placed))
    assert ups == 0 if stride == -1 else 200 < ups < 800


# a full device ------------------------------------------------------------------------------------


def test_a_full_device_flushes_and_tries_once_more():
    allocator = _served(60 * MIB, capacity_bytes=100 * MIB)
    allocator.free(0)
    allocator.malloc(1, 80 * MIB)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (80 * MIB, 1)


def test_out_of_memory_says_what_was_asked_and_what_was_left():
    allocator = _served(30 * MIB, 50 * MIB, 4 * MIB, capacity_bytes=101 * MIB)  # the last in 20 MiB
    with pytest.raises(
        OutOfMemory,
        match="asked for 20000000 bytes, a segment of 20971520: the device has 1048576 left",
    ) as error:
        allocator.malloc("too much", 20_000_000)
    assert error.value.shortage == Shortage(
        20_000_000, 20 * MIB, MIB, 84 * MIB, 100 * MIB, 16 * MIB
    )
    assert allocator.num_alloc_retries == 1
    allocator.malloc("fits", 16 * MIB)
    assert allocator.allocated_bytes == 100 * MIB


def test_blocks_beyond_max_split_size_are_neither_split_nor_given_to_small_requests():
    allocator = _served(40 * MIB, text="max_split_size_mb:32")
    allocator.free(0)
    allocator.malloc("below", 31 * MIB)
    assert allocator.reserved_bytes == 72 * MIB  # 31 MiB take 32
    allocator.malloc("beyond", 33 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (72 * MIB, 72 * MIB)


@pytest.mark.parametrize(("cached_mib", "reserved_mib"), [(52, 52), (54, 88)])
def test_an_oversize_block_may_be_at_most_20_mib_too_large(cached_mib, reserved_mib):
    allocator = _served(cached_mib * MIB, text="max_split_size_mb:32")
    allocator.free(0)
    allocator.malloc("beyond", 34 * MIB)
    assert allocator.reserved_bytes == reserved_mib * MIB


def test_a_request_of_just_max_split_size_takes_a_block_whole():
    allocator = _served(34 * MIB, text="max_split_size_mb:32")
    allocator.free(0)
    allocator.malloc("just", 32 * MIB)
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (34 * MIB, 34 * MIB)


def test_a_full_device_returns_one_oversize_block_that_is_enough_before_all():
    allocator = _served(
        100 * MIB,
        40 * MIB,
        60 * MIB,
        20 * MIB,
        text="max_split_size_mb:32",
        capacity_bytes=230 * MIB,
    )
    for key in range(4):
        allocator.free(key)
    allocator.malloc("beyond", 35 * MIB)  # fits in 40
    allocator.malloc("again", 36 * MIB)  # 60 is too large to give, and the smallest that makes room
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (196 * MIB, 0)


def test_a_full_device_returns_the_largest_oversize_blocks_when_none_is_enough():
    allocator = _served(
        34 * MIB,
        40 * MIB,
        60 * MIB,
        20 * MIB,
        text="max_split_size_mb:32",
        capacity_bytes=154 * MIB,
    )
    for key in range(4):
        allocator.free(key)
    allocator.malloc("beyond", 90 * MIB)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (
        144 * MIB,
        0,
    )  # 60 and 40 went, 34 and 20 stayed


def test_garbage_collection_returns_what_waited_longest():
    allocator = _served(40 * MIB, 30 * MIB, text=COLLECTS, capacity_bytes=190 * MIB)
    allocator.free(0)
    for key in ("a", "b", "c"):  # three searches later
        allocator.malloc(key, 25 * MIB, stream=1)
        allocator.free(key)
    allocator.free(1)
    assert allocator.reserved_bytes == 96 * MIB
    allocator.malloc("more", 50 * MIB)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (
        106 * MIB,
        0,
    )  # 40 went; 30 and 26 are younger


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage_collection_threshold:0.5",
        "garbage_collection_threshold:0.5,per_process_memory_fraction:1.0",
    ],
)
def test_without_a_fraction_below_one_nothing_is_collected(text):
    allocator = _served(40 * MIB, 30 * MIB, text=text, capacity_bytes=190 * MIB)
    allocator.free(0)
    allocator.malloc("more", 50 * MIB)
    assert allocator.reserved_bytes == 120 * MIB


@pytest.mark.parametrize("fits", [True, False])
def test_a_fraction_is_of_the_whole_device_and_refuses_before_the_driver(fits):
    allocator = _served(
        40 * MIB,
        text="per_process_memory_fraction:0.5",
        capacity_bytes=190 * MIB,
        device_bytes=200 * MIB,
    )
    if fits:
        allocator.malloc("all", 60 * MIB)
        return
    with pytest.raises(OutOfMemory):
        allocator.malloc("more", 60 * MIB + 1)
    allocator.free(0)
    allocator.malloc("after flushing", 90 * MIB)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (90 * MIB, 2)


def test_collection_can_lose_a_step_that_fits_without_it():
    """The small cached block went, so the small request cuts the large one, and the next large
    request finds none whole."""
    events = [
        ("alloc", 1, 100 * MIB, 0),
        ("alloc", 2, 16 * MIB, 0),
        ("free", 2, 0, 0),
        ("alloc", 3, 40 * MIB, 0),
        ("free", 3, 0, 0),
        ("alloc", 4, 16 * MIB, 0),
        ("alloc", 5, 40 * MIB, 0),
    ]
    usual, collected = (
        simulate(events, Settings.parse(text), 165 * MIB) for text in ("", COLLECTS)
    )
    assert usual.oom is None and usual.num_alloc_retries == 0 and collected.oom is not None


# expandable segments ------------------------------------------------------------------------------


def test_expandable_segments_grow_by_pages_and_leave_no_slivers():
    allocator = _served(12 * MIB, 12 * MIB, 1000, text="expandable_segments:True")
    assert allocator.reserved_bytes == 42 * MIB  # two pages of 20, one of 2
    allocator.free(0)
    allocator.free(1)
    allocator.malloc("whole", 41 * MIB)
    assert allocator.reserved_bytes == 62 * MIB


def test_expandable_segments_return_whole_pages_and_fill_the_lowest_gap():
    allocator = _served(
        30 * MIB, 30 * MIB, 15 * MIB, text="expandable_segments:True"
    )  # 75 of 80 MiB
    low = _address(allocator, 0)
    allocator.free(0)
    allocator.empty_cache()
    assert (
        allocator.reserved_bytes == 60 * MIB
    )  # the first page; the second still holds a part of the second block
    assert [segment.bytes for segment in allocator.segments()] == [60 * MIB]
    allocator.malloc("gap", 25 * MIB)
    assert (_address(allocator, "gap"), allocator.reserved_bytes) == (low, 80 * MIB)
    for key in ("gap", 1, 2):
        allocator.free(key)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, [])


def test_an_expandable_segment_has_addresses_for_nine_eighths_of_the_device():
    allocator = _served(
        *[20 * MIB] * 5, text="expandable_segments:True", capacity_bytes=100 * MIB
    )  # six pages of addresses
    allocator.free(1)
    allocator.free(3)
    allocator.empty_cache()
    allocator.malloc("two pages", 40 * MIB)  # free: pages 1, 3 and 5, nowhere two together
    assert [segment.bytes for segment in allocator.segments()] == [
        20 * MIB,
        20 * MIB,
        20 * MIB,
        40 * MIB,
    ]


# settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked", "rounded"),
    [
        ("roundup_power2_divisions:4", 1_200 * 1024, 1_280 * 1024),
        ("roundup_power2_divisions:4", 1_280 * 1024, 1_280 * 1024),
        ("roundup_power2_divisions:4", 2 * MIB, 2 * MIB),
        ("roundup_power2_divisions:4", 2048, 2048),  # up to 512 a division: the usual rounding
        ("roundup_power2_divisions:4", 2049, 2560),
        ("roundup_power2_divisions:1", 1_200_000, 1_200_128),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 255 * MIB, 255 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 513 * MIB, 768 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 1025 * MIB, 1280 * MIB),
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", 2049 * MIB, 2304 * MIB),
        ("roundup_power2_divisions:[>:2]", 3 * MIB + 1, 4 * MIB),
        ("roundup_power2_divisions:[>:2]", MIB + 1, MIB + 512),
        ("roundup_power2_divisions:[2:4]", 700_000, 786_432),
    ],
)
def test_requests_are_rounded_to_divisions_of_powers_of_two(text, asked, rounded):
    assert Settings.parse(text).round_bytes(asked) == rounded


def test_settings_are_read_and_labelled():
    settings = Settings.parse(
        " expandable_segments : True,"
        " max_split_size_mb:128,backend:native,pinned_num_register_threads:8"
    )
    assert settings == Settings(expandable_segments=True, max_split_size_mb=128)
    assert settings.label() == "not verified on a GPU: expandable_segments, max_split_size_mb"
    assert (Settings().label(), Settings.parse("expandable_segments:False").label()) == (
        "verified",
        "verified",
    )
    assert Settings.parse("large_segment_size_mb:40").segment_bytes(2 * MIB) == 40 * MIB


def test_limits_by_hand():
    both = Settings(per_process_memory_fraction=0.5, garbage_collection_threshold=0.8)
    half, collecting, usual = (
        Settings(per_process_memory_fraction=0.5),
        Settings(garbage_collection_threshold=0.8),
        Settings(),
    )
    assert [each.allowed_bytes(1001) for each in (both, half, collecting, usual)] == [
        500,
        500,
        None,
        None,
    ]
    assert [each.collects_above_bytes(1001) for each in (both, half, collecting, usual)] == [
        400,
        None,
        None,
        None,
    ]
    assert both.allowed_bytes(None) is both.collects_above_bytes(None) is None
    assert [each.usable_bytes(900, 1001) for each in (half, usual)] == [
        500,
        900,
    ] and half.usable_bytes(400, 1001) == 400
    assert [each.endless_up_to_bytes(900, 1001) for each in (both, half, collecting, usual)] == [
        400,
        500,
        900,
        900,
    ]
    assert both.endless_up_to_bytes(300, 1001) == 300


def test_splits_and_segments_by_hand():
    usual, limited = Settings(), Settings(max_split_size_mb=24, max_non_split_rounding_mb=25)
    assert (usual.max_split_bytes, limited.max_split_bytes) == (float("inf"), 24 * MIB)
    assert (usual.non_split_rounding_bytes, limited.non_split_rounding_bytes) == (
        20 * MIB,
        25 * MIB,
    )
    sizes = (MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 10 * MIB + 1)
    assert [usual.segment_bytes(size) // MIB for size in sizes] == [2, 20, 20, 10, 12]
    assert [
        limited.least_rest_bytes(size) for size in (MIB, MIB + 512, 24 * MIB - 512, 24 * MIB)
    ] == [512, MIB + 1, MIB + 1, float("inf")]
    assert Settings(expandable_segments=True).least_rest_bytes(24 * MIB) == 512
    last = Settings(roundup_power2_divisions=(0,) * 15 + (2,))
    assert [last.round_bytes(size << 30) >> 30 for size in (31, 33, 65)] == [
        31,
        48,
        96,
    ], "the last interval has no end"


SETTINGS = {
    "": True,
    "max_split_size_mb:20": True,
    "max_split_size_mb:19": False,
    "max_split_size_mb:128,": True,
    "large_segment_size_mb:10": False,
    "large_segment_size_mb:11": True,
    "max_split_size_mb:abc": False,
    "max_split_size_mb:30,large_segment_size_mb:40": False,
    "max_non_split_rounding_mb:5": False,
    "max_non_split_rounding_mb:25": True,
    "garbage_collection_threshold:1.0": False,
    "garbage_collection_threshold:0.0": False,
    "garbage_collection_threshold:0.8": True,
    "per_process_memory_fraction:0.5": True,
    "per_process_memory_fraction:1.0": True,
    "per_process_memory_fraction:0.0": True,
    "roundup_power2_divisions:3": False,
    "roundup_power2_divisions:0": False,
    "roundup_power2_divisions:[256:0]": True,
    "roundup_power2_divisions:[256:3]": False,
    "roundup_power2_divisions:[257:1]": False,
    "roundup_power2_divisions:[]": True,
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]": True,
    "expandable_segments:true": False,
    "expandable_segments:True": True,
    "expandable_segments": False,
    "max_split_size_mb:128 expandable_segments:True": False,
    " max_split_size_mb : 128": True,
}


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_are_accepted_where_pytorch_accepts_them(text):
    theirs = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    for parse in (Settings.parse, theirs) if theirs else (Settings.parse,):
        if SETTINGS[text]:
            parse(text)
        else:
            with pytest.raises((ValueError, RuntimeError)):
                parse(text)
    if theirs:
        theirs("large_segment_size_mb:20")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "max_split:128",
            (
                "max_split:128 is not simulated; those that are: expandable_segments,"
                " max_split_size_mb"
            ),
        ),
        ("backend:cudaMallocAsync", "backend:cudaMallocAsync is not simulated"),
        ("max_split_size_mb=128", "'max_split_size_mb=128' is not name:value"),
        ("max_split_size_mb:-1", "max_split_size_mb is '-1': it must be a whole number"),
        ("per_process_memory_fraction:1.1", "is 1.1: it must be 0 to 1"),
        (
            "large_segment_size_mb:5,max_split_size_mb:2",
            "is 5: it must be above 10; max_split_size_mb is 2: it must be at least",
        ),
    ],
)
def test_wrong_settings_say_what_is_wrong(text, says):
    with pytest.raises(ValueError, match=says):
        Settings.parse(text)


# events -------------------------------------------------------------------------------------------


def test_a_simulation_has_bytes_after_every_event_and_where_the_peaks_are():
    events = [
        ("alloc", "a", 12 * MIB, 0),
        ("alloc", "b", 12 * MIB, 0),
        ("free", "a", 0, 0),
        ("empty_cache", None, 0, 0),
        ("alloc", "c", 600, 0),
        ("free_requested", "b", 0, 0),
        ("free_completed", "b", 0, 0),
    ]
    found = simulate(events)
    assert found.allocated_bytes.tolist() == [
        12 * MIB,
        24 * MIB,
        12 * MIB,
        12 * MIB,
        12 * MIB + 1024,
        1024,
        1024,
    ]
    assert found.reserved_bytes.tolist() == [
        12 * MIB,
        24 * MIB,
        24 * MIB,
        12 * MIB,
        14 * MIB,
        14 * MIB,
        14 * MIB,
    ]
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (24 * MIB, 24 * MIB)
    assert (found.label, found.oom, found.num_alloc_retries) == ("verified", None, 0)
    assert (simulate([]).peak_allocated_bytes, simulate([]).peak_reserved_bytes) == (0, 0)


def test_a_simulation_ends_where_the_device_is_full():
    found = simulate(
        [("alloc", 1, 20 * MIB, 0), ("alloc", 2, 30 * MIB, 0), ("free", 1, 0, 0)],
        capacity_bytes=40 * MIB,
    )
    assert found.reserved_bytes.tolist() == [20 * MIB]
    assert found.oom == Shortage(30 * MIB, 30 * MIB, 20 * MIB, 20 * MIB, 20 * MIB, 0)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([("alloc", 1, 5, 0), ("alloc", 1, 5, 0)], "event 1: 1 is allocated already"),
        (
            [("alloc", 1, 5, 0), ("free_requested", 1, 5, 0), ("alloc", 1, 5, 0)],
            "event 2: 1 is allocated already",
        ),
        ([("free", "x", 5, 0)], "event 0: 'x' is not allocated"),
        ([("alloc", 1, -5, 0)], "event 0: 1 asks for -5 bytes"),
        ([("resize", 1, 5, 0)], "event 0 is 'resize': it must be one of alloc, free"),
    ],
)
def test_impossible_events_are_named(events, says):
    with pytest.raises(ValueError, match=says):
        simulate(events)


def test_a_step_watched_by_the_meter_can_be_simulated():
    meter = Meter()
    trainer = Trainer(micro.model(), read_row("row", {}), Schedule(1e-2, 2), observer=meter)
    with meter:
        trainer.step([micro.batch(0)])
    frame = meter.frame()
    found = simulate(frame)
    rows = zip(frame["event"], frame["storage"], frame["bytes"], [0] * len(frame), strict=True)
    assert np.array_equal(found.reserved_bytes, simulate(rows).reserved_bytes)
    rest = found.allocated_bytes - frame["live_bytes"].to_numpy()
    alive = frame["event"].map({"alloc": 1, "free": -1}).cumsum()
    assert (
        (rest >= 0).all()
        and (rest < 512 * alive + MIB).all()
        and found.peak_reserved_bytes % (2 * MIB) == 0
    )


def test_columns_may_name_streams():
    columns = {
        "event": np.array(["alloc", "free", "alloc"]),
        "storage": np.array([1, 1, 2]),
        "bytes": np.array([MIB + 1] * 3),
    }
    assert simulate(columns).peak_reserved_bytes == 20 * MIB
    assert simulate({**columns, "stream": np.array([0, 0, 1])}).peak_reserved_bytes == 40 * MIB


def test_fifty_thousand_events_take_less_than_a_second():
    chance, events, alive = np.random.default_rng(0), [], []
    sizes = chance.choice([512, 4096, 900_000, 2 * MIB, 5_000_000, 33_333_333, 120 * MIB], 50_000)
    sizes += 512 * chance.integers(0, 5, 50_000)
    for number, size in enumerate(sizes.tolist()):
        if len(alive) > 300 or (alive and number % 2):
            events.append(("free", alive.pop(int(chance.integers(len(alive)))), 0, 0))
        else:
            alive.append(number)
            events.append(("alloc", number, size, 0))
    began = time.process_time()
    simulate(events)
    assert time.process_time() - began < 1.0


# laws ---------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 3000),
    st.integers(1, 2 * MIB),
    st.integers(MIB, 12 * MIB),
    st.integers(8 * MIB, 60 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB, 20 * MIB]),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["alloc"] * 5 + ["free"] * 3 + ["request", "complete", "empty"]),
        SIZES,
        st.sampled_from([0, 0, 7]),
        st.integers(0, 1 << 16),
    ),
    min_size=30,
    max_size=200,
)


def _play(allocator, slow, steps):
    """The same program in both, and the segments of one at the addresses of the other; yields after
    every step."""
    live, waiting = {}, {}
    for key, (kind, size, stream, pick) in enumerate(steps):
        if kind == "alloc":
            begin = len(slow.trace)
            try:
                address = slow.malloc(size, stream)
            except Full:
                with pytest.raises(OutOfMemory):
                    allocator.malloc(key, size, stream)
            else:
                allocator.device.recorded = [
                    (e["addr"], e["size"])
                    for e in slow.trace[begin:]
                    if e["action"] == "segment_alloc"
                ]
                allocator.malloc(key, size, stream)
                live[key] = address
            still = {
                block[0]
                for segment in slow.segments
                for block in segment["blocks"]
                if block[2] == "waits"
            }
            waiting = {name: address for name, address in waiting.items() if address in still}
        elif kind == "empty":
            slow.empty()
            allocator.empty_cache()
            waiting = {}
        elif kind == "complete" and waiting:
            name = list(waiting)[pick % len(waiting)]
            slow.complete(waiting.pop(name))
            allocator.free_completed(name)
        elif kind in ("free", "request") and live:
            name = list(live)[pick % len(live)]
            address = live.pop(name)
            slow.request(address)
            allocator.free_requested(name)
            if kind == "request":
                waiting[name] = address
            else:
                slow.complete(address)
                allocator.free_completed(name)
        yield live, waiting


def _check_laws(allocator, live, waiting):
    segments = allocator.segments()
    assert all(
        one.address + one.bytes <= other.address for one, other in pairwise(segments)
    )  # none overlap
    for segment in segments:
        at = segment.address
        for block in segment.pieces:
            assert block.address == at and block.bytes > 0  # blocks tile their segment
            at += block.bytes
        assert at == segment.address + segment.bytes
        assert all(
            (one.state, other.state) != ("inactive", "inactive")
            for one, other in pairwise(segment.pieces)
        )  # all merged
    blocks = [block for segment in segments for block in segment.pieces]
    sums = {
        state: sum(block.bytes for block in blocks if block.state == state)
        for state in ("active_allocated", "active_awaiting_free", "inactive")
    }
    assert sums["active_allocated"] == allocator.allocated_bytes
    assert sum(sums.values()) == allocator.reserved_bytes
    for state, names in (("active_allocated", live), ("active_awaiting_free", waiting)):
        addresses = {block.address for block in blocks if block.state == state}
        assert addresses == {allocator.address(name) for name in names}


@pytest.mark.parametrize("row", ROWS)
@budget(max_examples=50, deadline=None, derandomize=True, database=None)
@given(steps=STEPS)
def test_laws_of_any_program(row, steps):
    slow = SlowAllocator(**ROWS[row])
    settings, capacity = Settings.parse(slow.conf()), ROWS[row].get("capacity")
    allocator, again = Allocator(settings, capacity), Allocator(settings, capacity)
    for live, waiting in _play(allocator, slow, steps):
        _check_laws(allocator, live, waiting)
        assert (allocator.reserved_bytes, allocator.allocated_bytes) == (
            slow.reserved,
            slow.allocated,
        )
        if not slow.expandable:  # else addresses count from where the segment begins
            assert {name: allocator.address(name) for name in live} == live
        assert capacity is None or allocator.reserved_bytes <= capacity
    assert allocator.num_alloc_retries == slow.retries
    for _ in _play(again, SlowAllocator(**ROWS[row]), steps):
        pass
    assert again.segments() == allocator.segments()  # the same program, the same memory
    for name in live:
        allocator.free(name)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.allocated_bytes, allocator.segments()) == (0, 0, [])
