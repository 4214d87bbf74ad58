// Attention of a prompt's rows over lists that blocks of 128 rows share: `gpu.listed` defines it, this is for sm_90.
//
// grid (multiprocessors,), 384 threads.  A producer group asks for keys and values, wherever they lie, 16 bytes at a
// time, into a ring of tiles in shared memory, laid out as wgmma wants them (128-byte swizzle); two consumer groups of
// 64 rows each take scores, weights and sums.  Programs take blocks of rows from a counter, the longest first.
//
// Compiled with: D width of keys and values (64 or 128), BF16, TOKENS, BLOCKS, MEANS: which lists there are, STAGES.

#include "hopper.cuh"

struct Arguments {
  const u16 *q, *k, *v, *mean_k, *mean_v; u16 *output; float *lse;
  const int *q_sizes, *k_sizes;              // (B,) or null: all alike
  const i64 *token_starts; const int *tokens; const float *log_weights;
  const i64 *block_starts; const int *blocks;
  const i64 *mean_starts; const int *means;
  int *counter;                              // zero
  i64 q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m;
  int rows, keys, heads, groups, lines, all; // all = B * heads, lines blocks of rows each
  float scale;
};

struct Shared {
  alignas(1024) u8 k[STAGES][TILE];
  alignas(1024) u8 v[STAGES][TILE];
  alignas(1024) u8 q[TILE];
  alignas(16) float bias[STAGES][KEYS];
  int item;
  alignas(8) u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared) + 1024;

// A block of rows of a head, and the tiles that it attends to: the band, tokens, blocks, means.
struct Item {
  int head, batch, inner, first, many, shift, edge, end, banded, tokened, blocked, meaned, count, mean_count;
  i64 token, block, mean;

  __device__ __forceinline__ Item(const Arguments &a, int item) {
    const int each = a.groups * a.lines, source = item / each, left = item % each;  // a key-value head's items
    head = source * a.groups + left % a.groups;
    batch = head / a.heads, inner = head % a.heads;
    const int line = a.lines - 1 - left / a.groups;
    first = line * ROWS;
    many = a.q_sizes ? a.q_sizes[batch] : a.rows;
    const int size = a.k_sizes ? a.k_sizes[batch] : a.keys;
    shift = size - many;
    edge = (shift + first) / KEYS * KEYS;
    end = min(shift + first + ROWS, size);
    const bool here = first < many;
    const i64 at = (i64)head * a.lines + line;
    banded = here ? (end - edge + KEYS - 1) / KEYS : 0;
    tokened = blocked = meaned = count = mean_count = 0;
    token = block = mean = 0;
    if (TOKENS && here) token = a.token_starts[at], count = (int)(a.token_starts[at + 1] - token), tokened = (count + KEYS - 1) / KEYS;
    if (BLOCKS && here) block = a.block_starts[at], blocked = (int)(a.block_starts[at + 1] - block);
    if (MEANS && here) mean = a.mean_starts[at], mean_count = (int)(a.mean_starts[at + 1] - mean), meaned = (mean_count + KEYS - 1) / KEYS;
  }
  __device__ __forceinline__ int tiles() const { return banded + tokened + blocked + meaned; }
};

