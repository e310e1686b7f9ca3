"""The settings of PyTorch's caching allocator that decide bytes, in the syntax of
`PYTORCH_ALLOC_CONF`.

The rules of the native defaults are labelled "verified": they reproduce CUDA snapshots that others
published, reserved bytes at every event. That was seen with another simulator of the same rules;
none was recorded by this project yet. Everything else follows the source of torch 2.11 to 2.13
(`c10/core/AllocatorConfig.cpp`) and carries the label "not verified on a GPU" wherever it is used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

MIB = 1 << 20
BLOCK_BYTES = 512  # every request is rounded up to a multiple of this
SMALL_BYTES = MIB  # requests up to here live in the small pool
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_REQUEST_BYTES = 10 * MIB  # from here on a segment is the request, rounded up to ...
SEGMENT_STEP_BYTES = 2 * MIB
INTERVALS = 16  # of sizes with a division of their own: below 2 MiB, below 4 MiB, ... from 32 GiB

VERIFIED = "verified"
NOT_VERIFIED = "not verified on a GPU"

# settings of PyTorch that move no byte on the device
_HARMLESS = (
    "graph_capture_record_stream_reuse",
    "pinned_free_catch_all",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "release_lock_on_cudamalloc",
    "throw_on_cudamalloc_oom",
)
_ENTRY = re.compile(r"(\w+):(\[[^\[\]]*\]|[^,:\[\]]+)(?:,|$)")


@dataclass(frozen=True)
class Settings:
    """What the allocator is told. Sizes here are whole MiB, as in PyTorch's own syntax. Raises:
    ValueError with every reason."""

    expandable_segments: bool = False
    """Map pages into one growing segment a pool instead of asking for a segment each time."""
    max_split_size_mb: int | None = None
    """Blocks of this size or more are never split, and only given to requests that large. None: no
    limit."""
    max_non_split_rounding_mb: int | None = None
    """How much larger than the request such a block may be. None: `large_segment_size_mb`."""
    large_segment_size_mb: int = 20
    """The segment that serves requests above 1 and below 10 MiB; also the page of the large
    expandable segment."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    """Steps between two powers of two that requests are rounded up to, for each of the 16
    intervals; 0 and 1: none."""
    garbage_collection_threshold: float = 0.0
    """Share of what is allowed (`per_process_memory_fraction`) above which old cached blocks are
    returned before a segment is asked for. 0: never. Alone it does nothing, as in PyTorch, which
    then has nothing to take the share of."""
    per_process_memory_fraction: float = 1.0
    """Share of the device's whole memory that may be reserved. 1: no limit but the device's own."""

    def __post_init__(self):
        least = self.large_segment_size_mb
        reasons = [
            reason
            for wrong, reason in (
                (least <= 10, f"large_segment_size_mb is {least}: it must be above 10"),
                (
                    self.max_split_size_mb is not None and self.max_split_size_mb < least,
                    (
                        f"max_split_size_mb is {self.max_split_size_mb}: it must be at least"
                        f" large_segment_size_mb, {least}"
                    ),
                ),
                (
                    self.max_non_split_rounding_mb is not None
                    and self.max_non_split_rounding_mb < least,
                    (
                        f"max_non_split_rounding_mb is {self.max_non_split_rounding_mb}: it must be"
                        f" at least large_segment_size_mb, {least}"
                    ),
                ),
                (
                    not 0 <= self.garbage_collection_threshold < 1,
                    (
                        f"garbage_collection_threshold is {self.garbage_collection_threshold}: it"
                        " must lie between 0 and 1"
                    ),
                ),
                (
                    not 0 <= self.per_process_memory_fraction <= 1,
                    (
                        f"per_process_memory_fraction is {self.per_process_memory_fraction}: it"
                        " must be 0 to 1"
                    ),
                ),
                (
                    len(self.roundup_power2_divisions) != INTERVALS
                    or any(d & (d - 1) for d in self.roundup_power2_divisions),
                    (
                        f"roundup_power2_divisions is {self.roundup_power2_divisions}: it must be"
                        f" {INTERVALS} powers of two or zeros"
                    ),
                ),
            )
            if wrong
        ]
        if reasons:
            raise ValueError("allocator settings: " + "; ".join(reasons))

    @classmethod
    def parse(cls, text: str) -> Settings:
        """From `"expandable_segments:True,max_split_size_mb:128"`. Settings that move no device
        byte are accepted and dropped. Stricter than PyTorch, which reads `128.9` as 128 and -1 as
        no limit. Raises: ValueError.
        """
        told: dict = {}
        text, at = "".join(text.split()), 0
        while at < len(text):
            entry = _ENTRY.match(text, at)
            if entry is None:
                raise ValueError(
                    f"allocator settings: {text[at:]!r} is not name:value,name:value,..."
                )
            name, value, at = *entry.groups(), entry.end()
            if name in _READ:
                told[name] = _READ[name](name, value)
            elif name not in _HARMLESS and (name, value) != ("backend", "native"):
                raise ValueError(
                    f"allocator settings: {name}:{value} is not simulated; those that are:"
                    f" {', '.join(_READ)}"
                )
        return cls(**told)

    def text(self) -> str:
        """What `parse` reads: everything that is not the default."""
        told = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }
        if (steps := told.get("roundup_power2_divisions")) is not None:
            told["roundup_power2_divisions"] = (
                "[" + ",".join(f"{1 << at}:{count}" for at, count in enumerate(steps)) + "]"
            )
        return ",".join(f"{name}:{value}" for name, value in told.items())

    def labels(self) -> dict[str, str]:
        """For each setting, whether what it does here was held against a real GPU: its default was,
        nothing else."""
        return {
            f.name: VERIFIED if getattr(self, f.name) == f.default else NOT_VERIFIED
            for f in fields(self)
        }

    def label(self) -> str:
        """One label for a number computed under these settings."""
        told = [name for name, label in self.labels().items() if label != VERIFIED]
        return f"{NOT_VERIFIED}: {', '.join(told)}" if told else VERIFIED

    # what the settings decide ---------------------------------------------------------------------

    @property
    def large_segment_bytes(self) -> int:
        return self.large_segment_size_mb * MIB

    @property
    def max_split_bytes(self) -> float:
        return float("inf") if self.max_split_size_mb is None else self.max_split_size_mb * MIB

    @property
    def non_split_rounding_bytes(self) -> int:
        return (self.max_non_split_rounding_mb or self.large_segment_size_mb) * MIB

    def allowed_bytes(self, device_bytes: int | None) -> int | None:
        """How much of a device may be reserved; None: all of it. C++: `setMemoryFraction`."""
        limited = device_bytes is not None and self.per_process_memory_fraction < 1
        return int(self.per_process_memory_fraction * device_bytes) if limited else None

    def usable_bytes(self, capacity_bytes: int, device_bytes: int) -> int:
        """How much may be reserved where a context leaves `capacity_bytes` of a device."""
        allowed = self.allowed_bytes(device_bytes)
        return capacity_bytes if allowed is None else min(capacity_bytes, allowed)

    def collects_above_bytes(self, device_bytes: int | None) -> int | None:
        """Reserved bytes from which on garbage is collected; None: never. C++: `malloc`,
        `garbage_collect_cached_blocks`."""
        allowed = self.allowed_bytes(device_bytes) if self.garbage_collection_threshold else None
        return None if allowed is None else int(self.garbage_collection_threshold * allowed)

    def endless_up_to_bytes(self, capacity_bytes: int, device_bytes: int) -> int:
        """Reserved bytes up to which a device behaves as one without end."""
        limits = self.allowed_bytes(device_bytes), self.collects_above_bytes(device_bytes)
        return min([capacity_bytes, *(limit for limit in limits if limit is not None)])

    def round_bytes(self, asked: int) -> int:
        """The block that a request takes at least. C++: `round_size`,
        `roundup_power2_next_division`."""
        interval = min(max(asked.bit_length() - MIB.bit_length(), 0), INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        if divisions > 1 and asked > BLOCK_BYTES * divisions:
            # at least a block, because both are powers of two; a power of two is its own multiple
            return _up(asked, (1 << asked.bit_length() - 1) // divisions)
        return max(BLOCK_BYTES, _up(asked, BLOCK_BYTES))

    def segment_bytes(self, rounded: int) -> int:
        """What is asked of the driver when no cached block fits. C++: `get_allocation_size`."""
        if rounded <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        return (
            self.large_segment_bytes
            if rounded < LARGE_REQUEST_BYTES
            else _up(rounded, SEGMENT_STEP_BYTES)
        )

    def least_rest_bytes(self, rounded: int) -> float:
        """How much a larger block must have left over to be split for this request. C++:
        `should_split`."""
        if rounded <= SMALL_BYTES or self.expandable_segments:
            return BLOCK_BYTES
        return SMALL_BYTES + 1 if rounded < self.max_split_bytes else float("inf")


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _whole(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"allocator settings: {name} is {value!r}: it must be a whole number")
    return int(value)


def _truth(name: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError(f"allocator settings: {name} is {value!r}: it must be True or False")
    return value == "True"


def _share(name: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"allocator settings: {name} is {value!r}: it must lie between 0 and 1")
    return share


def _fraction(name: str, value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise ValueError(f"allocator settings: {name} is {value!r}: it must be 0 to 1")
    return fraction


def _divisions(name: str, value: str) -> tuple[int, ...]:
    """`4` for all intervals, or `[256:1,512:2,>:8]`: by interval in MiB, the first also for all
    below, `>` for all above."""
    if not value.startswith("["):
        if not (every := _whole(name, value)):
            raise ValueError(
                f"allocator settings: {name} is 0: leave it out to round to {BLOCK_BYTES} bytes"
                " only"
            )
        return (every,) * INTERVALS
    divisions, last = [0] * INTERVALS, None
    for entry in filter(None, value[1:-1].split(",")):
        bound, _, count = entry.partition(":")
        told = _whole(name, count)
        if bound == ">":
            after = 1 if last is None else last + 1
            divisions[after:] = [told] * (INTERVALS - after)
            continue
        size_mb = _whole(name, bound)
        if size_mb < 1 or size_mb & (size_mb - 1):
            raise ValueError(
                f"allocator settings: {name} has the interval {bound}: it must be a power of two"
            )
        index = min(size_mb.bit_length() - 1, INTERVALS - 1)
        if last is None:
            divisions[:index] = [told] * index
        divisions[index] = told
        last = index
    return tuple(divisions)


_READ = {
    "expandable_segments": _truth,
    "max_split_size_mb": _whole,
    "max_non_split_rounding_mb": _whole,
    "large_segment_size_mb": _whole,
    "roundup_power2_divisions": _divisions,
    "garbage_collection_threshold": _share,
    "per_process_memory_fraction": _fraction,
}
