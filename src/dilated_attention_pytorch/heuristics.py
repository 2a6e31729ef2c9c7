"""Launch configurations for what nobody has measured, and what they take of a GPU's shared memory.

The tables say how large a tile each family of GPUs carries; a problem then only shrinks it. They are starting points
that run everywhere, not winners: a measured entry always goes before them.
"""

from __future__ import annotations

from dataclasses import replace

from .config import BACKWARD, DTYPE_BYTES, IN_GLUON, LaunchConfig, next_power_of_two

ONE_TILE_ROWS = 128
"""A segment of so many rows, queries and keys, can be held by one tile of a launch that gives all gradients."""

FLOOR = (LaunchConfig(32, 32, num_warps=4, num_stages=1), LaunchConfig(16, 16, num_warps=4, num_stages=1))
"""The last resort, larger first: slow, and small enough for every GPU we know."""

# (block_m, block_n, num_warps, num_stages), best first, by family, op and bytes that a row of one operand has at most.
# 64 bytes: bf16 with D <= 32. 96: D <= 48. 128: D <= 64. 192: D <= 96. 256: D <= 128. 512: D <= 256. float32 has a
# table of its own.
_Sizes = tuple[tuple[int, int, int, int], ...]
_TABLES: dict[str, dict[str, dict[int, _Sizes]]] = {
    "hopper": {  # measured on an H100 at 128 to 8192 rows, D 24, 48, 64, 96 and 128
        "fwd": {
            64: ((128, 64, 4, 3),),
            128: ((128, 64, 8, 3),),
            256: ((64, 64, 4, 3),),
            512: ((128, 32, 8, 2), (64, 32, 4, 2)),
        },
        "dkdv": {
            64: ((128, 64, 4, 3),),
            96: ((32, 64, 4, 3),),
            128: ((64, 64, 4, 3),),
            256: ((64, 64, 4, 2),),
            512: ((32, 64, 8, 1), (32, 32, 4, 1)),
        },
        "dq": {
            128: ((64, 64, 4, 3),),
            192: ((128, 64, 8, 3),),
            256: ((128, 32, 8, 3),),
            512: ((64, 32, 8, 1), (32, 32, 4, 1)),
        },
    },
    "large": {  # 160 KiB of shared memory and more: sm_80, sm_100, gfx950
        "fwd": {128: ((128, 64, 4, 3),), 256: ((128, 64, 8, 3),), 512: ((128, 32, 8, 2), (64, 32, 4, 2))},
        "dkdv": {128: ((64, 128, 8, 2),), 256: ((64, 64, 4, 2),), 512: ((32, 64, 8, 1), (32, 32, 4, 1))},
        "dq": {128: ((128, 64, 8, 2),), 256: ((64, 64, 4, 2),), 512: ((64, 32, 8, 1), (32, 32, 4, 1))},
    },
    "small": {  # 64 to 99 KiB: sm_86, sm_89, sm_120, gfx90a, gfx942
        "fwd": {128: ((128, 64, 4, 2),), 256: ((64, 64, 4, 2), (64, 32, 4, 2)), 512: ((64, 32, 4, 1), (32, 32, 4, 1))},
        "dkdv": {128: ((64, 64, 4, 2),), 256: ((32, 64, 4, 2), (32, 32, 4, 1)), 512: ((16, 32, 4, 1),)},
        "dq": {128: ((64, 64, 4, 2),), 256: ((64, 32, 4, 2), (32, 32, 4, 1)), 512: ((32, 16, 4, 1),)},
    },
}
_CAUSAL_ON_HOPPER = (64, 64, 4, 3)
"""Forward, rows of 128 bytes: 0.86 and 0.91 of the others' time in regret_nvidia-h100-80gb-hbm3.json."""
# By pointers, with tails of rows or along an order: what looks up or masks rows has fewer registers for scores. On an
# H100 the forward of 14 problems takes 1.05 times as long as the best of a search in the mean, 1.17 in the tiles above.
# Of 64 keys at head_dim 64 nobody has timed it.
_LOOKED_UP_ON_HOPPER: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "fwd": {128: (64, 32, 4, 3), 256: (64, 32, 4, 3)},
    "dkdv": {},
    "dq": {256: (128, 64, 8, 3)},
}
# By tensor descriptor, head_dim 64 and 128, segments of 128 rows or more: measured on an H100 at 128 to 8192 rows.
_DESCRIBED_ON_HOPPER: dict[str, dict[int, tuple[LaunchConfig, ...]]] = {
    "fwd": {
        128: (LaunchConfig(64, 128, num_warps=4, num_stages=2, loads="descriptor"),),
        256: (LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="descriptor"),),
    },
    "dkdv": {
        128: (LaunchConfig(32, 64, num_warps=4, num_stages=4, loads="descriptor"),),
        256: (LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="descriptor"),),
    },
    "dq": {
        128: (LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="descriptor"),),
        256: (LaunchConfig(128, 64, num_warps=8, num_stages=3, loads="descriptor"),),
    },
}
# In Gluon, likewise. In 168 registers three CTAs of dK/dV lie on a multiprocessor; with tails it spills 24 to 64 bytes
# and takes 0.88 of the time.
_RINGS_ON_HOPPER: dict[str, dict[int, tuple[LaunchConfig, ...]]] = {
    "fwd": {
        128: (
            LaunchConfig(64, 128, num_warps=4, num_stages=2, maxnreg=168, loads="ring"),
            LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),
        ),
        256: (
            LaunchConfig(128, 128, num_warps=8, num_stages=2, loads="producer"),
            LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="ring"),
        ),
    },
    "dkdv": {
        128: (LaunchConfig(64, 64, num_warps=4, num_stages=2, maxnreg=168, loads="ring"),),
        256: (LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),),
    },
    "dq": {
        128: (LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),),
        256: (LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),),
    },
}
# Along an order all warps copy rows, so that a forward gains by more queries for each key.
_FORWARD_ALONG_ORDERS_ON_HOPPER: dict[int, tuple[LaunchConfig, ...]] = {
    128: (
        LaunchConfig(128, 64, num_warps=8, num_stages=2, loads="ring"),
        LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),
    ),
    256: (
        LaunchConfig(128, 128, num_warps=8, num_stages=2, loads="ring"),
        LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),
    ),
}
# All gradients of segments of so many rows, by head_dim. Of 64 rows Triton's text takes 0.80 to 0.94 of the time.
_ALL_GRADIENTS_ON_HOPPER = {
    (128, 64): LaunchConfig(64, 128, num_warps=8, num_stages=2, loads="ring"),
    (128, 128): LaunchConfig(64, 128, num_warps=8, num_stages=1, loads="ring"),
}
PRODUCED_ROWS = {False: 512, True: 2048}
PRODUCED_PAIRS = {False: 1, True: 256}
"""Segments of fewer rows, or fewer (segment, head) pairs, have too few tiles for CTAs that stay: causal ones more, as
their tiles take unequal times. At 128 and fewer causal pairs they take 0.99 to 1.33 times as long as CTAs that do not,
at 256 and 512 pairs 0.92 and 0.95."""
FEW_ROWS = 512
"""Rows in all pairs for each multiprocessor, of which 64 a tile are done in three rounds: how fast one tile is decides
then, and not how many share a multiprocessor. dQ at head_dim 64 takes 0.80 to 1.03 of the time in tiles of 128 keys."""
PADDED_ROWS = 192
"""Of fewer, rows that are padded to their tile go by pointers in the forward and in dQ: at 128 rows a ring takes 1.14
to 1.31 times as long, at 512 and 1024 it wins."""
RING = LaunchConfig(64, 64, loads="ring")
"""The smallest tiles of a ring: if any fill a segment, these do."""
RING_HEAD_DIMS = (48, 64, 80, 96, 112, 128)
"""Multiples of what a product sums up at once, in tiles of 64 and 128 columns."""
GLUON = ("3.6", "3.9")
"""Oldest and newest Triton whose compiler has taken the texts in Gluon, which Triton calls experimental."""
RING_BARRIERS = 1280
"""Bytes that the barriers of a ring take, and what passes between warps."""
DESCRIBED_ROWS = 128
"""Segments of fewer rows, queries or keys, are not loaded by descriptor untuned: nobody has timed it."""
# float32 without tensor cores, and so all that sm_75 and AMD's have: small tiles, or registers overflow.
_WIDE: dict[int, _Sizes] = {512: ((32, 32, 4, 2), (32, 32, 4, 1)), 1024: ((16, 16, 4, 1),)}
_FLOAT32: dict[str, dict[int, _Sizes]] = {
    "fwd": {**dict.fromkeys((64, 128, 256), ((128, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2))), **_WIDE},
    "dkdv": {**dict.fromkeys((64, 128, 256), ((32, 64, 4, 2), (32, 32, 4, 2))), **_WIDE},
    "dq": {**dict.fromkeys((64, 128, 256), ((64, 32, 4, 2), (32, 32, 4, 2))), **_WIDE},
}
# float32 on tensor cores, in three products or one of tf32: what does not spill, compiled for sm_80, sm_90 and sm_100.
# Hopper's at D = 64 and 128 are the fastest on an H100: at 128 they spill some 200 bytes a thread, and take 0.5 to 0.9
# of the time of larger tiles that spill less, as more CTAs share a multiprocessor.
_FLOOR32: dict[int, _Sizes] = {1024: ((16, 16, 4, 1),)}
_WIDE_TILES: _Sizes = ((128, 64, 8, 3), (128, 64, 8, 1))
_SPLIT_FLOAT32: dict[str, dict[str, dict[int, _Sizes]]] = {
    "hopper": {
        "fwd": {**dict.fromkeys((64, 128, 256), _WIDE_TILES), 512: ((32, 32, 4, 2),), **_FLOOR32},
        "dkdv": {**dict.fromkeys((64, 128, 256), ((64, 32, 4, 1),)), 512: ((32, 32, 4, 1),), **_FLOOR32},
        "dq": {**dict.fromkeys((64, 128, 256), _WIDE_TILES), 512: ((32, 32, 4, 2),), **_FLOOR32},
    },
    "other": {
        "fwd": {**dict.fromkeys((64, 128, 256), ((32, 64, 4, 1),)), 512: ((32, 32, 4, 1),), **_FLOOR32},
        "dkdv": {**dict.fromkeys((64, 128, 256), ((64, 32, 4, 1),)), 512: ((32, 32, 4, 1),), **_FLOOR32},
        "dq": {**dict.fromkeys((64, 128, 256), ((32, 64, 4, 1),)), 512: ((32, 32, 4, 1),), **_FLOOR32},
    },
}
# Of several branches in one pass on Hopper, by loads, bytes of a row and op: measured on an H100.
_CHAINS_ON_HOPPER = {
    ("descriptor", 128): {
        "fwd": LaunchConfig(64, 128, num_warps=4, num_stages=2, maxnreg=168, loads="descriptor"),
        "dkdv": LaunchConfig(64, 64, num_warps=4, num_stages=2, maxnreg=168, loads="descriptor"),
        "dq": LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="descriptor"),
    },
    ("descriptor", 256): {
        "fwd": LaunchConfig(128, 64, num_warps=8, num_stages=3, loads="descriptor"),
        "dkdv": LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="descriptor"),
        "dq": LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="descriptor"),
    },
    ("pointer", 128): {
        "fwd": LaunchConfig(64, 64, num_warps=4, num_stages=3),
        "dkdv": LaunchConfig(64, 64, num_warps=4, num_stages=1),
        "dq": LaunchConfig(64, 64, num_warps=4, num_stages=3),
    },
}
# In Gluon, as measured on an H100 (CONTRIBUTING.md).
_RINGS_OF_CHAINS = {
    64: {
        "fwd": LaunchConfig(64, 128, num_warps=4, num_stages=2, maxnreg=168, loads="ring"),
        "dkdv": LaunchConfig(64, 64, num_warps=4, num_stages=2, maxnreg=168, loads="ring"),
        "dq": LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),
    },
    128: {
        "fwd": LaunchConfig(128, 128, num_warps=8, num_stages=2, loads="ring"),
        "dkdv": LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),
        "dq": LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"),
    },
}
_FAMILIES = {"sm_90": "hopper", **dict.fromkeys(("sm_80", "sm_87", "sm_100", "sm_103", "gfx950"), "large")}


