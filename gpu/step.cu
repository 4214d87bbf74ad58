// One sampled decode step in one launch: thresholds, scan, draw, attention to the drawn keys, merge, the new token.
//
// grid (SPLITS, heads), WARPS * 32 threads.  A warp scans blocks of 64 codes through a ring in shared memory, lists the
// keys it draws, and attends to them eight at a time; the last program of a head to finish merges the parts and moves
// the state on.  What each part computes is the definition in `gpu.prepare`, `gpu.scan`, `gpu.gather`, `gpu.encode`.
//
// Compiled with: D width, G query heads of a key-value head (at most 8), NIBBLES and CRUMBS bytes of 4-bit and of 2-bit
// codes in a row (multiples of 16 and of 8), WARPS, STAGES, SYSTEMATIC, REDRAW, LISTING, GROW, PAGE (0: not paged), BF16.

typedef unsigned int u32;
typedef long long i64;
typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;

constexpr int ROW = NIBBLES + CRUMBS;            // bytes of a code
constexpr int AXES = 2 * NIBBLES + 4 * CRUMBS;   // coded axes of a key
constexpr int BLOCK = 64;                        // keys coded together
constexpr int KEYS = G <= 4 ? 2 : 1;             // keys that share a row of the products: four heads fill half a row
constexpr int SHARE = 4 / KEYS;                  // lanes that share a key's code
constexpr int NB = NIBBLES / SHARE, NW = NB / 4; // bytes and words of nibbles of a lane
constexpr int CB = CRUMBS / SHARE, CH = CB / 2;  // bytes and half-words of crumbs
constexpr int TILES = BLOCK / (16 * KEYS);       // products' tiles in a block
constexpr int THREADS = 32 * WARPS;
constexpr int EIGHT = 8;                         // keys that a warp attends to at once
constexpr int LIST = BLOCK + EIGHT;              // keys that a warp lists at most: it scans on while there are fewer
constexpr int UNIT = 24;
constexpr int LINE = 32;
constexpr int PARTS = 16;                        // as in `gpu.scan`
constexpr int COLUMNS = 4;                       // of STATUS: crowded, (unused), starved, refused
constexpr int SLICES = AXES <= THREADS ? THREADS / AXES : 1;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float MAGIC = 12582912.0f;             // 1.5 * 2^23: added to a small integer, its bits are the float's
constexpr float EVERYTHING = -1e30f;             // a threshold below every score
constexpr int MAGIC_BITS = 0x4B400000;
#define INF __int_as_float(0x7F800000)

struct Arguments {
  const u16 *q; u16 *k, *v; const u16 *new_k, *new_v; u16 *output;  // (B, g G, D), (B, g, n, D), (B, g, D), as q
  const int *pages;                  // (B, most), where PAGE
  u8 *codes;                         // (heads, room, ROW)
  const float *query_map;            // (heads, D + 1, AXES)
  const float *means, *spreads;      // (heads, AXES)
  const float *key_map, *key_mean;   // (heads, D + 1, AXES), (heads, D + 1)
  const float *centre, *floor;       // (heads, D), (heads,)
  const float *half, *top;           // (AXES,)
  int *lengths, *counts, *found, *status, *tickets;  // (heads,), (heads, LINE), (heads, LINE), (heads, COLUMNS), (heads,)
  const int *seeds;                  // (heads,)
  float *trim, *rho;                 // (heads, padded)
  const float *budget;               // (heads, padded)
  float *parts, *sums, *lse;         // (heads, SPLITS, G, D), (heads, SPLITS, 2, G), (heads, G)
  i64 *drawn;                        // (heads, cap), where LISTING: as `gpu.scan` lists them
  i64 q_b, q_h, k_b, k_h, k_n, k_p, v_b, v_h, v_n, v_p, a_b, a_h, b_b, b_h, o_b, o_h;
  int room, groups, sinks, recent, least, crowd, cap, padded, most;
  int dense_below;                   // with fewer tokens every key is attended to, and nothing drawn
  float scale;
};

