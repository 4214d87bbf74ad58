// Codes of keys' importance to blocks of rows: `gpu.importance.code` defines them, this is for sm_90.
//
// grid (multiprocessors,), 384 threads.  A producer group asks for tiles of 128 keys, whole boxes of a tensor map; two
// consumer groups score 64 keys each against 128 representative rows, R of each of LINES blocks of rows, and write a
// byte per key and block.  The rows lie in such an order that a thread of the product holds all R scores of a key for a
// block: nothing is exchanged.
//
// Compiled with: D (64 or 128), BF16, R representative rows (2, 4, 8, 16 or 32), CAUSAL, STAGES.

#include "hopper.cuh"

constexpr int LINES = 128 / R;     // blocks of rows that a program takes at once
constexpr int SLOTS = LINES / 4;   // of them, those whose scores a thread holds
constexpr int CHUNK = 32;          // tiles of keys that a program takes at once

struct alignas(64) Map { u8 bytes[128]; };

struct Arguments {
  Map map;                         // of the keys, (B, heads / groups, keys, D), in boxes of 128 by 64, swizzled as tiles are
  const u16 *q;
  const float *sums, *shares;      // (many, lines, R) base-2 log-sums; (many, keys / 128, lines) squares
  const signed char *far;          // (B * heads / groups, keys up to whole blocks)
  u8 *codes;                       // (many, lines, room)
  int *counter;                    // zero
  i64 q_b, q_h, q_m;
  int rows, keys, heads, groups, first_head, many, lines, room;
  float scale;
};

struct Shared {
  alignas(1024) u8 k[STAGES][TILE];
  alignas(1024) u8 q[TILE];
  alignas(16) u16 out[2][2][LINES][32 + 8];  // by group and turn: of keys r and r + 8 of 16
  alignas(16) float share[STAGES][LINES];
  alignas(16) signed char far[STAGES][KEYS];
  int item;
  alignas(8) u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared) + 1024;

// Some tiles of keys of a head, and the blocks of rows that they are scored for.
struct Item {
  int local, head, line, first, stop, group;  // keys first .. stop
  bool there;

  __device__ __forceinline__ Item(const Arguments &a, int item) {
    const int groups = (a.lines + LINES - 1) / LINES, chunks = (a.room + KEYS * CHUNK - 1) / (KEYS * CHUNK);
    local = item / (groups * chunks);
    there = local < a.many;
    head = a.first_head + local;
    group = groups - 1 - item % groups;
    line = group * LINES;
    first = item / groups % chunks * (KEYS * CHUNK);
    const int last = min(line + LINES, a.lines) - 1;
    stop = min((a.keys - a.rows + last * ROWS) / KEYS * KEYS, first + KEYS * CHUNK);
  }
  __device__ __forceinline__ int tiles() const { return (max(stop - first, 0) / KEYS + 1) / 2 * 2; }  // in twos: one too many may be no block's
};

// Where the representative row of a column of the product lies: row `of` of block `line`.
__device__ __forceinline__ void column(int i, int &line, int &of) {
  const int j = i / 8;
  line = j / (R / 2) * 4 + i % 8 / 2, of = j % (R / 2) * 2 + i % 2;
}

// Powers of two min(2^x, 1) of two numbers at once, within 3 %: the bits of bfloat16s, linear between whole exponents.
// The arguments are (x + BIAS) / 127; sums of them in bfloat16 keep the three bits that a code has of them.
constexpr float BIAS = 127.f - 0.043f, MAGIC = 12582912.f;  // whose last 16 bits are zero, and whose units are 1
__device__ __forceinline__ float within(float x, float factor, float y) {  // 0 .. 1
  float t; asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(t) : "f"(x), "f"(factor), "f"(y)); return t;
}
__device__ __forceinline__ u32 powers(float low, float high) {
  constexpr float UNITS = 127.f * 128.f;
  return __byte_perm(__float_as_uint(fmaf(low, UNITS, MAGIC)), __float_as_uint(fmaf(high, UNITS, MAGIC)), 0x5410);
}
__device__ __forceinline__ u32 plus(u32 a, u32 b) { u32 y; asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); return y; }
__device__ __forceinline__ u32 plus_product(u32 a, u32 b, u32 c) {  // a b + c
  u32 y; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c)); return y;
}