def default(
    op: str,
    head_dim: int,
    dtype: str,
    queries: int,
    keys: int,
    arch: str,
    *,
    pairs: int | None = None,
    causal: bool = False,
    ordered: bool = False,
    ragged: bool = False,
) -> list[LaunchConfig]:
    """Untuned configurations, best first; the caller takes the first that fits its device and has a text.

    Args:
        op: "fwd", "dkdv" or "dq".
        head_dim: D.
        dtype: "bf16", "fp16" or "fp32".
        queries: Query rows of a whole segment.
        keys: Key rows of a whole segment.
        arch: What Triton compiles for; one that is not in the tables gets the small tiles.
        pairs: Segments times heads times sequences; None is many.
        causal: Of the keys of a tile of queries those in the last tile are half in vain: smaller tiles waste less.
        ordered: Along an order.
        ragged: Tiles have tails of rows.
    """
    row_bytes = padded_head_dim(head_dim) * _operand_bytes(dtype, arch)
    if _splits(dtype, arch):
        sizes = _SPLIT_FLOAT32["hopper" if arch == "sm_90" else "other"][op][row_bytes]
    elif _operand_bytes(dtype, arch) == 4:
        sizes = _FLOAT32[op][row_bytes]
    else:
        table = _TABLES[_FAMILIES.get(arch, "small")][op]
        unpadded = head_dim * _operand_bytes(dtype, arch)
        sizes = table[min(most for most in table if unpadded <= most)]
        if causal and arch == "sm_90" and op == "fwd" and row_bytes <= 128:
            sizes = (_CAUSAL_ON_HOPPER, *sizes)
        looked_up = (ragged or (ordered and op == "fwd")) and (keys > 64 or row_bytes > 128)
        if arch == "sm_90" and looked_up and row_bytes in _LOOKED_UP_ON_HOPPER[op]:
            sizes = (_LOOKED_UP_ON_HOPPER[op][row_bytes], *sizes)
    described: list[LaunchConfig] = []
    if arch == "sm_90" and min(queries, keys) >= DESCRIBED_ROWS:
        tiles = _FORWARD_ALONG_ORDERS_ON_HOPPER if ordered and op == "fwd" else _RINGS_ON_HOPPER[op]
        rings = tiles.get(row_bytes, ()) if takes_rings(arch, head_dim, dtype) else ()
        if op == "dq" and row_bytes == 128 and are_few(pairs, max(queries, keys)):
            rings = tuple(replace(config, block_n=128) for config in rings)
        if not suits_a_producer(min(queries, keys), pairs, causal):
            rings = tuple(config for config in rings if config.loads != "producer")
        if op != "dkdv" and head_dim != padded_head_dim(head_dim) and min(queries, keys) < PADDED_ROWS:
            rings = ()
        by_descriptor = takes_descriptors(arch, head_dim, dtype)
        described = [*rings, *(_DESCRIBED_ON_HOPPER[op].get(row_bytes, ()) if by_descriptor else ())]
    configs = [_shrunk(LaunchConfig(*size), queries, keys, padded_head_dim(head_dim)) for size in sizes]
    return list(dict.fromkeys((*described, *configs)))