__device__ __forceinline__ u32 mixed(u32 x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}
__device__ __forceinline__ u32 uniform(u32 key, u32 counter) { return mixed((counter * 0x9E3779B1u) ^ key) >> (32 - UNIT); }
__device__ __forceinline__ float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float half_to_float(u32 x) {
  float y;
  if (BF16) return __uint_as_float(x << 16);
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x & 0xFFFF));
  return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
  if (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ void dot8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void dot16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void dot_half(float (&c)[4], u32 a0, u32 a1, u32 b) {
  if (BF16)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ float largest(float x, int from, int to) {
  for (int o = from; o < to; o *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
__device__ __forceinline__ float summed(float x, int from, int to) {
  for (int o = from; o < to; o *= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

struct Shared {
  alignas(128) u8 ring[WARPS][STAGES][BLOCK * ROW];
  union {
    alignas(16) float z[SLICES][G][AXES];
    struct { float parts[WARPS][G][D], top[G][WARPS], total[G][WARPS]; } ends;
    struct { float weights[G][64], total[G]; } merge;
    struct { float keys[BLOCK][D]; float lift[BLOCK]; } block;
  };
  uint4 rows[D / 32][32];  // of the queries, as the products of `Sums` take them: row lane / 4
  alignas(16) float q[D][G <= 4 ? 4 : 8];
  alignas(16) i8 queries[8][AXES];
  float sigma[8], tau[8], trim[8], rho[8];
  float found[8];
  int id[WARPS][LIST];
  float chance[WARPS][LIST];  // base-2 logarithms
  int count, last;
};

// Where a head's keys and values lie; the token of this step lies apart until the next one.
struct Head {
  const Arguments &a;
  const u16 *k, *v;
  int batch, inner, newest;  // the position that lies in new_k and new_v; -1 if none

  __device__ __forceinline__ i64 offset(int id, i64 stride, i64 page) const {
    if (PAGE) return a.pages[(i64)batch * a.most + id / (PAGE ? PAGE : 1)] * page + id % (PAGE ? PAGE : 1) * stride;
    return id * stride;
  }
  __device__ __forceinline__ const u16 *key(int id) const {
    return id == newest ? a.new_k + batch * a.a_b + inner * a.a_h : k + offset(id, a.k_n, a.k_p);
  }
  __device__ __forceinline__ const u16 *value(int id) const {
    return id == newest ? a.new_v + batch * a.b_b + inner * a.b_h : v + offset(id, a.v_n, a.v_p);
  }
};

// Up to eight keys and values in a warp's registers; a lane has key lane / 4 and values 2 (lane % 4) + {0, 1} in part.
struct Eight {
  uint4 k[D / 32], v[2][D / 64];

  // Those of tokens id(0) .. id(size - 1); the others are zero.
  template <class Id>
  __device__ __forceinline__ void ask(const Head &head, int size, Id id) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const u16 *row = head.key(id(r < size ? r : 0)) + 8 * c;
    #pragma unroll
    for (int j = 0; j < D / 32; j++) k[j] = r < size ? *(const uint4 *)(row + 32 * j) : make_uint4(0, 0, 0, 0);
    #pragma unroll
    for (int t = 0; t < 2; t++) {
      bool ok = 2 * c + t < size;
      row = head.value(id(ok ? 2 * c + t : 0)) + 8 * r;
      #pragma unroll
      for (int j = 0; j < D / 64; j++) v[t][j] = ok ? *(const uint4 *)(row + 64 * j) : make_uint4(0, 0, 0, 0);
    }
  }
};

// A warp's sums over the keys it attended to.
struct Sums {
  float top, total;        // of head lane / 4: largest logit, and this lane's share of the weights relative to it
  float vectors[D / 16][4];  // dims (i / 4) 64 + (lane / 4) 8 + 2 (i % 4) + {0, 1}, of heads 2 (lane % 4) + {0, 1}

  __device__ __forceinline__ Sums() : top(-INF), total(0.f) {
    for (int i = 0; i < D / 16; i++) for (int j = 0; j < 4; j++) vectors[i][j] = 0.f;
  }

  // Attend to the first `size` of eight keys, whose chances' base-2 logarithms are chance(0) .. chance(size - 1).
  template <class Chance>
  __device__ __forceinline__ void attend(float scale, const uint4 (&q)[D / 32][32], const Eight &rows, int size, Chance chance) {
    const int lane = threadIdx.x % 32, c = lane % 4;
    float s[2][4] = {};  // two chains of products, half as long
    #pragma unroll
    for (int j = 0; j < D / 32; j++) {
      const uint4 own = q[j][lane];
      dot16(s[0], own.x, 0, own.y, 0, rows.k[j].x, rows.k[j].y);
      dot16(s[1], own.z, 0, own.w, 0, rows.k[j].z, rows.k[j].w);
    }
    float p[2], high = top;
    #pragma unroll
    for (int j = 0; j < 2; j++) {
      p[j] = 2 * c + j < size ? (s[0][j] + s[1][j]) * (scale * LOG2E) - chance(2 * c + j) : -INF;
      high = fmaxf(high, p[j]);
    }
    high = largest(high, 1, 4);
    const float fade = exp2_(top - high);
    top = high, total *= fade;
    #pragma unroll
    for (int j = 0; j < 2; j++) total += p[j] = exp2_(p[j] - high);
    const float first = __shfl_sync(~0u, fade, 8 * c), second = __shfl_sync(~0u, fade, 8 * c + 4);  // heads 2c, 2c + 1
    const u32 b = pack(p[0], p[1]);
    #pragma unroll
    for (int i = 0; i < D / 16; i++) {
      u32 w[2];
      #pragma unroll
      for (int t = 0; t < 2; t++) w[t] = i % 4 == 0 ? rows.v[t][i / 4].x : i % 4 == 1 ? rows.v[t][i / 4].y : i % 4 == 2 ? rows.v[t][i / 4].z : rows.v[t][i / 4].w;
      vectors[i][0] *= first, vectors[i][2] *= first, vectors[i][1] *= second, vectors[i][3] *= second;
      dot_half(vectors[i], __byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632), b);
    }
  }

  // Attend to keys 8 worker .. 8 worker + 7 of n, and to those 8 workers further, and so on.  The queries come into
  // shared memory while the first keys are on their way; the next eight always are while some are attended to.
  __device__ __forceinline__ void attend_all(const Head &head, const uint4 (&q)[D / 32][32], int n, int worker, int workers) {
    Eight rows, ahead;
    int first = EIGHT * worker;
    auto ask = [&](Eight &eight, int from) { eight.ask(head, min(max(n - from, 0), EIGHT), [&](int i) { return min(from + i, n - 1); }); };
    ask(rows, first);
    __syncthreads();
    for (; first < n; first += EIGHT * workers) {
      ask(ahead, first + EIGHT * workers);
      attend(head.a.scale, q, rows, min(n - first, EIGHT), [](int) { return 0.f; });
      rows = ahead;
    }
  }
};

__device__ __forceinline__ int dim(int i, int r) { return i / 4 * 64 + r * 8 + i % 4 * 2; }  // the first of two, see Sums

__device__ __forceinline__ float mills(float x) {  // as `gpu.prepare._mills`
  float y = fabsf(x), right = 4.f / (3.f * y + sqrtf(y * y + 8.f));
  return x >= 0 ? right : 2.5066283f * exp2_(0.5f * LOG2E * fminf(y * y, 160.f)) - right;
}

// Queries into code space and their thresholds; as `gpu.prepare._thresholds`.  What does not change from step to step
// can be loaded before the launch has to wait for the one before it.
struct Thresholds {
  static constexpr int ITEMS = (SLICES * AXES + THREADS - 1) / THREADS, LONG = (D + SLICES - 1) / SLICES, EACH = (AXES + 31) / 32;
  float map[ITEMS][LONG], lift[ITEMS], means[EACH], spreads[EACH];

  __device__ __forceinline__ void load(const Arguments &a, int head) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float *rows = a.query_map + (i64)head * (D + 1) * AXES;
    #pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      int at = threadIdx.x + item * THREADS, axis = at % AXES, first = at / AXES * LONG;
      #pragma unroll
      for (int i = 0; i < LONG; i++) map[item][i] = first + i < D ? rows[(first + i) * AXES + axis] : 0.f;
      lift[item] = first == 0 ? rows[D * AXES + axis] : 0.f;
    }
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
      bool ok = warp < G && lane + 32 * i < AXES;
      means[i] = ok ? a.means[head * AXES + lane + 32 * i] : 0.f, spreads[i] = ok ? a.spreads[head * AXES + lane + 32 * i] : 0.f;
    }
  }

  template <class Meanwhile>
  __device__ __forceinline__ void set(const Arguments &a, Shared &s, int head, const u16 *q, int size, Meanwhile meanwhile) const {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    float rho = 3.f, trim = 0.f, budget = 1.f;
    int found = -1;
    if (warp < G) budget = a.budget[head * a.padded + warp], rho = a.rho[head * a.padded + warp], trim = a.trim[head * a.padded + warp], found = a.found[head * LINE + warp];
    constexpr int MINE = (G * D + THREADS - 1) / THREADS;
    u16 own[MINE];
    #pragma unroll
    for (int i = 0; i < MINE; i++) own[i] = thread + i * THREADS < G * D ? q[(thread + i * THREADS) / D * a.q_h + thread % D] : 0;
    meanwhile();
    #pragma unroll
    for (int i = 0; i < MINE; i++)
      if (thread + i * THREADS < G * D) s.q[thread % D][(thread + i * THREADS) / D] = half_to_float(own[i]);
    for (int i = thread; i < 2 * AXES; i += THREADS) ((u32 *)s.queries)[i] = 0;
    if (thread < 8) s.tau[thread] = INF, s.sigma[thread] = 1.f;
    __syncthreads();
    #pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      int at = thread + item * THREADS, axis = at % AXES, slice = at / AXES;
      float z[G];
      #pragma unroll
      for (int g = 0; g < G; g++) z[g] = lift[item];
      #pragma unroll
      for (int i = 0; i < LONG; i++)
        #pragma unroll
        for (int g = 0; g < G; g++) z[g] += map[item][i] * s.q[min(slice * LONG + i, D - 1)][g];
      if (at < SLICES * AXES)
        #pragma unroll
        for (int g = 0; g < G; g++) s.z[slice][g][axis] = z[g];
    }
    __syncthreads();
    if (warp < G) {
      float z[EACH], most = 0.f;
      #pragma unroll
      for (int i = 0; i < EACH; i++) {
        z[i] = 0.f;
        if (lane + 32 * i < AXES)
          #pragma unroll
          for (int slice = 0; slice < SLICES; slice++) z[i] += s.z[slice][warp][lane + 32 * i];
        most = fmaxf(most, fabsf(z[i]));
      }
      most = largest(most, 1, 32);
      float sigma = most > 1e-30f ? most * (1.f / 127.f) : 1.f, mean = 0.f, spread = 0.f;
      #pragma unroll
      for (int i = 0; i < EACH; i++) {
        float whole = floorf(z[i] / sigma + 0.5f);
        if (lane + 32 * i < AXES) s.queries[warp][lane + 32 * i] = (i8)whole;
        mean += whole * means[i], spread += whole * whole * spreads[i];
      }
      mean = summed(mean, 1, 32), spread = summed(spread, 1, 32);
      float deviation = sqrtf(fmaxf(spread, 1e-20f)) * sigma;
      float off = log2_(fmaxf((float)found, 1e-3f) / (PARTS * budget));
      off = found < 0 || size <= budget ? 0.f : fminf(fmaxf(off, -8.f), 8.f);
      trim = fminf(fmaxf(trim + 0.5f * off / fmaxf(deviation, 1.f), -8.f), 8.f);
      float share = log2_(fminf(budget / fmaxf(size, 1.f), 1.f)), target = share * LN2, steep = deviation * LN2;
      const bool flat = deviation < 0.7f;
      #pragma unroll 1
      for (int i = 0; i < 2 && !flat; i++) {
        float above = mills(rho), below = mills(steep - rho);
        float miss = log2_(above + below) * LN2 - 0.5f * rho * rho - 0.9189385f - target;
        float step = miss / fmaxf(steep * below / (above + below), 0.1f);
        rho = fminf(fmaxf(rho + fminf(fmaxf(step, -1.5f), 1.5f), -8.f), 12.f);
      }
      if (lane == 0) {
        s.sigma[warp] = sigma, s.trim[warp] = trim, s.rho[warp] = rho;
        float place = (flat ? 0.5f * LN2 * deviation * deviation - share : rho * deviation) + trim * deviation;
        s.tau[warp] = size <= budget ? EVERYTHING : mean * sigma + place;
      }
    }
    __syncthreads();
  }
};

