// Counting codes of importance, and drawing keys by them: `count` and `draw` of `gpu.block_sampled` define both.
//
// grid (lines, heads); 256 threads count, a warp draws.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;

constexpr int THREADS = 256, EACH = 16, TILE = THREADS * EACH, LEVELS = 256, UNIT = 24;
constexpr int RUN = 32;        // codes that a lane draws from at a time
constexpr int TOP = 31 - UNIT;
constexpr int LOG_COPIES = 5, COPIES = 1 << LOG_COPIES;  // of a histogram, so that lanes do not wait for each other
constexpr float LN2 = 0.6931471805599453f;

struct Arguments {
  const u8 *codes;        // (heads, lines, room)
  int *histograms;        // (heads, lines, LEVELS)
  u64 *totals;            // (heads, LEVELS), added to
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
__device__ __forceinline__ int eligible(const Arguments &a, int line) { return (a.shift + line * 128) / 128 * 128; }
// What stands in a table, every 2^SCALE bytes, for code i of 16.
template <int SCALE, class T> __device__ __forceinline__ T &at(T *table, const uint4 &codes, int i) {
  const u32 word = i < 4 ? codes.x : i < 8 ? codes.y : i < 12 ? codes.z : codes.w;
  const int down = 8 * (i % 4) - SCALE;
  return *(T *)((u8 *)table + ((down < 0 ? word << -down : word >> down) & 0xFF << SCALE));
}

extern "C" __global__ void __launch_bounds__(THREADS) count(const __grid_constant__ Arguments a) {
  __shared__ alignas(16) int found[LEVELS * COPIES];
  const i64 line = (i64)blockIdx.y * a.lines + blockIdx.x;
  const int thread = threadIdx.x, edge = eligible(a, blockIdx.x);
  int *own = found + thread % COPIES;
  for (int i = thread; i < LEVELS * COPIES / 4; i += THREADS) ((int4 *)found)[i] = make_int4(0, 0, 0, 0);
  __syncthreads();
  after_predecessor();
  for (int first = EACH * thread; first < edge; first += TILE) {
    const uint4 codes = *(const uint4 *)(a.codes + line * a.room + first);
    #pragma unroll
    for (int i = 0; i < EACH; i++) atomicAdd(&at<2 + LOG_COPIES>(own, codes, i), 1);
  }
  __syncthreads();
  for (int i = thread; i < LEVELS; i += THREADS) {
    int sum = 0;
    for (int j = 0; j < COPIES; j++) sum += found[i * COPIES + (j + thread) % COPIES];
    a.histograms[line * LEVELS + i] = sum;
    if (sum) atomicAdd(&a.totals[(i64)blockIdx.y * LEVELS + i], (u64)sum);
  }
}

// Sums of chances are kept modulo 2^32 with the bit of whole keys on top: that bit changes where a key is listed.
extern "C" __global__ void __launch_bounds__(32) draw(const __grid_constant__ Arguments a) {
  __shared__ u32 table[LEVELS];
  __shared__ float log_weights[LEVELS];
  __shared__ uint4 tile_codes[32][RUN / EACH];
  __shared__ u16 listed[32 * RUN];  // places in the tile
  const int lane = threadIdx.x, row = a.lines - 1 - (int)blockIdx.x;  // the longest first
  const i64 line = (i64)blockIdx.y * a.lines + row;
  const int edge = eligible(a, row);
  after_predecessor();
  #pragma unroll
  for (int i = 0; i < LEVELS; i += 32) {
    const int chance = a.chances[((i64)blockIdx.y * a.tables + (a.tables > 1 ? row : 0)) * LEVELS + i + lane];
    table[i + lane] = (u32)chance << TOP;
    log_weights[i + lane] = (UNIT - __log2f((float)chance)) * LN2;
  }
  __syncwarp();
  const u8 *codes = a.codes + line * a.room + RUN * lane;
  u32 carry = (u32)a.starts[line] << TOP;
  i64 place = a.offsets[line];
  uint4 next[RUN / EACH];
  #pragma unroll
  for (int i = 0; i < RUN / EACH; i++) next[i] = RUN * lane < edge ? *(const uint4 *)(codes + EACH * i) : make_uint4(0, 0, 0, 0);
  for (int tile = 0; tile < edge; tile += 32 * RUN) {
    const bool here = tile + RUN * lane < edge;  // of all the lane's keys or none
    u32 chance[RUN], sum = 0, bits = 0;
    #pragma unroll
    for (int i = 0; i < RUN; i++) chance[i] = at<2>(table, next[i / EACH], i % EACH), sum += chance[i];
    if (!here) sum = 0;
    #pragma unroll
    for (int i = 0; i < RUN / EACH; i++) {
      tile_codes[lane][i] = next[i];
      if (tile + RUN * (32 + lane) < edge) next[i] = *(const uint4 *)(codes + tile + 32 * RUN + EACH * i);
    }
    u32 upto = sum;  // of the lanes up to this one
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const u32 other = __shfl_up_sync(~0u, upto, o);
      if (lane >= o) upto += other;
    }
    u32 at_key = carry + upto - sum;
    carry += __shfl_sync(~0u, upto, 31);
    const u32 first = at_key >> 31;
    #pragma unroll
    for (int i = 0; i < RUN; i++) at_key += chance[i], bits = __funnelshift_l(at_key, bits, 1);
    u32 taken = here ? bits ^ (bits >> 1 | first << (RUN - 1)) : 0;  // the first key's bit on top
    const int many = __popc(taken);
    int before = many;
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int other = __shfl_up_sync(~0u, before, o);
      if (lane >= o) before += other;
    }
    const int all = __shfl_sync(~0u, before, 31);
    for (before -= many; taken; before++) {
      const int i = __clz(taken);
      listed[before] = (u16)(RUN * lane + i - (32 - RUN));
      taken ^= 0x80000000u >> i;
    }
    __syncwarp();
    const int fitting = (int)min((i64)all, a.capacity - place);
    for (int i = lane; i < fitting; i += 32) {
      const int j = listed[i];
      a.tokens[place + i] = tile + j;
      a.log_weights[place + i] = log_weights[((const u8 *)tile_codes)[j]];
    }
    place += all;
    __syncwarp();
  }
}