def default_of_chain(op: str, head_dim: int, dtype: str, rows: int, arch: str) -> list[LaunchConfig]:
    """Untuned configurations of several branches in one pass, best first: tiles that divide the rows of a class.

    Args:
        op: As in `default`; so are the others.
        head_dim: As there.
        dtype: As there.
        rows: Rows of a class in the narrowest segment.
        arch: As there.
    """
    loads = "descriptor" if takes_descriptors(arch, head_dim, dtype) else "pointer"
    measured = _CHAINS_ON_HOPPER.get((loads, padded_head_dim(head_dim) * DTYPE_BYTES[dtype]), {})
    best = [measured[op]] if arch == "sm_90" and op in measured else []
    rings = [_RINGS_OF_CHAINS[padded_head_dim(head_dim)][op]] if takes_rings(arch, head_dim, dtype) else []
    alone = (config for config in default(op, head_dim, dtype, rows, rows, arch) if config.loads == "pointer")
    others = (replace(config, loads=loads) for config in alone)
    configs = [*rings, *best, *others]
    return [config for config in configs if rows % config.block_m == 0 and rows % config.block_n == 0]


def default_of_all_gradients(head_dim: int, dtype: str, queries: int, keys: int, arch: str) -> list[LaunchConfig]:
    """Where a search for a launch that gives dq, dk and dv begins: one tile that holds a segment; none if none can.

    Args:
        head_dim: As in `default`; so are the others.
        dtype: As there.
        queries: As there.
        keys: As there.
        arch: As there.
    """
    rows = max(queries, keys)
    if rows > ONE_TILE_ROWS:
        return []
    block_m, block_n = (max(next_power_of_two(side), 16) for side in (queries, keys))
    if dtype == "fp32" and arch == "sm_90" and keys > 64:
        block_m = min(block_m, 32)  # 0.57 and 0.60 of the time of 128, on an H100
    # In 16 bits four warps hold the sums of 64 keys: 0.70 and 1.00 of eight's time, on an H100.
    wide = rows if dtype == "fp32" else keys
    in_triton = LaunchConfig(block_m, block_n, num_warps=8 if wide > 64 else 4, num_stages=1)
    ring = _ALL_GRADIENTS_ON_HOPPER.get((keys, head_dim)) if takes_rings(arch, head_dim, dtype) else None
    return [in_triton] if ring is None else [ring, in_triton]


