// What the kernels for Hopper's tensor cores share: barriers, copies, and products of tiles in shared memory.
//
// A tile is 128 rows of D 16-bit numbers, in halves of 128-byte rows whose 16-byte pieces are exchanged by the row's last
// three bits, as wgmma's 128-byte swizzle wants them; it begins at a multiple of 1024 bytes.
//
// Compiled with: D 64 or 128, BF16.

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

// The launch's start may overlap the end of the one before, whose writes are to be seen.
__device__ __forceinline__ void after_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
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
// c (64, 128) += a (64, 16) b^T, both in shared memory by rows.
__device__ __forceinline__ void product(float (&c)[64], u64 a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16." KIND
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
      " %64, %65, p, 1, 1, 0, 0;}"
      : F8(c, 0), F8(c, 8), F8(c, 16), F8(c, 24), F8(c, 32), F8(c, 40), F8(c, 48), F8(c, 56)
      : "l"(a), "l"(b), "r"(add));
}
template <int N> __device__ __forceinline__ void pinned(float (&c)[N]) {  // in these registers from here on
  #pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void finish() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void see_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Of a producer's 128 threads: rows of a tile that the warps' lanes name, lane `listed` row `listed` of those that the
// warp asks for; a few at a time, so that none waits for the one before.
struct Gather {
  int chunk, listed; u32 own;
  __device__ __forceinline__ Gather(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    chunk = lane % CHUNKS;
    listed = ONCE * warp + lane % ONCE + 4 * ONCE * (lane / ONCE);
    own = piece(ONCE * warp + lane / CHUNKS, chunk);  // in every pass alike: passes are whole eights of rows
  }
  __device__ __forceinline__ void operator()(u32 tile, const u16 *from, u32 bytes, int index) const {
    #pragma unroll
    for (int some = 0; some < PASSES; some += BATCH) {
      u64 at[BATCH];
      #pragma unroll
      for (int i = 0; i < BATCH; i++)
        at[i] = (u64)(from + 8 * chunk) + (u64)(u32)__shfl_sync(~0u, index, ONCE * (some + i) + threadIdx.x % 32 / CHUNKS) * bytes;
      #pragma unroll
      for (int i = 0; i < BATCH; i++)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(tile + own + (some + i) * 4 * ONCE * 128), "l"(at[i]) : "memory");
    }
  }
  __device__ __forceinline__ void rows(u32 tile, const u16 *row) const {  // a row's address instead of its number
    #pragma unroll
    for (int some = 0; some < PASSES; some++)
      copy16(tile + own + some * 4 * ONCE * 128, (const u16 *)__shfl_sync(~0u, (u64)row, ONCE * some + threadIdx.x % 32 / CHUNKS) + 8 * chunk, 16);
  }
};