__device__ __forceinline__ void produce(const Arguments &a, Shared &s) {
  const int thread = threadIdx.x;
  const Gather gather(thread);
  int round = 0;
  for (int turn = 0;; turn++) {
    await(s.q_empty, (turn & 1) ^ 1);
    if (thread == 0) s.item = atomicAdd(a.counter, 1);
    asm volatile("bar.sync 1, 128;" ::: "memory");
    const int taken = s.item;
    if (taken >= a.all * a.lines) {
      arrive(s.q_full);
      if (thread == 0) arrive(s.q_full);
      return;
    }
    const Item item(a, taken);
    const u16 *queries = a.q + item.batch * a.q_b + item.inner * a.q_h;
    gather(address(s.q), queries, 2 * (u32)a.q_m, min(item.first + gather.listed, a.rows - 1));  // rows beyond are not stored
    arrive_copied(s.q_full);
    if (thread == 0) arrive(s.q_full);

    const u16 *keys = a.k + item.batch * a.k_b + item.inner / a.groups * a.k_h, *values = a.v + item.batch * a.v_b + item.inner / a.groups * a.v_h;
    const int tiles = item.tiles();
    auto index = [&](int tile) {
      int t = tile;
      if (t < item.banded) return min(item.edge + KEYS * t + gather.listed, item.end - 1);
      t -= item.banded;
      if (TOKENS && t < item.tokened) return a.tokens[item.token + min(KEYS * t + gather.listed, item.count - 1)];
      t -= item.tokened;
      if (BLOCKS && t < item.blocked) return a.blocks[item.block + t] * KEYS + gather.listed;
      t -= item.blocked;
      return MEANS && t < item.meaned ? a.means[item.mean + min(KEYS * t + gather.listed, item.mean_count - 1)] : 0;
    };
    int next = index(0);
    for (int tile = 0; tile < tiles; tile++, round++) {
      const int mine = next, stage = round % STAGES, parity = (round / STAGES & 1) ^ 1;
      next = index(tile + 1);
      const u16 *k = keys, *v = values;
      u32 k_n = 2 * (u32)a.k_n, v_n = 2 * (u32)a.v_n;  // bytes
      if (MEANS && tile >= item.banded + item.tokened + item.blocked) {
        const i64 from = ((i64)item.batch * (a.heads / a.groups) + item.inner / a.groups) * (a.keys / KEYS) * D;
        k = a.mean_k + from, v = a.mean_v + from, k_n = v_n = 2 * D;
      }
      await(s.k_empty[stage], parity);
      gather(address(s.k[stage]), k, k_n, mine);
      if (TOKENS && tile >= item.banded && tile < item.banded + item.tokened) {
        const int t = KEYS * (tile - item.banded) + thread;
        const int bytes = t < item.count ? 4 : 0;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address(&s.bias[stage][thread])), "l"(a.log_weights + item.token + (bytes ? t : 0)), "r"(bytes) : "memory");
      }
      arrive_copied(s.k_full[stage]);
      await(s.v_empty[stage], parity);
      gather(address(s.v[stage]), v, v_n, mine);
      arrive_copied(s.v_full[stage]);
    }
  }
}