def takes_descriptors(arch: str, head_dim: int, dtype: str) -> bool:
    """Tiles are loaded by tensor descriptors: the hardware has them, and no padding column would be a neighbour's."""
    hardware = arch == "interpreter" or (arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90)
    return hardware and head_dim == padded_head_dim(head_dim) and dtype in ("bf16", "fp16")


def takes_rings(arch: str, head_dim: int, dtype: str) -> bool:
    """There are texts in Gluon: for Hopper's tensor cores."""
    return arch == "sm_90" and head_dim in RING_HEAD_DIMS and dtype in ("bf16", "fp16")


def are_few(pairs: int | None, rows: int, sms: int = 132) -> bool:
    """So few tiles that the last of them leave multiprocessors idle: an H100's, unless told how many there are."""
    return pairs is not None and pairs * rows <= FEW_ROWS * sms


def suits_a_producer(rows: int, pairs: int | None, causal: bool) -> bool:
    """There are enough tiles for CTAs that stay."""
    return rows >= PRODUCED_ROWS[causal] and (pairs is None or pairs >= PRODUCED_PAIRS[causal])


def reads_gluon(triton: str | None) -> bool:
    """This version of Triton is known to compile the texts in Gluon; None, where there is none, is taken as known."""
    return triton is None or _minor(GLUON[0]) <= _minor(triton) <= _minor(GLUON[1])


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def shared_bytes(op: str, head_dim: int, dtype: str, config: LaunchConfig, arch: str) -> int:
    """An upper estimate of the shared memory that a block takes, in bytes, after what Triton 3.7 allocates.

    Tiles that stay for the whole loop (q, or k and v, or q and dout) are counted once, those that the loop loads as
    often as the pipeline buffers them; P or dS passes through shared memory from one product to the next, unless the
    tensor cores take it from registers; lse and delta are buffered like tiles.
    """
    if config.loads in IN_GLUON:
        stay, loop = (config.block_n, config.block_m) if op == "dkdv" else (config.block_m, config.block_n)
        tiles = stay * (1 if op == "fwd" else 2) + 2 * loop * config.num_stages
        if op == BACKWARD:  # four tensors of a segment, dS on its way to dq, and a result on its way out
            width = (4 * config.num_stages + 1) * padded_head_dim(head_dim) + config.block_m
            return config.block_n * width * DTYPE_BYTES[dtype] + RING_BARRIERS
        # Beside a producer, out passes from one layout to the other while the next tiles come in.
        out = config.block_m if config.loads == "producer" else 0
        rows = 8 * loop * config.num_stages if op == "dkdv" else 0  # lse and delta come with the queries
        return (tiles + out) * padded_head_dim(head_dim) * DTYPE_BYTES[dtype] + rows + RING_BARRIERS
    if op == BACKWARD and config.num_stages == 1 and config.loads == "pointer":
        return shared_bytes("dkdv", head_dim, dtype, config, arch)  # dq goes from registers to memory
    if op == BACKWARD:
        between = config.block_m * config.block_n * _operand_bytes(dtype, arch)
        # The dq of fewer rows than a warpgroup takes is rearranged on its way.
        dq = config.block_m * padded_head_dim(head_dim) * 4 * (2 if config.block_m < 64 else 1)
        return shared_bytes("dkdv", head_dim, dtype, config, arch) + between + dq
    backward = op != "fwd"
    stages = 1 if arch == "sm_75" else config.num_stages  # it has no asynchronous copies to pipeline
    size = _operand_bytes(dtype, arch)
    row = padded_head_dim(head_dim) * size
    stay, loop = (config.block_n, config.block_m) if op == "dkdv" else (config.block_m, config.block_n)
    between = config.block_m * (config.block_n + 8) * size
    vectors = 16 * (stages - 1) * loop if backward else 0
    if arch.startswith("gfx"):
        # What stays is kept in registers, and passes through shared memory before the loop starts.
        buffers = max(2 * stages - 2, 1)
        return max(stay * row, buffers * loop * row + between) + vectors
    held = 2 * stay if backward else stay
    if _splits(dtype, arch):
        # Each operand lies there in two halves; one product of tf32 reads the tiles of many queries from both sides.
        sides = held + 4 * loop if op == "dkdv" and loop >= 128 else 0
        return max(2 * (held + stages * loop), sides) * row + vectors + (4 * loop if sides else 0)
    if stages == 1:
        # Descriptors load to shared memory alone, so both tiles of a turn lie there.
        buffers = {"fwd": 2 if config.loads == "descriptor" else 1, "dkdv": 3, "dq": 2}[op]
        between = 0 if backward else between
    elif arch in ("sm_90", "sm_100", "sm_103") and stay >= 64:
        # These tensor cores read the buffers themselves: one more is in use.
        buffers = 2 * stages + (2 if backward and arch != "sm_90" else 0)
        between = 4096
    else:
        buffers = 2 * stages - 2
    barriers = 64 if arch in ("sm_100", "sm_103") else 0  # of its tensor cores, which run by themselves
    return (held + buffers * loop) * row + between + vectors + barriers


