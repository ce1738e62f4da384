// Launching: sets the device for the call, checks every launch, never synchronises, allocates nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/check.h"
#include "cuda/ops.h"

namespace catapult::cuda {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t code, const char* op) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // a launch error would otherwise be reported again by the next op
  throw CudaError(std::string(op) + ": CUDA error " + std::to_string(static_cast<int>(code)) + " (" +
                  cudaGetErrorName(code) + "): " + cudaGetErrorString(code));
}

inline void check_version(const char* op, int version, int versions) {
  CATAPULT_CHECK(version >= 0 && version < versions,
                 op << ": expected a version from 0 to " << versions - 1 << ", got " << version);
}

// Where an op runs. The caller's current device is left as it was.
class Stream {
 public:
  Stream(const char* op, int device, std::uintptr_t stream)
      : op_(op), device_(device), stream_(reinterpret_cast<cudaStream_t>(stream)) {
    check(cudaGetDevice(&previous_), op_);
    if (previous_ != device_) check(cudaSetDevice(device_), op_);
  }
  ~Stream() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const char* op() const { return op_; }

  // A one-dimensional launch; no blocks, no launch.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              Arguments... arguments) const {
    launch_clusters(kernel, blocks, 1, threads, shared_bytes, arguments...);
  }

  // The same with blocks in clusters of cluster_size (at most 8, a divisor of blocks), which run at the
  // same time and reach each other's shared memory (cluster.cuh). More than one needs Hopper or later.
  template <typename... Parameters, typename... Arguments>
  void launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int cluster_size, int threads,
                       int64_t shared_bytes, Arguments... arguments) const {
    if (blocks == 0) return;
    CATAPULT_CHECK(cluster_size == 1 || capability() >= 9,
                   op_ << ": clusters of blocks need a GPU of compute capability 9.0, this one has "
                       << capability() << ".x; choose another version of this op");
    CATAPULT_CHECK(blocks > 0 && blocks <= kMaxBlocks,
                   op_ << ": the problem needs " << blocks << " blocks, the limit is " << kMaxBlocks);
    if (shared_bytes > kSharedWithoutAsking) {
      CATAPULT_CHECK(shared_bytes <= shared_limit(),
                     op_ << ": a block needs " << shared_bytes << " bytes of shared memory, this GPU has "
                         << shared_limit() << "; choose another version of this op");
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            op_);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = cluster_size > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), op_);
    check(cudaGetLastError(), op_);
  }

  // Bytes of shared memory that a block may ask for.
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  // Major number of the compute capability.
  int capability() const { return attribute(cudaDevAttrComputeCapabilityMajor); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_), op_);
    return value;
  }

  static constexpr int64_t kMaxBlocks = 2147483647;
  static constexpr int64_t kSharedWithoutAsking = 48 * 1024;
  const char* op_;
  int device_;
  int previous_ = 0;
  cudaStream_t stream_;
};

}  // namespace catapult::cuda