// Add up the warps' sums and store them: vectors (G, D) relative to the largest logits, those and the weights' sums (2, G).
__device__ __forceinline__ void gathered(Shared &s, Sums &sums, float *parts, float *ends) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, r = lane / 4, c = lane % 4;
  float total = summed(sums.total, 1, 4);
  if (c == 0 && r < G) s.ends.top[r][warp] = sums.top, s.ends.total[r][warp] = total;
  #pragma unroll
  for (int i = 0; i < D / 16; i++)
    #pragma unroll
    for (int j = 0; j < 2; j++)
      if (2 * c + j < G) *(float2 *)&s.ends.parts[warp][2 * c + j][dim(i, r)] = make_float2(sums.vectors[i][j], sums.vectors[i][2 + j]);
  __syncthreads();
  for (int item = thread; item < G * D; item += THREADS) {
    const int g = item / D, d = item % D;
    float top = -INF, total = 0.f, sum = 0.f;
    #pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, s.ends.top[g][w]);
    #pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = top == -INF ? 0.f : exp2_(s.ends.top[g][w] - top);
      sum += weight * s.ends.parts[w][g][d], total += weight * s.ends.total[g][w];
    }
    parts[item] = sum;
    if (d == 0) ends[g] = top, ends[G + g] = total;
  }
}

