"""Device functions that several kernels share: planes of codes, codes of keys, hashes, and the span up for sampling."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
BLOCK = tl.constexpr(64)  # keys that are coded together and that share a systematic draw, as on the CPU
LOG2E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(
    24
)  # chances are multiples of 2 ** -UNIT: what is drawn then has exactly the chance it is weighed by


LINE = tl.constexpr(32)  # int32 in a cache line; counters that many programs raise keep apart by that much


@triton.jit
def after_predecessor(PDL: tl.constexpr):
    """Wait for the kernel before this one, whose end this one's start may overlap."""
    if PDL:
        gdc_wait()


@triton.jit
def successor_may_start(PDL: tl.constexpr):
    """Let the next kernel's programs start; they wait for our writes on their own."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def mixed(x):
    """`hsr.lifted_numba.mixed`: uint32 -> uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def generator(seed, step):
    """The key of the generator of a step, from the head's seed; see `hsr.lifted_numba.generators`."""
    return mixed(seed.to(tl.uint32) ^ mixed(step.to(tl.uint32) + 0x7F4A7C15))


@triton.jit
def uniform(key, counter):
    """`hsr.lifted_numba.number`: int32 in 0 .. 2 ** UNIT - 1."""
    return (mixed((counter.to(tl.uint32) * 0x9E3779B1) ^ key) >> 8).to(tl.int32)


@triton.jit
def log2(x, ASM: tl.constexpr):
    """Base-2 logarithm, within 2 ** -22 absolutely: one instruction where Triton's own takes twenty."""
    if ASM:
        found = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        found = tl.log2(x)
    return found


@triton.jit
def entry(x, ASM: tl.constexpr):
    """What `gpu.scan.scan` lists -> a key's id, int32, and the base-2 logarithm of its chance."""
    return (x & 0x7FFFFFFF).to(tl.int32), log2((x >> 32).to(tl.float32), ASM) - UNIT


@triton.jit
def length(LENGTHS, head, room, GROW: tl.constexpr):
    """Tokens of a head in this step; a growing step's token counts from its start on, unless the cache is full."""
    return tl.minimum(tl.load(LENGTHS + head) + GROW, room)


@triton.jit
def span(n, sinks, recent):
    """First and last + 1 of the keys up for sampling: whole blocks but for the sinks, as in `attention.sampled`."""
    start = tl.minimum(n, sinks)
    return start, tl.maximum(tl.maximum(n - recent, 0) // BLOCK * BLOCK, start)


@triton.jit
def places(o, PAGES, batch, most, stride, page_stride, PAGE: tl.constexpr):
    """Offsets, int64, of tokens o of a sequence: every ``stride``, or in pages of PAGE tokens, ``most`` a sequence."""
    if PAGE == 0:
        found = o.to(tl.int64) * stride
    else:
        page = tl.load(PAGES + batch * most + o // PAGE)
        found = page.to(tl.int64) * page_stride + (o % PAGE).to(tl.int64) * stride
    return found


@triton.jit
def plane_pair(p, ASM: tl.constexpr):
    """Bytes as int8 -> low and high nibbles, int8 in 0..15."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;",
            "=r,=r,r",
            [p],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        x = p.to(tl.uint8, bitcast=True)
        low, high = (x & 15).to(tl.int8), (x >> 4).to(tl.int8)
    return low, high


@triton.jit
def plane_four(p, mask, ASM: tl.constexpr):
    """Bytes as int8 -> their four planes; mask is 15 in nibble columns and 3 in the others."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            "and.b32 $0, $4, $5; shr.u32 $1, $4, 4; and.b32 $1, $1, $5; shr.u32 $2, $4, 2; "
            "and.b32 $2, $2, 0x03030303; shr.u32 $3, $4, 6; and.b32 $3, $3, 0x03030303;",
            "=r,=r,=r,=r,r,r",
            [p, mask],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        x = p.to(tl.uint8, bitcast=True)
        m = mask.to(tl.uint8, bitcast=True)
        a, b = (x & m).to(tl.int8), ((x >> 4) & m).to(tl.int8)
        c, d = ((x >> 2) & 3).to(tl.int8), ((x >> 6) & 3).to(tl.int8)
    return a, b, c, d


@triton.jit
def column_mask(R: tl.constexpr, NIBBLES: tl.constexpr, KEYS: tl.constexpr):
    """(KEYS, R) int8: what `plane_four` masks by."""
    r = tl.arange(0, R)
    return tl.broadcast_to(tl.where(r < NIBBLES, 15, 3).to(tl.int8)[None, :], (KEYS, R))
