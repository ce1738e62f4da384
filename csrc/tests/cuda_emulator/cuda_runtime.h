// Stands in for the CUDA headers so that the kernels and launchers of csrc/cuda compile as plain C++
// and run on the host: for checking their logic where there is no GPU. Clusters (of one block, unless a
// launch asks for more) run one after the other; the threads of a cluster are fibers that switch at
// barriers, in an order that can be shuffled, so that a missing barrier changes results. Shared memory
// starts as NaN in every block and is NaN again when the block has ended. Asynchronous copies happen as
// late as they may: in the wait that promises them. Barriers that not all threads reach, misaligned
// copies, and launches the hardware would refuse, are errors.
#pragma once

#define CATAPULT_CUDA_EMULATOR

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

// ---- the part of the runtime that the launchers use

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};

namespace emulator {

struct Options {
  uint64_t shuffle_seed = 0;      // 0: threads run in order
  int shared_limit = 227 * 1024;  // bytes a block may ask for
  int devices = 1;
  int capability = 9;  // major number of the compute capability
};
Options& options();
int64_t launches();  // since the program started

void* shared_memory();
unsigned thread_index();  // of the running fiber, in its block
unsigned block_index();
extern unsigned block_size, grid_size;
void block_barrier();
int block_or(int predicate);
void warp_barrier();
uint64_t warp_exchange(uint64_t bits, unsigned source_lane);
unsigned warp_ballot(bool predicate);
// What every lane of the warp gives, `bytes` each (at most sizeof(Lane)): lane i is at [i] until the next
// call.
struct alignas(8) Lane {
  std::byte bytes[64];
};
const Lane* warp_gather(const void* mine, size_t bytes);

// Clusters: the rank of the running block, a barrier of all blocks, and where a shared address of the
// running block lies in another one.
unsigned cluster_rank();
void cluster_barrier();
void* cluster_address(const void* own, unsigned rank);

// Asynchronous copies of the running thread; bytes beyond source_bytes become zero.
void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes);
void commit_copies();
void wait_copies(unsigned groups_left);

// Products of a warp on the tensor cores; fragments as in csrc/cuda/mma.cuh. The model of TF32: the sum of
// the accumulator and all eight products is exact, then rounded toward zero to float32.
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);
void mma_f64(double (&d)[4], const double (&a)[4], const double (&b)[2]);

cudaError_t run(const cudaLaunchConfig_t& config, size_t allowed_shared, const std::function<void()>& thread);
void allow_shared(const void* kernel, size_t bytes);
size_t allowed_shared(const void* kernel);

}  // namespace emulator

struct EmulatedIndex {
  unsigned (*get)();
  operator unsigned() const { return get(); }
};
struct EmulatedIndex3 {
  EmulatedIndex x;
};
inline const EmulatedIndex3 threadIdx{{[] { return emulator::thread_index(); }}};
inline const EmulatedIndex3 blockIdx{{[] { return emulator::block_index(); }}};
inline const EmulatedIndex3 blockDim{{[] { return emulator::block_size; }}};

inline void __syncthreads() { emulator::block_barrier(); }
inline int __syncthreads_or(int predicate) { return emulator::block_or(predicate); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::warp_barrier(); }
inline unsigned __ballot_sync(unsigned, bool predicate) { return emulator::warp_ballot(predicate); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::warp_exchange(bits, (emulator::thread_index() % 32) ^ static_cast<unsigned>(mask));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int atomicOr(int* address, int value) {
  int old = *address;
  *address |= value;
  return old;
}
using std::isfinite;
using std::isnan;
using std::min;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t code);
const char* cudaGetErrorString(cudaError_t code);
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > emulator::options().shared_limit) return cudaErrorInvalidValue;
  emulator::allow_shared(kernel, static_cast<size_t>(value));
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "limit of kernel arguments");
  return emulator::run(*config, emulator::allowed_shared(reinterpret_cast<const void*>(kernel)),
                       [&] { kernel(arguments...); });
}