// The parts of all programs of a head -> its output and log-sum-exps, unless fewer than `least` keys were drawn, of
// which `drawn` is told.  Everything is asked for before anything is looked at.
__device__ __forceinline__ bool merged(const Arguments &a, Shared &s, int index, const float *parts, const float *ends, int pieces, int least, u16 *output, int &drawn) {
  constexpr int AHEAD = 16;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  drawn = __ldcg(a.counts + index * LINE + 1);
  float x[AHEAD];
  auto ask = [&](int item, int first) {
    #pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (first + i < pieces && item < G * D) x[i] = __ldcg(parts + first * G * D + item + i * G * D);
  };
  if (warp < G) {  // weights of the parts of head `warp`, two a lane
    float top[2], total[2], most = -INF, sum = 0.f;
    #pragma unroll
    for (int i = 0; i < 2; i++) {
      bool ok = lane + 32 * i < pieces;
      top[i] = ok ? __ldcg(ends + (lane + 32 * i) * 2 * G + warp) : -INF, total[i] = ok ? __ldcg(ends + (lane + 32 * i) * 2 * G + G + warp) : 0.f;
      most = fmaxf(most, top[i]);
    }
    ask(thread, 0);
    most = largest(most, 1, 32);
    #pragma unroll
    for (int i = 0; i < 2; i++) {
      float weight = most == -INF ? 0.f : exp2_(top[i] - most);
      s.merge.weights[warp][lane + 32 * i] = weight, sum += weight * total[i];
    }
    sum = fmaxf(summed(sum, 1, 32), 1e-30f);
    if (lane == 0) s.merge.total[warp] = sum, a.lse[index * G + warp] = (most + log2_(sum)) * LN2;
  } else {
    ask(thread, 0);
  }
  __syncthreads();
  if (drawn < least) return false;
  for (int item = thread; item < G * D; item += THREADS) {
    const int g = item / D;
    float sum = 0.f;
    for (int first = 0; first < pieces; first += AHEAD) {
      if (item != thread || first > 0) ask(item, first);
      #pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (first + i < pieces) sum += s.merge.weights[g][first + i] * x[i];
    }
    output[g * a.o_h + item % D] = (u16)pack(sum / s.merge.total[g], 0.f);
  }
  return true;
}

