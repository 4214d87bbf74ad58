// Counting codes of importance, and drawing keys by them: `count` and `draw` of `gpu.block_sampled` define both.
//
// 128 threads, 16 codes a thread at a time; grid (lines, heads) to count, (lines / 4, heads) to draw.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned char u8;

constexpr int THREADS = 128, EACH = 16, TILE = THREADS * EACH, LEVELS = 256, UNIT = 24;
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

// A warp draws a line, the longest first.
extern "C" __global__ void __launch_bounds__(THREADS) draw(const __grid_constant__ Arguments a) {
  __shared__ int tables[THREADS / 32][LEVELS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = a.lines - 1 - (int)(blockIdx.x * (THREADS / 32) + warp);
  if (row < 0) return;
  after_predecessor();
  const i64 line = (i64)blockIdx.y * a.lines + row, start = a.offsets[line];
  const int edge = (a.shift + row * 128) / 128 * 128;
  int *table = tables[warp];
  for (int i = lane; i < LEVELS; i += 32) table[i] = a.chances[((i64)blockIdx.y * a.tables + (a.tables > 1 ? row : 0)) * LEVELS + i];
  __syncwarp();
  const u8 *codes_of = a.codes + line * a.room + EACH * lane;
  i64 carry = a.starts[line];
  uint4 next = EACH * lane < edge ? *(const uint4 *)codes_of : make_uint4(0, 0, 0, 0);
  for (int tile = 0; tile < edge; tile += 32 * EACH) {
    const int first = tile + EACH * lane;
    const bool here = first < edge;
    const uint4 codes = next;
    if (first + 32 * EACH < edge) next = *(const uint4 *)(codes_of + tile + 32 * EACH);
    int chance[EACH], sum = 0;
    #pragma unroll
    for (int i = 0; i < EACH; i++) chance[i] = here ? table[code(codes, i)] : 0, sum += chance[i];
    i64 upto = sum;  // of the lanes up to this one
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const i64 other = __shfl_up_sync(~0u, upto, o);
      if (lane >= o) upto += other;
    }
    const i64 before = carry + upto - sum;
    carry += __shfl_sync(~0u, upto, 31);
    i64 place = start + (before >> UNIT);  // keys listed before
    u32 part = (u32)before & ((1u << UNIT) - 1), taken = 0;
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
      part += chance[i];
      taken |= (part >> UNIT) << i;
      part &= (1u << UNIT) - 1;
    }
    for (; taken; taken &= taken - 1, place++) {  // few of them
      const int i = __ffs(taken) - 1;
      if (place < a.capacity) {
        a.tokens[place] = first + i;
        a.log_weights[place] = (UNIT - __log2f((float)table[code(codes, i)])) * LN2;
      }
    }
  }
}
