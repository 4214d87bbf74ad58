// Codes of keys' importance to blocks of query rows: `gpu.importance.code` defines them, this is for sm_90.
//
// grid (multiprocessors,), 384 threads.  A producer group asks for tiles of 64 keys, whole boxes of a tensor map; two
// consumer groups score them against 128 representatives each, R of a block of rows of a head, and write a byte per key
// and block.  Heads that read the same keys stand side by side: a *place* is a block of rows and one of them.  They lie
// in such an order that a thread of the product holds all R scores of a key for a place: nothing is exchanged.
//
// Compiled with: D (64 or 128), BF16, R representatives (1, 2, 4, 8, 16 or 32), STAGES.

#include "hopper.cuh"

constexpr int GROUPS = 2, HALF = 64;  // consumers; keys of a tile
constexpr int PLACES = 128 / R;       // of a consumer
constexpr int ALL = GROUPS * PLACES;
constexpr int SLOTS = PLACES / 4;     // of a consumer's places, those whose scores a thread holds
constexpr int PIECES = PLACES > 32 ? PLACES / 32 : 1;  // 16 codes each that a thread writes of a tile
constexpr int PAIR = R > 1 ? 2 : 1;   // representatives of a place in neighbouring columns of the product
constexpr int EACH = 2 / PAIR;        // places of a thread's two columns of eight
constexpr int TURNS = R > 1 ? 2 : 1;  // tiles of codes that wait to be written: for two there may be no room
static_assert(ROWS == KEYS);          // every line has a block of keys more than the one before

struct alignas(64) Map { u8 bytes[128]; };

struct Arguments {
  Map map;                         // of the keys, (B, heads / groups, keys, D), in boxes of 64 by 64, swizzled as tiles are
  const u16 *queries;              // (many, lines, R, D)
  const float *sums, *shares;      // (many, lines, R) base-2 log-sums; (many, keys / 128, lines) squares
  const signed char *far;          // (B * heads / groups, keys up to whole blocks)
  u8 *codes;                       // (many, lines, room)
  int *counter;                    // zero
  int rows, keys, heads, groups, first_head, many, lines, room;
  int together, chunk;             // heads side by side, of the many at work; keys that a program takes at once
  float scale;
};

struct Item { int bundle, place, first, stop; };  // places from `place` on of some heads side by side, keys first .. stop

struct Shared {
  alignas(1024) u8 q[2][GROUPS][TILE];
  alignas(1024) u8 k[STAGES][TILE / 2];
  alignas(16) u16 out[GROUPS][TURNS][PLACES][HALF / 2 + 8];  // of keys r and r + 8 of 16
  alignas(16) float sums[2][128 * GROUPS];
  alignas(16) float share[STAGES][ALL];
  alignas(16) signed char far[STAGES][HALF];
  Item item[2];
  alignas(8) u64 q_full[2], q_empty[2], k_full[STAGES], k_empty[STAGES];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared) + 1024;

__device__ __forceinline__ int edge(const Arguments &a, int line) { return (a.keys - a.rows + line * ROWS) / KEYS * KEYS; }

// Hands out the items: heads side by side in turn, of these chunks of keys, of these the places that have such keys.
struct Cursor {
  int bundle = 0, chunk = 0, before = 0;  // items before this chunk

  __device__ __forceinline__ static int stop(const Arguments &a, int group) {
    return edge(a, min((group * ALL + ALL - 1) / a.together, a.lines - 1));
  }
  __device__ __forceinline__ int first(const Arguments &a) const {  // line with keys of the chunk
    return max(chunk * (a.chunk / KEYS) - (a.keys - a.rows) / KEYS + 1, 0);
  }
  __device__ __forceinline__ Item next(const Arguments &a, bool begins) {
    const int all = (a.lines * a.together + ALL - 1) / ALL, item = begins ? blockIdx.x : gridDim.x + atomicAdd(a.counter, 1);
    for (; bundle < a.many / a.together; bundle++, chunk = 0)
      for (; first(a) < a.lines; chunk++) {
        const int here = all - first(a) * a.together / ALL;  // groups of places, from the last one on
        if (item < before + here) {
          const int group = all - 1 - (item - before);
          return {bundle, group * ALL, chunk * a.chunk, min(stop(a, group), (chunk + 1) * a.chunk)};
        }
        before += here;
      }
    return {-1, 0, 0, 0};
  }
};

// A consumer asks for products when the other's first ones have ended: while one multiplies, the other writes.
__device__ __forceinline__ void take_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(4 + group) : "memory"); }
__device__ __forceinline__ void give_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(5 - group) : "memory"); }

