// Counting codes of importance, and drawing keys by them: `count` and `draw` of `gpu.block_sampled` define both.
//
// 128 threads; grid (lines, heads) to count, (lines / 4, heads) to draw.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;

constexpr int THREADS = 128, WARPS = THREADS / 32, EACH = 16, TILE = THREADS * EACH, LEVELS = 256, UNIT = 24;
constexpr int RUN = 32;        // codes that a lane draws from at a time
constexpr int TOP = 31 - UNIT;
constexpr int COPIES = 8;  // of a histogram, so that lanes that meet the same code seldom wait for each other
constexpr float LN2 = 0.6931471805599453f;

struct Arguments {
  const u8 *codes;        // (heads, lines, room)
  int *histograms;        // (heads, lines, LEVELS)
  const int *chances;     // (heads, tables, LEVELS)
  const int *starts;      // (heads, lines)
  const i64 *offsets;     // (heads * lines + 1,)
  int *tokens;
  float *log_weights;
  i64 capacity;
  int shift, lines, room, tables;  // shift = n - m
};
extern "C" __constant__ int shared_bytes = 0;

// The launch's start may overlap the end of the one before, whose writes are to be seen.
__device__ __forceinline__ void after_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ int eligible(const Arguments &a) { return (a.shift + (int)blockIdx.x * 128) / 128 * 128; }
__device__ __forceinline__ u32 code(const uint4 &c, int i) {
  const u32 word = i < 4 ? c.x : i < 8 ? c.y : i < 12 ? c.z : c.w;
  return word >> (8 * (i % 4)) & 0xFF;
}

__device__ __forceinline__ uint4 read(const u8 *codes, int first, int edge) {
  return first < edge ? *(const uint4 *)(codes + first) : make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS) count(const __grid_constant__ Arguments a) {
  __shared__ int found[LEVELS * COPIES];
  const i64 line = (i64)blockIdx.y * a.lines + blockIdx.x;
  const int thread = threadIdx.x, edge = eligible(a), copy = thread % COPIES;
  for (int i = thread; i < LEVELS * COPIES; i += THREADS) found[i] = 0;
  __syncthreads();
  after_predecessor();
  for (int first = EACH * thread; first < edge; first += TILE) {
    const uint4 codes = *(const uint4 *)(a.codes + line * a.room + first);
    #pragma unroll
    for (int i = 0; i < EACH; i++) atomicAdd(&found[code(codes, i) * COPIES + copy], 1);
  }
  __syncthreads();
  for (int i = thread; i < LEVELS; i += THREADS) {
    int sum = 0;
    for (int j = 0; j < COPIES; j++) sum += found[i * COPIES + (j + thread) % COPIES];
    a.histograms[line * LEVELS + i] = sum;
  }
}

// A warp draws a line, the longest first.  Sums of chances are kept modulo 2^32 with the bit of whole keys on top: that
// bit changes where a key is listed.
extern "C" __global__ void __launch_bounds__(THREADS) draw(const __grid_constant__ Arguments a) {
  __shared__ u32 tables[WARPS][LEVELS];
  __shared__ float log_weights[WARPS][LEVELS];
  __shared__ u16 found[WARPS][RUN * 32];  // keys of a tile that are listed
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = a.lines - 1 - (int)(blockIdx.x * WARPS + warp);
  if (row < 0) return;
  after_predecessor();
  const i64 line = (i64)blockIdx.y * a.lines + row;
  const int edge = (a.shift + row * 128) / 128 * 128;
  u32 *table = tables[warp];
  float *log_weight = log_weights[warp];
  u16 *keys = found[warp];
  for (int i = lane; i < LEVELS; i += 32) {
    const int chance = a.chances[((i64)blockIdx.y * a.tables + (a.tables > 1 ? row : 0)) * LEVELS + i];
    table[i] = (u32)chance << TOP;
    log_weight[i] = (UNIT - __log2f((float)chance)) * LN2;
  }
  __syncwarp();
  const u8 *codes = a.codes + line * a.room;
  u32 carry = (u32)a.starts[line] << TOP;
  i64 place = a.offsets[line];
  uint4 next[RUN / EACH];
  #pragma unroll
  for (int i = 0; i < RUN / EACH; i++) next[i] = read(codes, RUN * lane + EACH * i, edge);
  for (int tile = 0; tile < edge; tile += 32 * RUN) {
    u32 chance[RUN], sum = 0, upto, bits = 0;
    const int left = edge - tile - RUN * lane;
    #pragma unroll
    for (int i = 0; i < RUN; i++) chance[i] = i / EACH * EACH < left ? table[code(next[i / EACH], i % EACH)] : 0, sum += chance[i];
    #pragma unroll
    for (int i = 0; i < RUN / EACH; i++) next[i] = read(codes, tile + RUN * (32 + lane) + EACH * i, edge);
    upto = sum;  // of the lanes up to this one
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const u32 other = __shfl_up_sync(~0u, upto, o);
      if (lane >= o) upto += other;
    }
    u32 at = carry + upto - sum;
    carry += __shfl_sync(~0u, upto, 31);
    const u32 first = at >> 31;
    #pragma unroll
    for (int i = RUN - 1, j = 0; j < RUN; i--, j++) at += chance[j], bits |= (at >> 31) << i;
    u32 taken = bits ^ (bits >> 1 | first << (RUN - 1));  // the first key's bit on top
    int many = __popc(taken), before = many;
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int other = __shfl_up_sync(~0u, before, o);
      if (lane >= o) before += other;
    }
    const int all = __shfl_sync(~0u, before, 31);
    __syncwarp();
    for (before -= many; taken; before++) {
      const int i = __clz(taken);
      keys[before] = (u16)(RUN * lane + i - (32 - RUN));
      taken ^= 0x80000000u >> i;
    }
    __syncwarp();
    for (int i = lane; i < all; i += 32) {
      const int j = tile + keys[i];
      if (place + i < a.capacity) {
        a.tokens[place + i] = j;
        a.log_weights[place + i] = log_weight[codes[j]];
      }
    }
    place += all;
  }
}