__device__ __forceinline__ void produce(const Arguments &a, Shared &s) {
  const int thread = threadIdx.x;
  const Gather gather(thread);
  int round = 0;
  for (int turn = 0;; turn++) {
    await(s.q_empty, (turn & 1) ^ 1);
    if (thread == 0) {
      int item = atomicAdd(a.counter, 1);
      while (Item(a, item).there && Item(a, item).tiles() == 0) item = atomicAdd(a.counter, 1);
      s.item = item;
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
    const Item item(a, s.item);
    if (item.there) {
      int line, of;
      column(gather.listed, line, of);
      line = min(item.line + line, a.lines - 1);
      const int row = CAUSAL ? max(line * ROWS - of * (ROWS / R), 0) : min(line * ROWS + (2 * of + 1) * (ROWS / 2) / R, a.rows - 1);
      gather(address(s.q), a.q + item.head / a.heads * a.q_b + item.head % a.heads * a.q_h, 2 * (u32)a.q_m, row);
    }
    arrive_copied(s.q_full);
    if (thread == 0) arrive(s.q_full);
    if (!item.there) return;

    const float *shares = a.shares + (i64)item.local * (a.keys / KEYS) * a.lines + item.line;
    const signed char *far = a.far + (i64)(item.head / a.groups) * ((a.keys + KEYS - 1) / KEYS * KEYS);
    for (int tile = 0; tile < item.tiles(); tile++, round++) {
      const int stage = round % STAGES, first = min(item.first + KEYS * tile, item.stop - KEYS);
      await(s.k_empty[stage], (round / STAGES & 1) ^ 1);
      if (thread == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(&s.k_full[stage])), "r"(TILE) : "memory");
        for (int half = 0; half < HALVES; half++)
          asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
              ::"r"(address(s.k[stage]) + half * (ROWS * 128)), "l"(&a.map), "r"(address(&s.k_full[stage])), "r"(64 * half), "r"(first),
              "r"(item.head % a.heads / a.groups), "r"(item.head / a.heads) : "memory");
      }
      if (thread < LINES) {
        const int bytes = item.line + thread < a.lines ? 4 : 0;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address(&s.share[stage][thread])), "l"(shares + (i64)(first / KEYS) * a.lines + (bytes ? thread : 0)), "r"(bytes) : "memory");
      }
      if (thread < KEYS / 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(&s.far[stage][4 * thread])), "l"(far + first + 4 * thread) : "memory");
      arrive_copied(s.k_full[stage]);
    }
  }
}