// Which representative a column of a consumer's product is: `of` of place `place`.
__device__ __forceinline__ void column(int i, int &place, int &of) {
  const int j = i / 8;
  place = j / (R / PAIR) * (8 / PAIR) + i % 8 / PAIR, of = j % (R / PAIR) * PAIR + i % PAIR;
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
  const int thread = threadIdx.x, whole = a.keys / KEYS;
  const Gather gather(thread);
  Cursor cursor;
  int round = 0;
  for (int turn = 0;; turn++) {
    const int now = turn & 1;
    await(s.q_empty[now], (turn / 2 & 1) ^ 1);
    if (thread == 0) s.item[now] = cursor.next(a, turn == 0);
    asm volatile("bar.sync 1, 128;" ::: "memory");
    const Item item = s.item[now];
    if (item.bundle < 0) {
      arrive_copied(s.q_full[now]);
      if (thread == 0) arrive(s.q_full[now]);
      return;
    }
    const int local = item.bundle * a.together, head = a.first_head + local, batch = head / a.heads, inner = head % a.heads;
    #pragma unroll 1
    for (int group = 0; group < GROUPS; group++) {
      i64 at[2];  // of the column that the thread's lane names, and of the thread's own
      #pragma unroll
      for (int i = 0; i < 2; i++) {
        int place, of;
        column(i ? thread : gather.listed, place, of);
        place += item.place + PLACES * group;
        at[i] = ((i64)(local + place % a.together) * a.lines + min(place / a.together, a.lines - 1)) * R + of;
      }
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(&s.sums[now][128 * group + thread])), "l"(a.sums + at[1]) : "memory");
      gather.rows(address(s.q[now][group]), a.queries + at[0] * D);
    }
    arrive_copied(s.q_full[now]);
    if (thread == 0) arrive(s.q_full[now]);

    const float *shares[(ALL + 127) / 128];
    #pragma unroll
    for (int i = 0; i < (ALL + 127) / 128; i++) {
      const int place = item.place + 128 * i + thread, line = min(place / a.together, a.lines - 1);
      shares[i] = a.shares + (i64)(local + place % a.together) * whole * a.lines + line;
    }
    const signed char *far = a.far + (i64)(head / a.groups) * ((a.keys + KEYS - 1) / KEYS * KEYS);
    for (int first = item.first; first < item.stop; first += HALF, round++) {
      const int stage = round % STAGES;
      await(s.k_empty[stage], (round / STAGES & 1) ^ 1);
      if (thread == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(&s.k_full[stage])), "r"(TILE / 2) : "memory");
        for (int half = 0; half < HALVES; half++)
          asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
              ::"r"(address(s.k[stage]) + half * (HALF * 128)), "l"(&a.map), "r"(address(&s.k_full[stage])), "r"(64 * half), "r"(first),
              "r"(inner / a.groups), "r"(batch) : "memory");
      }
      #pragma unroll
      for (int i = 0; i < (ALL + 127) / 128; i++)
        if (thread < ALL)
          asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(&s.share[stage][128 * i + thread])), "l"(shares[i] + (i64)(first / KEYS) * a.lines) : "memory");
      if (thread < HALF / 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(&s.far[stage][4 * thread])), "l"(far + first + 4 * thread) : "memory");
      arrive_copied(s.k_full[stage]);
    }
  }
}