def has_tensor_cores_for_float32(arch: str) -> bool:
    """The architecture's tensor cores take tf32: NVIDIA's from Ampere on."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 80


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a kernel's tiles are wide."""
    return max(next_power_of_two(head_dim), 16)


def _operand_bytes(dtype: str, arch: str) -> int:
    """Bytes of a number as a product takes it: Triton has no tensor cores on Turing and widens float16 to float32."""
    return 4 if arch == "sm_75" else DTYPE_BYTES[dtype]


def _splits(dtype: str, arch: str) -> bool:
    """Products of this dtype are taken by tensor cores in halves of its operands."""
    return dtype == "fp32" and has_tensor_cores_for_float32(arch)


def _shrunk(config: LaunchConfig, queries: int, keys: int, width: int) -> LaunchConfig:
    """No tile larger than its segment, and no more warps than what is left of it has work for."""
    block_m = min(config.block_m, max(next_power_of_two(queries), 16))
    block_n = min(config.block_n, max(next_power_of_two(keys), 16))
    if (block_m, block_n) == (config.block_m, config.block_n):
        return config
    warps = min(config.num_warps, max(block_m * max(block_n, width) // 1024, 1))
    return LaunchConfig(block_m, block_n, num_warps=warps, num_stages=config.num_stages)