// The block of codes that the new token has filled; as `gpu.encode._block_codes`.
__device__ __forceinline__ void encoded(const Arguments &a, Shared &s, const Head &head, int index, int first) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const float *mean = a.key_mean + index * (D + 1), *map = a.key_map + (i64)index * (D + 1) * AXES;
  for (int j = warp; j < BLOCK; j += WARPS) {
    const u16 *k = head.key(first + j), *v = head.value(first + j);
    float far = 0.f;
    for (int d = lane; d < D; d += 32) {
      s.block.keys[j][d] = half_to_float(k[d]) - mean[d];
      float x = half_to_float(v[d]) - a.centre[index * D + d];
      far += x * x;
    }
    far = summed(far, 1, 32);
    if (lane == 0) s.block.lift[j] = log2_(fmaxf(sqrtf(far), a.floor[index])) * LN2 / a.scale - mean[D];
  }
  __syncthreads();
  u8 *codes = a.codes + ((i64)index * a.room + first) * ROW;
  for (int item = thread; item < BLOCK * ROW; item += THREADS) {  // a byte is two nibbles or four crumbs
    int j = item / ROW, byte = item % ROW, code = 0, planes = byte < NIBBLES ? 2 : 4;
    for (int p = 0; p < planes; p++) {
      int axis = byte < NIBBLES ? p * NIBBLES + byte : 2 * NIBBLES + p * CRUMBS + byte - NIBBLES;
      float z = s.block.lift[j] * map[D * AXES + axis];
      for (int d = 0; d < D; d++) z += s.block.keys[j][d] * map[d * AXES + axis];
      float level = fminf(fmaxf(floorf(z) + a.half[axis], 0.f), a.top[axis]);
      code |= (int)level << (4 * (p & 1) + 2 * (p >> 1));
    }
    codes[item] = code;
  }
}

// A lane's share of a code: words of nibbles, then half-words of crumbs.
struct Code {
  u32 nibbles[NW > 0 ? NW : 1], crumbs[CH > 0 ? CH : 1];

  __device__ __forceinline__ void load(const u8 *row, int share) {
    const u8 *at = row + share * NB;
    if (NB % 16 == 0 && ROW % 16 == 0)
      #pragma unroll
      for (int i = 0; i < NW / 4; i++) {
        uint4 x = *(const uint4 *)(at + 16 * i);
        nibbles[4 * i] = x.x, nibbles[4 * i + 1] = x.y, nibbles[4 * i + 2] = x.z, nibbles[4 * i + 3] = x.w;
      }
    else if (NB % 8 == 0)
      #pragma unroll
      for (int i = 0; i < NW / 2; i++) {
        uint2 x = *(const uint2 *)(at + 8 * i);
        nibbles[2 * i] = x.x, nibbles[2 * i + 1] = x.y;
      }
    else
      #pragma unroll
      for (int i = 0; i < NW; i++) nibbles[i] = *(const u32 *)(at + 4 * i);
    #pragma unroll
    for (int i = 0; i < CH; i++) crumbs[i] = *(const u16 *)(row + NIBBLES + share * CB + 2 * i);
  }
};

// Keys of a block in a warp: row 16 t + 8 j + lane / 4 of the products holds one key, or two, of lanes 0, 1 and 2, 3 of
// the row's four; a lane's two columns of the results are heads.
__device__ __forceinline__ int position(int t, int j) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  return KEYS * (16 * t + 8 * j + r) + (KEYS == 2 ? c / 2 : 0);
}
__device__ __forceinline__ int heads() { return KEYS == 2 ? 2 * (threadIdx.x % 2) : 2 * (threadIdx.x % 4); }

// Fragments of the queries, as the products take them, and what turns sums into base-2 odds.
struct Queries {
  u32 low[NW > 0 ? NW : 1], high[NW > 0 ? NW : 1], even[CH > 0 ? CH : 1], odd[CH > 0 ? CH : 1];
  float sigma[2], tau[2];