__device__ __forceinline__ void consume(const Arguments &a, Shared &s) {
  const int thread = threadIdx.x - 128, group = thread / 128, warp = thread / 32 % 4, lane = thread % 32, r = lane / 4, c = lane % 4;
  const int base = 16 * warp + r;  // a thread has keys base and base + 8 of a tile
  const float factor = 2.f * a.scale * LOG2E / 127.f;
  constexpr u32 PART = (127 - (R > 1) - (R > 2) - (R > 4) - (R > 8) - (R > 16)) * 0x00800080;  // twice 1 / R
  float even[64], odd[64], less[32];  // scores of two tiles; what their columns take off
  int round = 0;
  if (group == 1) give_turn(group);
  for (int turn = 0;; turn++) {
    const int now = turn & 1;
    await(s.q_full[now], turn / 2 & 1);
    const Item item = s.item[now];
    if (item.bundle < 0) break;
    see_copies();
    #pragma unroll
    for (int i = 0; i < 16; i++) {
      const float2 sums = *(const float2 *)&s.sums[now][128 * group + 8 * i + 2 * c];
      less[2 * i] = (BIAS - 2.f * sums.x) / 127.f, less[2 * i + 1] = (BIAS - 2.f * sums.y) / 127.f;
    }
    u8 *to[PIECES];      // where the thread's codes of a tile go, 16 keys of a place
    int limits[PIECES];  // if these keys are before
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int own = thread % 128 / 4 + 32 * i, place = item.place + PLACES * group + own, line = place / a.together;
      limits[i] = own < PLACES && line < a.lines ? edge(a, line) : 0;
      to[i] = a.codes + ((i64)(item.bundle * a.together + place % a.together) * a.lines + line) * a.room + 16 * (thread % 4);
    }
    const u64 rows = descriptor(address(s.q[now][group])), keys = descriptor(address(s.k));
    auto multiply = [&](float (&score)[64], int at) {
      const int stage = at % STAGES;
      await(s.k_full[stage], at / STAGES & 1);
      pinned(score);
      begin();
      #pragma unroll
      for (int i = 0; i < D / 16; i++)
        product(score, keys + ((u32)stage * (TILE / 2) + i / 4 * (HALF * 128) + i % 4 * 32) / 16, rows + (i / 4 * (ROWS * 128) + i % 4 * 32) / 16, i > 0);
      commit();
    };
    auto write = [&](float (&score)[64], int at, int first) {  // what was multiplied; its keys may be forgotten
      const int stage = at % STAGES;
      pinned(score);
      u32 share[SLOTS / EACH];  // as bfloat16s, one twice or two
      #pragma unroll
      for (int i = 0; i < SLOTS / EACH; i++) {
        const float *own = &s.share[stage][PLACES * group + (4 * i + c) * EACH];
        share[i] = __byte_perm(__float_as_uint(own[0]), __float_as_uint(own[EACH - 1]), 0x7632);
      }
      const u32 far = __byte_perm(s.far[stage][base] + 223 - 4 * 127, s.far[stage][base + 8] + 223 - 4 * 127, 0x5410);
      __syncwarp();
      if (lane == 0) arrive(s.k_empty[stage]);
      u16 (*out)[HALF / 2 + 8] = s.out[group][at % TURNS];
      if (TURNS == 1) asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");  // the tile before is read
      #pragma unroll
      for (int i = 0; i < SLOTS; i++) {
        u32 square = 0;
        #pragma unroll
        for (int j = 0; j < R; j++) {
          const int own = i * R + j;  // of the thread's columns
          const float y = less[own], *x = score + own / 2 * 4 + own % 2;
          const u32 both = powers(within(x[0], factor, y), within(x[2], factor, y));
          square = j ? plus(square, both) : both;
        }
        const u32 twice = EACH == 1 ? share[i] : __byte_perm(share[i / EACH], 0, i % EACH ? 0x3232 : 0x1010);
        const u32 found = __viaddmin_s16x2_relu(plus_product(square, PART, twice) >> 5 & 0x07FF07FF, far, 0x00FF00FF);
        out[(4 * (i / EACH) + c) * EACH + i % EACH][8 * warp + r] = (u16)__byte_perm(found, 0, 0x4420);
      }
      asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
      #pragma unroll
      for (int i = 0; i < PIECES; i++)
        if (first < limits[i]) {
          const uint4 x = *(const uint4 *)&out[thread % 128 / 4 + 32 * i][8 * (thread % 4)];  // keys 0, 8, 1, 9, ..
          *(uint4 *)(to[i] + first) = make_uint4(
              __byte_perm(x.x, x.y, 0x6420), __byte_perm(x.z, x.w, 0x6420), __byte_perm(x.x, x.y, 0x7531), __byte_perm(x.z, x.w, 0x7531));
        }
    };
    for (int first = item.first; first < item.stop; first += KEYS, round += 2) {  // one is multiplied while one is written
      await(s.k_full[round % STAGES], round / STAGES & 1);
      take_turn(group);
      multiply(even, round);
      multiply(odd, round + 1);
      finish<1>();
      give_turn(group);
      write(even, round, first);
      finish<0>();
      write(odd, round + 1, first + HALF);
    }
    __syncwarp();
    if (lane == 0) arrive(s.q_empty[now]);  // its products have ended
  }
  if (group == 0) take_turn(group);  // what the other gave last
}

extern "C" __global__ void __launch_bounds__(384, 1) importance(const __grid_constant__ Arguments a) {
  extern __shared__ u8 memory[];
  Shared &s = *reinterpret_cast<Shared *>(memory + (-address(memory) & 1023));  // known to lie in shared memory
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) initialise(s.q_full[i], 129), initialise(s.q_empty[i], 8);
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