__device__ __forceinline__ void consume(const Arguments &a, Shared &s) {
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int base = 64 * group + 16 * warp;  // first row of this warp; a thread has rows base + r and base + r + 8
  const float factor = a.scale * LOG2E;
  u32 q[D / 16][4], p[KEYS / 16][4];
  float score[64], out[D / 2];
  int round = 0;
  for (int turn = 0;; turn++) {
    await(s.q_full, turn & 1);
    const int taken = s.item;
    if (taken >= a.all * a.lines) return;
    const Item item(a, taken);
    #pragma unroll
    for (int i = 0; i < D / 16; i++)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
          : "=r"(q[i][0]), "=r"(q[i][1]), "=r"(q[i][2]), "=r"(q[i][3]) : "r"(address(s.q) + piece(base + lane % 16, 2 * i + lane / 16)) : "memory");
    __syncwarp();
    if (lane == 0) arrive(s.q_empty);
    const int tiles = item.tiles();
    float top[2] = {-INF, -INF}, total[2] = {}, fade[2];
    #pragma unroll
    for (int i = 0; i < D / 2; i++) out[i] = 0.f;

    auto scores = [&](int at) {
      const int stage = at % STAGES;
      await(s.k_full[stage], at / STAGES & 1);
      see_copies();
      pinned(score);
      begin();
      #pragma unroll
      for (int i = 0; i < D / 16; i++) product<0>(score, q[i], descriptor(address(s.k[stage]) + i / 4 * (ROWS * 128) + i % 4 * 32), i > 0);
      commit();
    };
    auto sums = [&](int at) {
      const int stage = at % STAGES;
      await(s.v_full[stage], at / STAGES & 1);
      see_copies();
      pinned(out);
      begin();
      #pragma unroll
      for (int i = 0; i < KEYS / 16; i++) product<1>(out, p[i], descriptor(address(s.v[stage]) + i * 2048), 1);
      commit();
    };
    auto weigh = [&](int tile, int at) {  // scores -> weights relative to the new largest, in place
      const int stage = at % STAGES;
      const bool band = tile < item.banded, token = TOKENS && !band && tile < item.banded + item.tokened;
      const int meant = tile - item.banded - item.tokened - item.blocked;
      const int valid = token ? item.count - KEYS * (tile - item.banded) : MEANS && meant >= 0 ? item.mean_count - KEYS * meant : KEYS;
      #pragma unroll
      for (int i = 0; i < 16; i++) {
        float2 bias = make_float2(0.f, 0.f);
        if (token) bias = *(const float2 *)&s.bias[stage][8 * i + 2 * c];
        if (MEANS && meant >= 0) bias = make_float2(7.f * LN2, 7.f * LN2);  // ln KEYS
        #pragma unroll
        for (int h = 0; h < 2; h++) {
          score[4 * i + 2 * h] = fmaf(score[4 * i + 2 * h], factor, bias.x * LOG2E);
          score[4 * i + 2 * h + 1] = fmaf(score[4 * i + 2 * h + 1], factor, bias.y * LOG2E);
        }
      }
      __syncwarp();
      if (lane == 0) arrive(s.k_empty[stage]);
      if (band || valid < KEYS) {
        #pragma unroll
        for (int h = 0; h < 2; h++) {
          const int seen = band ? item.shift + item.first + base + r + 8 * h + 1 - item.edge - KEYS * tile : valid;
          #pragma unroll
          for (int i = 0; i < 16; i++) {
            if (8 * i + 2 * c >= seen) score[4 * i + 2 * h] = -INF;
            if (8 * i + 2 * c + 1 >= seen) score[4 * i + 2 * h + 1] = -INF;
          }
        }
      }
      #pragma unroll
      for (int h = 0; h < 2; h++) {
        float high = top[h];
        #pragma unroll
        for (int i = 0; i < 16; i++) high = fmaxf(high, fmaxf(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        fade[h] = exp2_(top[h] - high);
        top[h] = high;
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < 16; i++) {
          score[4 * i + 2 * h] = exp2_(score[4 * i + 2 * h] - high);
          score[4 * i + 2 * h + 1] = exp2_(score[4 * i + 2 * h + 1] - high);
          sum += score[4 * i + 2 * h] + score[4 * i + 2 * h + 1];
        }
        total[h] = fmaf(total[h], fade[h], sum);
      }
    };
    auto packed = [&] {
      #pragma unroll
      for (int i = 0; i < 16; i++)
        #pragma unroll
        for (int h = 0; h < 2; h++) p[i / 2][2 * (i % 2) + h] = pack(score[4 * i + 2 * h], score[4 * i + 2 * h + 1]);
    };
    if (tiles > 0) {
      scores(round);
      finish<0>();
      pinned(score);
      weigh(0, round);
      packed();
      for (int tile = 1; tile < tiles; tile++) {
        scores(round + tile);
        sums(round + tile - 1);
        finish<1>();
        pinned(score);
        weigh(tile, round + tile);
        finish<0>();
        pinned(out);
        if (lane == 0) arrive(s.v_empty[(round + tile - 1) % STAGES]);
        #pragma unroll
        for (int i = 0; i < D / 8; i++)
          #pragma unroll
          for (int h = 0; h < 2; h++) out[4 * i + 2 * h] *= fade[h], out[4 * i + 2 * h + 1] *= fade[h];
        packed();
      }
      sums(round + tiles - 1);
      finish<0>();
      pinned(out);
      __syncwarp();
      if (lane == 0) arrive(s.v_empty[(round + tiles - 1) % STAGES]);
      round += tiles;
    }
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      total[h] += __shfl_xor_sync(~0u, total[h], 1);
      total[h] += __shfl_xor_sync(~0u, total[h], 2);
      const int i = item.first + base + r + 8 * h;
      const bool here = i < item.many;
      const float inverse = here ? 1.f / total[h] : 0.f;
      if (i < a.rows) {
        u16 *to = a.output + item.batch * a.o_b + item.inner * a.o_h + i * a.o_m + 2 * c;
        #pragma unroll
        for (int j = 0; j < D / 8; j++) *(u32 *)(to + 8 * j) = here ? pack(out[4 * j + 2 * h] * inverse, out[4 * j + 2 * h + 1] * inverse) : 0u;
        if (c == 0) a.lse[(i64)item.head * a.rows + i] = here ? (top[h] + __log2f(total[h])) * LN2 : -INF;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) listed(const __grid_constant__ Arguments a) {
  extern __shared__ u8 memory[];
  Shared &s = *reinterpret_cast<Shared *>(memory + (-address(memory) & 1023));  // known to lie in shared memory
  if (threadIdx.x == 0) {
    initialise(s.q_full, 129), initialise(s.q_empty, 8);
    for (int i = 0; i < STAGES; i++) initialise(s.k_full[i], 128), initialise(s.v_full[i], 128), initialise(s.k_empty[i], 8), initialise(s.v_empty[i], 8);
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
