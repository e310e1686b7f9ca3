"""The settings of PyTorch's caching allocator that decide bytes, in the syntax of
`PYTORCH_ALLOC_CONF`.

The rules of the native defaults are labelled "verified": they reproduce CUDA snapshots that others
published, reserved bytes at every event. Another simulator of the same rules showed that; this
project has recorded none of them itself yet. Everything else follows the source of torch 2.11 to
2.13 (`c10/core/AllocatorConfig.cpp`) and carries the label "not verified on a GPU" wherever it is
used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
    """The allocator's settings. Sizes are whole MiB, as in PyTorch's own syntax. Raises: ValueError
    with every reason."""

    expandable_segments: bool = False
    """Map pages into one growing segment for each pool instead of asking for a segment each
    time."""
    max_split_size_mb: int | None = None
    """Blocks of this size or more are never split, and only given to requests that large. None: no
    limit."""
    max_non_split_rounding_mb: int | None = None
    """How much larger than the request such a block may be. None: `large_segment_size_mb`."""
    large_segment_size_mb: int = 20
    """The segment that serves requests above 1 and below 10 MiB; also the page of the large
    expandable segment."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    """How many steps between two powers of two requests are rounded up to, for each of the 16
    intervals; 0 and 1: none."""
    garbage_collection_threshold: float = 0.0
    """Share of what is allowed (`per_process_memory_fraction`) above which old cached blocks are
    returned before a segment is asked for. 0: never. Alone it does nothing, as in PyTorch, which
    then has nothing to take the share of."""
    per_process_memory_fraction: float = 1.0
    """Share of the device's whole memory that may be reserved. 1: no limit but the device's own."""

    def __post_init__(self):
        reasons = [
            f"{name} is {getattr(self, name)}: it must {rule.format(self)}"
            for name, rule, holds in _RULES
            if not holds(self)
        ]
        if reasons:
            raise ValueError("allocator settings: " + "; ".join(reasons))

    @classmethod
    def parse(cls, text: str) -> Settings:
        """From `"expandable_segments:True,max_split_size_mb:128"`. Settings that move no byte on
        the device are accepted and dropped. Stricter than PyTorch, which reads `128.9` as 128 and
        -1 as no limit. Raises: ValueError."""
        values: dict = {}
        text, at = "".join(text.split()), 0
        while at < len(text):
            entry = _ENTRY.match(text, at)
            if entry is None:
                raise ValueError(
                    f"allocator settings: {text[at:]!r} is not name:value,name:value,..."
                )
            name, value, at = *entry.groups(), entry.end()
            if name in _SYNTAX:
                pattern, rule, convert = _SYNTAX[name]
                if not re.fullmatch(pattern, value, re.ASCII):
                    raise ValueError(f"allocator settings: {name} is {value!r}: it must be {rule}")
                values[name] = convert(value)
            elif name not in _HARMLESS and (name, value) != ("backend", "native"):
                raise ValueError(
                    f"allocator settings: {name}:{value} is not simulated; those that are:"
                    f" {', '.join(_SYNTAX)}"
                )
        return cls(**values)

    def _changed(self) -> dict:
        """Everything that is not the default."""
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return {name: value for name, value, default in values if value != default}

    def text(self) -> str:
        """What `parse` reads: everything that is not the default."""
        changed = self._changed()
        if steps := changed.get("roundup_power2_divisions"):
            intervals = ",".join(f"{1 << at}:{count}" for at, count in enumerate(steps))
            changed["roundup_power2_divisions"] = f"[{intervals}]"
        return ",".join(f"{name}:{value}" for name, value in changed.items())

    def label(self) -> str:
        """Whether a number computed under these settings was verified: the default of each setting
        was compared with real GPUs, other values were not."""
        changed = ", ".join(self._changed())
        return f"{NOT_VERIFIED}: {changed}" if changed else VERIFIED

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
        """How many bytes of a device may be reserved; None: all. C++: `setMemoryFraction`."""
        if device_bytes is None or self.per_process_memory_fraction >= 1:
            return None
        return int(self.per_process_memory_fraction * device_bytes)

    def usable_bytes(self, capacity_bytes: int, device_bytes: int) -> int:
        """How many bytes may be reserved where a context leaves `capacity_bytes` of a device."""
        allowed = self.allowed_bytes(device_bytes)
        return capacity_bytes if allowed is None else min(capacity_bytes, allowed)

    def collects_above_bytes(self, device_bytes: int | None) -> int | None:
        """Reserved bytes from which on garbage is collected; None: never. C++: `malloc`,
        `garbage_collect_cached_blocks`."""
        allowed = self.allowed_bytes(device_bytes) if self.garbage_collection_threshold else None
        return None if allowed is None else int(self.garbage_collection_threshold * allowed)

    def endless_up_to_bytes(self, capacity_bytes: int, device_bytes: int) -> int:
        """Reserved bytes up to which a device behaves as one of unlimited memory."""
        limits = self.allowed_bytes(device_bytes), self.collects_above_bytes(device_bytes)
        return min([capacity_bytes, *(limit for limit in limits if limit is not None)])

    def round_bytes(self, size: int) -> int:
        """The least size of the block that serves a request. C++: `round_size`,
        `roundup_power2_next_division`."""
        interval = min(max(size.bit_length() - MIB.bit_length(), 0), INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        if divisions > 1 and size > BLOCK_BYTES * divisions:
            # at least a block, because both are powers of two; a power of two is its own multiple
            return _up(size, (1 << size.bit_length() - 1) // divisions)
        return max(BLOCK_BYTES, _up(size, BLOCK_BYTES))

    def segment_bytes(self, rounded: int) -> int:
        """The segment that the driver is asked for when no cached block fits. C++:
        `get_allocation_size`."""
        if rounded <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        large = rounded >= LARGE_REQUEST_BYTES
        return _up(rounded, SEGMENT_STEP_BYTES) if large else self.large_segment_bytes

    def least_rest_bytes(self, rounded: int) -> float:
        """How much a larger block must have left over to be split for this request. C++:
        `should_split`."""
        if rounded <= SMALL_BYTES or self.expandable_segments:
            return BLOCK_BYTES
        return SMALL_BYTES + 1 if rounded < self.max_split_bytes else float("inf")


def _is_no_smaller_segment(size_mb: int | None, settings: Settings) -> bool:
    return size_mb is None or size_mb >= settings.large_segment_size_mb


_RULES = (  # (setting, what it must, whether it does)
    ("large_segment_size_mb", "be above 10", lambda s: s.large_segment_size_mb > 10),
    (
        "max_split_size_mb",
        "be at least large_segment_size_mb, {0.large_segment_size_mb}",
        lambda s: _is_no_smaller_segment(s.max_split_size_mb, s),
    ),
    (
        "max_non_split_rounding_mb",
        "be at least large_segment_size_mb, {0.large_segment_size_mb}",
        lambda s: _is_no_smaller_segment(s.max_non_split_rounding_mb, s),
    ),
    (
        "garbage_collection_threshold",
        "lie between 0 and 1",
        lambda s: 0 <= s.garbage_collection_threshold < 1,
    ),
    (
        "per_process_memory_fraction",
        "be 0 to 1",
        lambda s: 0 <= s.per_process_memory_fraction <= 1,
    ),
    (
        "roundup_power2_divisions",
        f"be {INTERVALS} powers of two or zeros",
        lambda s: (
            len(s.roundup_power2_divisions) == INTERVALS
            and not any(count & (count - 1) for count in s.roundup_power2_divisions)
        ),
    ),
)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _divisions(value: str) -> tuple[int, ...]:
    """`4` for all intervals, or `[256:1,512:2,>:8]`: by interval in MiB. The first entry holds for
    all intervals below it too, `>` for all above."""
    if not value.startswith("["):
        return (int(value),) * INTERVALS
    divisions, last = [0] * INTERVALS, None
    for entry in filter(None, value[1:-1].split(",")):
        bound, count = entry.split(":")
        if bound == ">":
            after = 1 if last is None else last + 1
            divisions[after:] = [int(count)] * (INTERVALS - after)
            continue
        size_mb = int(bound)
        if size_mb < 1 or size_mb & (size_mb - 1):
            raise ValueError(
                f"allocator settings: roundup_power2_divisions has the interval {bound}: it must be"
                " a power of two"
            )
        index = min(size_mb.bit_length() - 1, INTERVALS - 1)
        first = 0 if last is None else index
        divisions[first : index + 1] = [int(count)] * (index + 1 - first)
        last = index
    return tuple(divisions)


_WHOLE = r"\d+", "a whole number", int
_NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
_SYNTAX: dict[
    str, tuple[str, str, Callable]
] = {  # setting -> (pattern of its text, what that must be, conversion)
    "expandable_segments": ("True|False", "True or False", lambda value: value == "True"),
    "max_split_size_mb": _WHOLE,
    "max_non_split_rounding_mb": _WHOLE,
    "large_segment_size_mb": _WHOLE,
    "roundup_power2_divisions": (
        r"[1-9]\d*|\[((>|\d+):\d+,?|,)*\]",
        "a power of two, or one for each interval of MiB, as [256:1,512:2,>:8]",
        _divisions,
    ),
    # PyTorch refuses an explicit 0 too
    "garbage_collection_threshold": (rf"(?!0*\.?0*(e|$)){_NUMBER}", "between 0 and 1", float),
    "per_process_memory_fraction": (_NUMBER, "0 to 1", float),
}