  __device__ __forceinline__ Queries(const Shared &s, bool everything) {
    const int c = threadIdx.x % 4, share = c % SHARE, column = threadIdx.x % 32 / 4;
    const bool other = KEYS == 2 && c / 2 != column / 4;  // the other key's half of this column is zero
    const i8 *coded = s.queries[KEYS == 2 ? column % 4 : column];
    #pragma unroll
    for (int i = 0; i < NW; i++) {
      low[i] = other ? 0 : *(const u32 *)(coded + share * NB + 4 * i);
      high[i] = other ? 0 : *(const u32 *)(coded + NIBBLES + share * NB + 4 * i);
    }
    #pragma unroll
    for (int i = 0; i < CH; i++) {
      const i8 *at = coded + 2 * NIBBLES + share * CB + 2 * i;
      u32 x[4];
      for (int p = 0; p < 4; p++) x[p] = *(const u16 *)(at + p * CRUMBS);
      even[i] = other ? 0 : x[0] | x[2] << 16, odd[i] = other ? 0 : x[1] | x[3] << 16;
    }
    for (int j = 0; j < 2; j++) sigma[j] = s.sigma[heads() + j], tau[j] = everything ? EVERYTHING : s.tau[heads() + j];
  }
};

// A block of 64 keys between the scan and the draw.
struct Block {
  float each[TILES][2][2], best[TILES][2];  // base-2 odds of this lane's rows for its two heads, and for the best head
  int pi[2];                                // chances of this lane's two keys: of tile c % SHARE, both its rows

