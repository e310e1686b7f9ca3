"""The caching allocator a second time, slowly: written from CUDACachingAllocator.cpp with nothing
of vramlab's.

Plain lists and whole scans: a segment is a list of blocks [address, bytes, state, requested], a
search is a minimum over all of them. It writes the trace and the snapshot that PyTorch would,
addresses included.
"""

from __future__ import annotations

MIB = 1 << 20
HUGE = 1 << 43

# events whose peak depends on which of two segments lies lower, because each has a free block of 10
# MiB at one time
TIE = [
    ("alloc", "both", 20 * MIB, 0),
    ("free", "both", 0, 0),
    ("alloc", "first half", 10 * MIB, 0),
    ("alloc", "second half", 10 * MIB, 0),
    ("alloc", "other segment", 10 * MIB, 0),
    ("free", "first half", 0, 0),
    ("free", "other segment", 0, 0),
    ("alloc", "either", 10 * MIB, 0),
    ("free", "second half", 0, 0),
    ("alloc", "whole", 20 * MIB, 0),
]


class Full(Exception):
    """The device is full."""


class SlowAllocator:
    """`reuse`: the driver gives the lowest address that is free, as real ones may, instead of one
    never used. `places`: such a one lies above all others ("up"), below them ("down"), or now above
    and now below ("both")."""

    def __init__(
        self,
        expandable=False,
        max_split=None,
        large=20 * MIB,
        divisions=0,
        collect=0.0,
        capacity=None,
        reuse=False,
        fraction=1.0,
        places="up",
    ):
        self.expandable, self.max_split, self.large, self.divisions = (
            expandable,
            max_split or 1 << 62,
            large,
            divisions,
        )
        self.collect, self.capacity, self.reuse, self.fraction = collect, capacity, reuse, fraction
        self.segments, self.trace, self.retries = [], [], 0
        self.next, self.clock, self.ages = 0x7F0000000000, 0, {}
        self.places, self.below = places, 0x7F0000000000

    # sizes ----------------------------------------------------------------------------------------

    def rounded(self, size):
        if size < 512:
            return 512
        if self.divisions > 1 and size > 512 * self.divisions:
            power = 1
            while power * 2 <= size:
                power *= 2
            steps = [power + step * (power // self.divisions) for step in range(self.divisions + 1)]
            return min(step for step in steps if step >= size)
        while size % 512:
            size += 512 - size % 512
        return size

    def segment_size(self, size):
        if size <= MIB:
            return 2 * MIB
        if size < 10 * MIB:
            return self.large
        return (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)

    @property
    def reserved(self):
        return sum(b[1] for s in self.segments for b in s["blocks"] if b[2] != "unmapped")

    @property
    def allocated(self):
        return sum(b[1] for s in self.segments for b in s["blocks"] if b[2] == "used")

    def say(self, action, addr, size, stream):
        self.trace.append(
            {"action": action, "addr": addr, "size": size, "stream": stream, "frames": []}
        )

    # requests -------------------------------------------------------------------------------------

    def malloc(self, asked, stream=0):
        size = self.rounded(asked)
        small = size <= MIB
        if not small:
            self.clock += 1
        found = self.search(size, stream, small)
        if found is None and self.collect and self.allowed() is not None:
            self.collect_garbage()
        if found is None:
            found = self.fresh(size, stream, small)
        if found is None and self.drop_oversize(size, stream, small):
            found = self.fresh(size, stream, small)
        if found is None:
            self.empty()
            self.retries += 1
            found = self.fresh(size, stream, small)
        if found is None:
            self.trace.append(
                {"action": "oom", "size": asked, "stream": stream, "device_free": 0, "frames": []}
            )
            raise Full
        segment, block = found
        left = block[1] - size
        if (left >= 512) if small or self.expandable else (size < self.max_split and left > MIB):
            segment["blocks"].insert(
                segment["blocks"].index(block) + 1, [block[0] + size, left, "free", 0]
            )
            self.ages[block[0] + size] = self.clock
            block[1] = size
        block[2:] = ["used", asked]
        self.say("alloc", block[0], asked, stream)
        return block[0]

    def search(self, size, stream, small):
        fits = [
            (b[1], b[0], s, b)
            for s in self.segments
            if s["stream"] == stream and s["small"] == small
            for b in s["blocks"]
            if b[2] == "free" and b[1] >= size
        ]
        if not fits:
            return None
        fits.sort(key=lambda fit: fit[:2])
        at = 0
        if self.expandable:
            while at + 1 < len(fits) and self.reach(*fits[at + 1][2:]) < self.reach(*fits[at][2:]):
                at += 1
        best = fits[at]
        if size < self.max_split <= best[0] or (
            size >= self.max_split and best[0] >= size + self.large
        ):
            return None
        return best[2:]

    def reach(self, segment, block):
        after = segment["blocks"][segment["blocks"].index(block) + 1 :]
        return block[1] + (after[0][1] if after and after[0][2] == "unmapped" else 0)

    def allowed(self):
        """PyTorch has a maximum only below a fraction of 1."""
        return int(self.fraction * self.capacity) if self.capacity and self.fraction < 1 else None

    def fresh(self, size, stream, small):
        if self.allowed() is not None and self.reserved + self.segment_size(size) > self.allowed():
            return None
        if self.expandable:
            return self.expand(size, stream, small)
        return self.cuda_malloc(self.segment_size(size), stream, small)

    def room(self, size):
        return self.capacity is None or self.reserved + size <= self.capacity

    def cuda_malloc(self, size, stream, small):
        if not self.room(size):
            return None
        block = [self.address(size), size, "free", 0]
        segment = {"stream": stream, "small": small, "blocks": [block]}
        self.segments.append(segment)
        self.say("segment_alloc", block[0], size, stream)
        return segment, block

    def address(self, size):
        if self.reuse:
            taken = sorted(
                (s["blocks"][0][0], sum(b[1] for b in s["blocks"])) for s in self.segments
            )
            at = 0x7F0000000000
            for start, length in taken:
                if start - at >= size:
                    break
                at = start + length
            return at
        if self.places == "down" or (
            self.places == "both" and (self.next + self.below) // MIB % 4 < 2
        ):
            self.below -= size
            return self.below
        at, self.next = self.next, self.next + size
        return at

    # expandable segments --------------------------------------------------------------------------

    def expand(self, size, stream, small):
        page = 2 * MIB if small else self.large
        where = self.lowest(size, stream, small)
        if where is None:
            total = HUGE if self.capacity is None else self.capacity + self.capacity // 8
            total = (total + page - 1) // page * page
            segment = {
                "stream": stream,
                "small": small,
                "blocks": [[self.address(total), total, "unmapped", 0]],
            }
            self.segments.append(segment)
            where = segment, 0
        segment, at = where
        blocks = segment["blocks"]
        got = blocks[at][1] if blocks[at][2] == "free" else 0
        address = blocks[at][0]
        while got < size:
            hole = next(b for b in blocks if b[0] >= address and b[2] == "unmapped")
            length = min(hole[1], (size - got + page - 1) // page * page)
            if not self.room(length):
                return None
            self.say("segment_map", hole[0], length, stream)
            if length < hole[1]:
                blocks.insert(
                    blocks.index(hole) + 1, [hole[0] + length, hole[1] - length, "unmapped", 0]
                )
                hole[1] = length
            hole[2] = "free"
            self.join(segment)
            got = next(b[1] for b in blocks if b[0] == address)
        return segment, next(b for b in blocks if b[0] == address)

    def lowest(self, size, stream, small):
        holes = sorted(
            (b[0], s["blocks"].index(b), s)
            for s in self.segments
            for b in s["blocks"]
            if b[2] == "unmapped" and s["stream"] == stream and s["small"] == small
        )
        for _, at, segment in holes:
            blocks = segment["blocks"]
            if at and blocks[at - 1][2] == "free":
                at -= 1
            room = 0
            for block in blocks[at:]:
                if block[2] not in ("free", "unmapped"):
                    break
                room += block[1]
            if room >= size:
                return segment, at
        return None

    def join(self, segment):
        """Neighbours of one kind become one, wherever they are."""
        blocks = segment["blocks"]
        at = 0
        while at + 1 < len(blocks):
            if blocks[at][2] == blocks[at + 1][2] and blocks[at][2] in ("free", "unmapped"):
                blocks[at][1] += blocks[at + 1][1]
                del blocks[at + 1]
            else:
                at += 1

    # frees ----------------------------------------------------------------------------------------

    def free(self, address):
        self.request(address)
        self.complete(address)

    def find(self, address):
        return next((s, b) for s in self.segments for b in s["blocks"] if b[0] == address)

    def request(self, address):
        segment, block = self.find(address)
        block[2] = "waits"
        self.say("free_requested", address, block[3], segment["stream"])

    def complete(self, address):
        segment, block = self.find(address)
        block[2] = "free"
        self.say("free_completed", address, block[3], segment["stream"])
        self.join(segment)
        for after in segment["blocks"]:
            if after[0] <= address < after[0] + after[1]:
                self.ages[after[0]] = self.clock

    # giving back ----------------------------------------------------------------------------------

    def drop(self, segment):
        self.segments.remove(segment)
        self.say("segment_free", *segment["blocks"][0][:2], segment["stream"])
        return segment["blocks"][0][1]

    def whole(self):
        return [s for s in self.segments if len(s["blocks"]) == 1 and s["blocks"][0][2] == "free"]

    def drop_oversize(self, size, stream, small):
        if self.max_split == 1 << 62 or self.expandable:
            return False
        target = max(size, self.max_split)
        mine = sorted(
            (s for s in self.whole() if s["stream"] == stream and s["small"] == small),
            key=lambda s: (s["blocks"][0][1], s["blocks"][0][0]),
        )
        for segment in mine:
            if segment["blocks"][0][1] >= target:
                self.drop(segment)
                return True
        total = 0
        for segment in reversed(mine):
            if total < target and segment["blocks"][0][1] >= self.max_split:
                total += self.drop(segment)
        return total >= target

    def collect_garbage(self):
        threshold = int(self.collect * self.allowed())
        over = self.reserved - threshold
        while over > 0:
            idle = [
                (self.clock - self.ages[s["blocks"][0][0]], s)
                for s in self.whole()
                if not s["small"]
            ]
            if not idle:
                return
            mean = sum(age for age, _ in idle) / len(idle)
            for age, segment in idle:
                if age >= mean:
                    over -= self.drop(segment)

    def empty(self):
        for address in [b[0] for s in self.segments for b in s["blocks"] if b[2] == "waits"]:
            self.complete(address)
        if not self.expandable:
            for segment in self.whole():
                self.drop(segment)
            return
        for segment in list(self.segments):
            page = 2 * MIB if segment["small"] else self.large
            base = segment["blocks"][0][0]
            for block in [b for b in segment["blocks"] if b[2] == "free"]:
                start = base + (block[0] - base + page - 1) // page * page
                end = base + (block[0] + block[1] - base) // page * page
                if start < end:
                    parts = [
                        [block[0], start - block[0], "free", 0],
                        [start, end - start, "unmapped", 0],
                        [end, block[0] + block[1] - end, "free", 0],
                    ]
                    at = segment["blocks"].index(block)
                    segment["blocks"][at : at + 1] = [part for part in parts if part[1]]
                    self.say("segment_unmap", start, end - start, segment["stream"])
            self.join(segment)
            if len(segment["blocks"]) == 1 and segment["blocks"][0][2] == "unmapped":
                self.segments.remove(segment)

    # what PyTorch would dump ----------------------------------------------------------------------

    def dump(self, first=0, device=0):
        """The snapshot of a recording that began before event `first`. An own copy."""
        states = {"used": "active_allocated", "waits": "active_awaiting_free", "free": "inactive"}
        out = []
        for segment in self.segments:
            run = []
            for block in [*segment["blocks"], [0, 0, "unmapped", 0]]:
                if block[2] != "unmapped":
                    run.append(
                        {
                            "address": block[0],
                            "size": block[1],
                            "requested_size": block[3],
                            "state": states[block[2]],
                            "frames": [],
                        }
                    )
                elif run:
                    out.append(
                        {
                            "device": device,
                            "address": run[0]["address"],
                            "total_size": sum(b["size"] for b in run),
                            "stream": segment["stream"],
                            "segment_type": "small" if segment["small"] else "large",
                            "allocated_size": 0,
                            "active_size": 0,
                            "requested_size": 0,
                            "blocks": run,
                            "frames": [],
                            "segment_pool_id": (0, 0),
                            "is_expandable": self.expandable,
                        }
                    )
                    run = []
        trace = [
            {
                **entry,
                "time_us": 1_700_000_000_000_000 + at,
                "user_metadata": "",
                "compile_context": "N/A",
            }
            for at, entry in enumerate(self.trace)
        ]
        return {
            "segments": sorted(out, key=lambda s: s["address"]),
            "device_traces": [[]] * device + [trace[first:]],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": self.conf(),
                "expandable_segments": self.expandable,
            },
            "external_annotations": [],
        }

    def conf(self):
        told = [f"expandable_segments:{self.expandable}"]
        told += [f"max_split_size_mb:{self.max_split // MIB}"] * (self.max_split < 1 << 62)
        told += [f"large_segment_size_mb:{self.large // MIB}"] * (self.large != 20 * MIB)
        told += [f"roundup_power2_divisions:{self.divisions}"] * (self.divisions > 0)
        told += [f"per_process_memory_fraction:{self.fraction}"] * (self.fraction < 1)
        return ",".join(
            [*told, f"garbage_collection_threshold:{self.collect}"] if self.collect else told
        )