__device__ __forceinline__ void consume(const Arguments &a, Shared &s) {
  const int thread = threadIdx.x - 128, group = thread / 128, warp = thread / 32 % 4, lane = thread % 32, r = lane / 4, c = lane % 4;
  const int base = 64 * group + 16 * warp + r;  // a thread has keys base and base + 8
  const float factor = 2.f * a.scale * LOG2E / 127.f;
  constexpr u32 PART = (127 - (R == 2 ? 1 : R == 4 ? 2 : R == 8 ? 3 : R == 16 ? 4 : 5)) * 0x00800080;  // twice 1 / R
  float even[64], odd[64], less[32];  // scores of two tiles; what their columns take off
  int round = 0;
  for (int turn = 0;; turn++) {
    await(s.q_full, turn & 1);
    const Item item(a, s.item);
    if (!item.there) return;
    see_copies();
    #pragma unroll
    for (int i = 0; i < 32; i++) {
      int line, of;
      column(8 * (i / 2) + 2 * c + i % 2, line, of);
      line += item.line;
      less[i] = (BIAS - (line < a.lines ? 2.f * a.sums[((i64)item.local * a.lines + line) * R + of] : 0.f)) / 127.f;
    }
    auto multiply = [&](float (&score)[64], int at) {
      const int stage = at % STAGES;
      await(s.k_full[stage], at / STAGES & 1);
      pinned(score);
      begin();
      #pragma unroll
      for (int i = 0; i < D / 16; i++) {
        const u32 from = i / 4 * (ROWS * 128) + i % 4 * 32;
        product(score, descriptor(address(s.k[stage]) + 8192 * group + from), descriptor(address(s.q) + from), i > 0);
      }
      commit();
    };
    auto write = [&](float (&score)[64], int at, int first) {  // what was multiplied; its keys may be forgotten
      const int stage = at % STAGES;
      pinned(score);
      u32 share[SLOTS];  // twice, as bfloat16s
      #pragma unroll
      for (int i = 0; i < SLOTS; i++) share[i] = __byte_perm(__float_as_uint(s.share[stage][4 * i + c]), 0, 0x3232);
      const u32 far = __byte_perm(s.far[stage][base] + 223 - 4 * 127, s.far[stage][base + 8] + 223 - 4 * 127, 0x5410);
      __syncwarp();
      if (lane == 0) arrive(s.k_empty[stage]);
      u16 (*out)[32 + 8] = s.out[group][at & 1];
      #pragma unroll
      for (int i = 0; i < SLOTS; i++) {
        u32 square = 0;
        #pragma unroll
        for (int j = 0; j < R; j++) {
          const int column = i * (R / 2) + j / 2;  // eights of columns
          const float y = less[2 * column + j % 2], *x = score + 4 * column + j % 2;
          const u32 both = powers(within(x[0], factor, y), within(x[2], factor, y));
          square = j ? plus(square, both) : both;
        }
        const u32 found = __viaddmin_s16x2_relu(plus_product(square, PART, share[i]) >> 5 & 0x07FF07FF, far, 0x00FF00FF);
        out[4 * i + c][8 * warp + r] = (u16)__byte_perm(found, 0, 0x4420);
      }
      asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
      for (int i = thread % 128; i < LINES * 4; i += 128) {
        const int line = item.line + i / 4, part = i % 4 * 16;
        if (line < a.lines && first < (a.keys - a.rows + line * ROWS) / KEYS * KEYS)
        {
          const uint4 x = *(const uint4 *)&out[i / 4][part / 2];  // keys 0, 8, 1, 9, ..
          *(uint4 *)(a.codes + ((i64)item.local * a.lines + line) * a.room + first + 64 * group + part) =
              make_uint4(__byte_perm(x.x, x.y, 0x6420), __byte_perm(x.z, x.w, 0x6420), __byte_perm(x.x, x.y, 0x7531), __byte_perm(x.z, x.w, 0x7531));
        }
      }
    };
    const int tiles = item.tiles();
    for (int tile = 0; tile < tiles; tile += 2) {  // the second is multiplied while the first is written
      multiply(even, round + tile);
      multiply(odd, round + tile + 1);
      finish<1>();
      write(even, round + tile, item.first + KEYS * tile);
      finish<0>();
      write(odd, round + tile + 1, item.first + KEYS * (tile + 1));
    }
    round += tiles;
    __syncwarp();
    if (lane == 0) arrive(s.q_empty);  // its products have ended
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) importance(const __grid_constant__ Arguments a) {
  extern __shared__ u8 memory[];
  Shared &s = *reinterpret_cast<Shared *>(memory + (-address(memory) & 1023));  // known to lie in shared memory
  if (threadIdx.x == 0) {
    initialise(s.q_full, 129), initialise(s.q_empty, 8);
    for (int i = 0; i < STAGES; i++) initialise(s.k_full[i], 129), initialise(s.k_empty[i], 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  after_predecessor();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    produce(a, s);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    consume(a, s);
  }
}