  __device__ __forceinline__ void score(const u8 *rows, const Queries &q) {
    #pragma unroll
    for (int t = 0; t < TILES; t++) {
      int acc[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
      Code x[2];
      #pragma unroll
      for (int j = 0; j < 2; j++) x[j].load(rows + position(t, j) * ROW, threadIdx.x % SHARE);
      #pragma unroll
      for (int i = 0; i < NW; i++)
        dot8(acc, x[0].nibbles[i] & 0x0F0F0F0F, x[1].nibbles[i] & 0x0F0F0F0F, (x[0].nibbles[i] >> 4) & 0x0F0F0F0F,
             (x[1].nibbles[i] >> 4) & 0x0F0F0F0F, q.low[i], q.high[i]);
      #pragma unroll
      for (int i = 0; i < CH; i++) {
        u32 y0 = x[0].crumbs[i] | x[0].crumbs[i] << 14, y1 = x[1].crumbs[i] | x[1].crumbs[i] << 14;
        dot8(acc, y0 & 0x03030303, y1 & 0x03030303, (y0 >> 4) & 0x03030303, (y1 >> 4) & 0x03030303, q.even[i], q.odd[i]);
      }
      #pragma unroll
      for (int j = 0; j < 2; j++) {
        #pragma unroll
        for (int g = 0; g < 2; g++) each[t][j][g] = (__int_as_float(acc[2 * j + g]) - MAGIC) * q.sigma[g] - q.tau[g];
        best[t][j] = largest(fmaxf(each[t][j][0], each[t][j][1]), 1, SHARE);
      }
    }
  }

  // Chances, multiples of 2^-24, of keys `first` and on; none outside start .. stop - 1.
  __device__ __forceinline__ void chances(int first, int start, int stop) {
    #pragma unroll
    for (int j = 0; j < 2; j++) {
      float odds = best[0][j];
      #pragma unroll
      for (int t = 1; t < TILES; t++) odds = threadIdx.x % SHARE == t ? best[t][j] : odds;
      pi[j] = max((int)exp2_(fminf(odds, 0.f) + UNIT), 1);
    }
    if (first < start || first >= stop)
      for (int j = 0; j < 2; j++)
        if (first >= stop || first + position(threadIdx.x % SHARE, j) < start) pi[j] = 0;
  }

  // List the drawn keys of a block with the base-2 logarithms of their chances; returns how many.  Adds to `alone` how
  // many of them this lane's two heads would have drawn by themselves.
  __device__ __forceinline__ int draw(u32 seed, int block, int *id, float *chance, float (&alone)[2]) const {
    const int lane = threadIdx.x % 32;
    int ordered[2];  // in order of keys: this lane has keys 2 lane and 2 lane + 1
    #pragma unroll
    for (int j = 0; j < 2; j++) {
      int key = 2 * lane + j, tile = key / (16 * KEYS), inside = key % (8 * KEYS);
      int source = 4 * (inside / KEYS) + (KEYS == 2 ? 2 * (inside % 2) : 0) + tile;
      int one = __shfl_sync(~0u, pi[0], source), two = __shfl_sync(~0u, pi[1], source);
      ordered[j] = key % (16 * KEYS) < 8 * KEYS ? one : two;
    }
    bool take[2];
    int place[2], many;
    if (SYSTEMATIC) {
      u32 pair = ordered[0] + ordered[1], sum = pair;
      #pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        u32 up = __shfl_up_sync(~0u, sum, o);
        sum += lane >= o ? up : 0;
      }
      u32 at0 = sum - pair + uniform(seed, block), at1 = at0 + ordered[0], at2 = at1 + ordered[1];
      take[0] = at1 >> UNIT > at0 >> UNIT, take[1] = at2 >> UNIT > at1 >> UNIT;
      place[0] = at0 >> UNIT, place[1] = at1 >> UNIT;
      many = __shfl_sync(~0u, at2, 31) >> UNIT;
    } else {
      #pragma unroll
      for (int j = 0; j < 2; j++) take[j] = uniform(seed, block * BLOCK + 2 * lane + j) < (u32)ordered[j];
    }
    const u32 mask0 = __ballot_sync(~0u, take[0]), mask1 = __ballot_sync(~0u, take[1]);
    if (!SYSTEMATIC) {
      u32 under = (1u << lane) - 1;
      place[0] = __popc(mask0 & under) + __popc(mask1 & under), place[1] = place[0] + take[0];
      many = __popc(mask0) + __popc(mask1);
    }
    #pragma unroll
    for (int j = 0; j < 2; j++)
      if (take[j]) id[place[j]] = block * BLOCK + 2 * lane + j, chance[place[j]] = log2_((float)ordered[j]) - UNIT;
    #pragma unroll
    for (int t = 0; t < TILES; t++)
      #pragma unroll
      for (int j = 0; j < 2; j++) {
        int key = position(t, j);
        const float most = fminf(best[t][j], 0.f);
        const bool drawn = (key % 2 ? mask1 : mask0) >> (key / 2) & 1;
        #pragma unroll
        for (int g = 0; g < 2; g++) alone[g] += drawn ? exp2_(fminf(each[t][j][g], 0.f) - most) : 0.f;
      }
    return many;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) step(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared &s = *reinterpret_cast<Shared *>(memory);
  const int split = blockIdx.x, splits = gridDim.x, index = blockIdx.y;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, r = lane / 4, c = lane % 4;
  const int batch = index / a.groups, inner = index % a.groups;

  // Maps do not depend on the launch before this one: they are asked for while it ends.  Codes do not either, but asked
  // for so early they would stand in the queries' way.
  Thresholds maps;
  if (a.dense_below <= 0) maps.load(a, index);
  const u8 *codes = a.codes + (i64)index * a.room * ROW;
  const int stride = splits * WARPS, mine = split * WARPS + warp;
  u8 (*ring)[BLOCK * ROW] = s.ring[warp];
  auto fetch = [&](int block, int stage, int blocks) {
    if (block < blocks) {
      const u8 *from = codes + (i64)block * BLOCK * ROW + 16 * lane;
      u32 to = (u32)__cvta_generic_to_shared(ring[stage] + 16 * lane);
      #pragma unroll
      for (int i = 0; i < ROW / 8; i++) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + 512 * i), "l"(from + 512 * i) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");

  const u16 *query = a.q + batch * a.q_b + inner * G * a.q_h;
  if (warp < D / 32) s.rows[warp][lane] = r < G ? *(const uint4 *)(query + r * a.q_h + 32 * warp + 8 * c) : make_uint4(0, 0, 0, 0);
  const int before = a.lengths[index], n = GROW ? min(before + 1, a.room) : before;
  const bool grown = GROW && before < a.room;
  const bool dense = n < a.dense_below;
  const int pieces = dense ? min(max((n + EIGHT * WARPS - 1) / (EIGHT * WARPS), 1), splits) : splits;  // programs that have keys
  const int start = min(n, a.sinks), stop = max(max(n - a.recent, 0) / BLOCK * BLOCK, start);
  Head head{a, a.k + batch * a.k_b * (PAGE ? 0 : 1) + inner * a.k_h, a.v + batch * a.v_b * (PAGE ? 0 : 1) + inner * a.v_h, batch, inner, grown ? before : -1};
  if (thread < 8) s.found[thread] = 0.f;
  if (thread == 0) s.count = 0;
  if (!dense) {
    if (a.dense_below > 0) maps.load(a, index);
    maps.set(a, s, index, query, stop - start, [&] {
      #pragma unroll
      for (int i = 0; i < STAGES - 1; i++) fetch(mine + i * stride, i, a.room / BLOCK);
    });
  }

  const u32 seed = mixed((u32)a.seeds[index] ^ mixed((REDRAW ? (u32)n : 0u) + 0x7F4A7C15u));
  int *id = s.id[warp];
  float *chance = s.chance[warp];
  int count = 0, found = 0;  // keys that the head drew, and what its heads alone would
  bool starved = false;

  for (;;) {  // once; a second time where the head drew too few: its last program then attends to every key
    Sums sums;
    if (dense) {
      sums.attend_all(head, s.rows, n, mine, stride);
    } else {
      const Queries queries(s, starved);
      const int worker = starved ? warp : mine, workers = starved ? WARPS : stride;
      const int blocks = stop > start ? stop / BLOCK : 0, certain = n - stop + start;
      float alone[2] = {};  // keys that this lane's two heads alone would draw
      int listed = 0, drawn = 0, stage = 0, sure = worker, block = worker;
      for (;;) {
        while (listed < EIGHT && block < blocks) {
          asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
          __syncwarp();
          fetch(block + (STAGES - 1) * workers, stage == 0 ? STAGES - 1 : stage - 1, blocks);  // what the last round read
          Block keys;
          keys.score(ring[stage], queries);
          keys.chances(block * BLOCK, start, stop);
          if (!SYSTEMATIC || (uniform(seed, block) + __reduce_add_sync(~0u, (u32)(keys.pi[0] + keys.pi[1]))) >> UNIT != 0) {
            int many = keys.draw(seed, block, id + listed, chance + listed, alone);
            if (LISTING && !starved) {
              __syncwarp();
              int at = many && lane == 0 ? atomicAdd(a.counts + index * LINE + 2, many) : 0;
              at = __shfl_sync(~0u, at, 0);
              for (int i = lane; i < many; i += 32)
                if (at + i < a.cap) a.drawn[(i64)index * a.cap + at + i] = (i64)rintf(exp2f(chance[listed + i] + UNIT)) << 32 | id[listed + i];
            }
            listed += many, drawn += many;
          }
          stage = stage + 1 == STAGES ? 0 : stage + 1;
          block += workers;
        }
        for (; listed < EIGHT && sure < certain; sure += workers, listed++)
          if (lane == 0) id[listed] = sure < start ? sure : sure + stop - start, chance[listed] = 0.f;
        if (listed == 0) break;
        __syncwarp();
        const int size = min(listed, EIGHT);
        listed -= size;
        Eight rows;
        rows.ask(head, size, [&](int i) { return id[listed + i]; });
        sums.attend(a.scale, s.rows, rows, size, [&](int i) { return chance[listed + i]; });
        __syncwarp();
      }
      #pragma unroll
      for (int g = 0; g < 2; g++) {
        alone[g] = summed(alone[g], KEYS == 2 ? 2 : 4, 32);
        if (!starved && r == 0 && c < 4 / KEYS) atomicAdd(&s.found[heads() + g], alone[g]);
      }
      if (!starved && lane == 0 && drawn > 0) atomicAdd(&s.count, drawn);
    }
    __syncthreads();
    float *parts = a.parts + (i64)index * splits * G * D, *ends = a.sums + (i64)index * splits * 2 * G;
    u16 *output = a.output + batch * a.o_b + inner * G * a.o_h;
    if (split < pieces) gathered(s, sums, parts + (starved ? 0 : split) * G * D, ends + (starved ? 0 : split) * 2 * G);
    if (starved) {
      __syncthreads();
      merged(a, s, index, parts, ends, 1, 0, output, count);
      break;
    }
    if (thread < G && s.found[thread] > 0.f) atomicAdd(a.found + index * LINE + 8 + thread, (int)fminf(s.found[thread] * PARTS, 1e8f));
    if (thread == 0 && s.count > 0) atomicAdd(a.counts + index * LINE + 1, s.count);
    __syncthreads();
    if (thread == 0) {  // releases what this program wrote and, for the last, acquires what all did
      int ticket;
      asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(a.tickets + index) : "memory");
      s.last = ticket == splits - 1;
    }
    __syncthreads();
    if (!s.last) break;
    if (thread < G) found = __ldcg(a.found + index * LINE + 8 + thread);
    if (merged(a, s, index, parts, ends, pieces, dense ? 0 : min(a.least, (stop - start) / 4), output, count)) break;
    starved = true;
    asm volatile("cp.async.wait_all;" ::: "memory");  // the first pass asked for blocks that it may not have come to
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch(warp + i * WARPS, i, stop / BLOCK);
  }
  const int newest = head.newest;
  if (newest >= 0 && split == 0) {  // the token's place in the cache: in this step everyone takes it from where it came
    u16 *k = const_cast<u16 *>(head.k + head.offset(newest, a.k_n, a.k_p)), *v = const_cast<u16 *>(head.v + head.offset(newest, a.v_n, a.v_p));
    for (int d = thread; d < D; d += THREADS) k[d] = head.key(newest)[d], v[d] = head.value(newest)[d];
  }
  if (!s.last) return;

  if (thread < G && !dense) {
    a.trim[index * a.padded + thread] = s.trim[thread], a.rho[index * a.padded + thread] = s.rho[thread];
    a.found[index * LINE + thread] = found, a.found[index * LINE + 8 + thread] = 0;
  }
  if (thread == 0) {
    a.counts[index * LINE] = dense || (starved && !LISTING) ? stop - start : count, a.counts[index * LINE + 1] = a.counts[index * LINE + 2] = 0, a.tickets[index] = 0;
    int *status = a.status + index * COLUMNS;
    if (count > a.crowd) status[0]++;
    if (starved) status[2]++;
    if (GROW && newest < 0) status[3]++;
    if (newest >= 0) a.lengths[index] = newest + 1;
  }
  if (newest >= 0 && newest % BLOCK == BLOCK - 1) {
    __syncthreads();
    encoded(a, s, head, index, newest + 1 - BLOCK);
  }
}
extern "C" __constant__ int shared_bytes = sizeof(Shared);
