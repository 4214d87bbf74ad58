// Attention of a prompt's rows over lists that blocks of 128 rows share: `gpu.listed` defines it, this is for sm_90.
//
// grid (multiprocessors,), 384 threads.  A producer group asks for keys and values, wherever they lie, 16 bytes at a
// time, into a ring of tiles in shared memory, laid out as wgmma wants them (128-byte swizzle); two consumer groups of
// 64 rows each take scores, weights and sums.  Programs take blocks of rows from a counter, the longest first.
//
// Compiled with: D width of keys and values (64 or 128), BF16, TOKENS, BLOCKS, MEANS: which lists there are, STAGES.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;

constexpr int ROWS = 128, KEYS = 128;
constexpr int TILE = KEYS * D * 2;           // bytes of a tile
constexpr int HALVES = D / 64;               // parts of a row of 128 bytes
constexpr int CHUNKS = D / 8;                // 16-byte pieces of a row
constexpr int ONCE = 32 / CHUNKS;            // rows that a warp asks for at once
constexpr int PASSES = ROWS / (4 * ONCE);
constexpr int BATCH = 4;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
#define INF __int_as_float(0x7F800000)

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

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void initialise(u64 &b, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(&b)), "r"(count) : "memory"); }
__device__ __forceinline__ void arrive(u64 &b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(&b)) : "memory"); }
__device__ __forceinline__ void arrive_copied(u64 &b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address(&b)) : "memory"); }
__device__ __forceinline__ void await(u64 &b, int parity) {
  asm volatile("{.reg .pred p; wait: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra done; bra wait; done: }" ::"r"(address(&b)), "r"(parity) : "memory");
}
__device__ __forceinline__ void copy16(u32 to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
  if (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// Where a row's 16-byte piece lies in a tile: halves of 128-byte rows, pieces exchanged by the row's last three bits.
__device__ __forceinline__ u32 piece(int row, int chunk) { return (chunk >> 3) * (ROWS * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4); }

// A wgmma descriptor of a tile: 128-byte swizzle, 1024 bytes from eight rows to the next, 16 KiB from half to half.
__device__ __forceinline__ u64 descriptor(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | (u64)((ROWS * 128) >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
#define F8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#if BF16
#define KIND "f32.bf16.bf16"
#else
#define KIND "f32.f16.f16"
#endif
// c (64, 128 or 64) += a (64, 16) b; TRANSPOSED: b is (16, N) by rows, else (N, 16) by rows.
template <int TRANSPOSED> __device__ __forceinline__ void product(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16." KIND
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
      " {%64,%65,%66,%67}, %68, p, 1, 1, %70;}"
      : F8(c, 0), F8(c, 8), F8(c, 16), F8(c, 24), F8(c, 32), F8(c, 40), F8(c, 48), F8(c, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
}
template <int TRANSPOSED> __device__ __forceinline__ void product(float (&c)[32], const u32 (&a)[4], u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16." KIND
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
      " {%32,%33,%34,%35}, %36, p, 1, 1, %38;}"
      : F8(c, 0), F8(c, 8), F8(c, 16), F8(c, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
}
template <int N> __device__ __forceinline__ void pinned(float (&c)[N]) {  // in these registers from here on
  #pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void finish() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void see_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

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
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, chunk = lane % CHUNKS;
  const int listed = ONCE * warp + lane % ONCE + 4 * ONCE * (lane / ONCE);  // the row whose index this lane knows
  const u32 own = piece(ONCE * warp + lane / CHUNKS, chunk);  // in every pass alike: passes are whole eights of rows
  auto gather = [&](u32 to, const u8 *from, u32 bytes, int index) {  // rows that the warp's lanes name; a few at a time, so that
    #pragma unroll                                                   // none waits for the one before
    for (int some = 0; some < PASSES; some += BATCH) {
      u64 at[BATCH];
      #pragma unroll
      for (int i = 0; i < BATCH; i++) at[i] = (u64)from + (u64)(u32)__shfl_sync(~0u, index, ONCE * (some + i) + lane / CHUNKS) * bytes;
      #pragma unroll
      for (int i = 0; i < BATCH; i++)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + (some + i) * 4 * ONCE * 128), "l"(at[i]) : "memory");
    }
  };
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
    #pragma unroll 4
    for (int pass = 0; pass < PASSES; pass++) {
      const int row = 4 * ONCE * pass + ONCE * warp + lane / CHUNKS, i = item.first + row;
      copy16(address(s.q) + piece(row, chunk), queries + min(i, item.many - 1) * a.q_m + 8 * chunk, i < item.many ? 16 : 0);
    }
    arrive_copied(s.q_full);
    if (thread == 0) arrive(s.q_full);

    const u16 *keys = a.k + item.batch * a.k_b + item.inner / a.groups * a.k_h, *values = a.v + item.batch * a.v_b + item.inner / a.groups * a.v_h;
    const int tiles = item.tiles();
    auto index = [&](int tile) {
      int t = tile;
      if (t < item.banded) return min(item.edge + KEYS * t + listed, item.end - 1);
      t -= item.banded;
      if (TOKENS && t < item.tokened) return KEYS * t + listed < item.count ? a.tokens[item.token + KEYS * t + listed] : 0;
      t -= item.tokened;
      if (BLOCKS && t < item.blocked) return a.blocks[item.block + t] * KEYS + listed;
      t -= item.blocked;
      return MEANS && t < item.meaned && KEYS * t + listed < item.mean_count ? a.means[item.mean + KEYS * t + listed] : 0;
    };
    int next = index(0);
    for (int tile = 0; tile < tiles; tile++, round++) {
      const int mine = next, stage = round % STAGES, parity = (round / STAGES & 1) ^ 1;
      next = index(tile + 1);
      const u16 *k = keys + 8 * chunk, *v = values + 8 * chunk;
      u32 k_n = 2 * (u32)a.k_n, v_n = 2 * (u32)a.v_n;  // bytes
      if (MEANS && tile >= item.banded + item.tokened + item.blocked) {
        const i64 from = ((i64)item.batch * (a.heads / a.groups) + item.inner / a.groups) * (a.keys / KEYS) * D;
        k = a.mean_k + from + 8 * chunk, v = a.mean_v + from + 8 * chunk, k_n = v_n = 2 * D;
      }
      await(s.k_empty[stage], parity);
      gather(address(s.k[stage]) + own, (const u8 *)k, k_n, mine);
      if (TOKENS && tile >= item.banded && tile < item.banded + item.tokened) {
        const int t = KEYS * (tile - item.banded) + thread;
        const int bytes = t < item.count ? 4 : 0;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address(&s.bias[stage][thread])), "l"(a.log_weights + item.token + (bytes ? t : 0)), "r"(bytes) : "memory");
      }
      arrive_copied(s.k_full[stage]);
      await(s.v_empty[stage], parity);
      gather(address(s.v[stage]) + own, (const u8 *)v, v_n, mine);
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
  Shared &s = *reinterpret_cast<Shared *>(((u64)memory + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    initialise(s.q_full, 129), initialise(s.q_empty, 8);
    for (int i = 0; i < STAGES; i++) initialise(s.k_full[i], 128), initialise(s.v_full[i], 128), initialise(s.k_empty[i], 8), initialise(s.v_empty[i], 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    produce(a, s);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    consume(a, s);
  }
}
