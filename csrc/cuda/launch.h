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
    if (blocks == 0) return;
    CATAPULT_CHECK(blocks > 0 && blocks <= kMaxBlocks,
                   op_ << ": the problem needs " << blocks << " blocks, the limit is " << kMaxBlocks);
    if (shared_bytes > kSharedWithoutAsking)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            op_);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), op_);
    check(cudaGetLastError(), op_);
  }

  // Bytes of shared memory that a block may ask for.
  int64_t shared_limit() const {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), op_);
    return bytes;
  }

 private:
  static constexpr int64_t kMaxBlocks = 2147483647;
  static constexpr int64_t kSharedWithoutAsking = 48 * 1024;
  const char* op_;
  int device_;
  int previous_ = 0;
  cudaStream_t stream_;
};

}  // namespace catapult::cuda
