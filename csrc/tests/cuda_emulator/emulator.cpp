#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

unsigned block_index = 0, block_size = 0, grid_size = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
enum class Wait { kNone, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false;
  Wait wait = Wait::kNone;
};

struct Engine {
  Options options;
  int64_t launches = 0;
  int device = 0;
  std::map<const void*, size_t> allowed;
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  size_t stack_count = 0;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  unsigned current = 0;
  const std::function<void()>* thread = nullptr;
  std::vector<double> shared;
  std::vector<uint64_t> lanes;
  std::vector<int> votes;
};
Engine engine;

void fiber_main() {
  (*engine.thread)();
  engine.fibers[engine.current].wait = Wait::kDone;
  _longjmp(engine.scheduler, 1);
}

// Back to the scheduler until the others have arrived.
void wait_for(Wait what) {
  Fiber& fiber = engine.fibers[engine.current];
  fiber.wait = what;
  if (_setjmp(fiber.state) == 0) _longjmp(engine.scheduler, 1);
}

// Not inlined: locals of a caller would be at the mercy of longjmp.
[[gnu::noipa]] void resume(unsigned index) {
  engine.current = index;
  Fiber& fiber = engine.fibers[index];
  fiber.wait = Wait::kNone;
  if (_setjmp(engine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Not inlined, like resume: getcontext counts as a function that returns twice.
[[gnu::noipa]] void prepare(unsigned index) {
  Fiber& fiber = engine.fibers[index];
  fiber.started = false;
  fiber.wait = Wait::kNone;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = engine.stacks + index * kStackBytes;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
}

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void run_block(uint64_t& random) {
  const unsigned count = block_size;
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = 0; i < count; ++i) prepare(i);
  for (;;) {
    if (engine.options.shuffle_seed != 0)
      for (unsigned i = count - 1; i > 0; --i) std::swap(order[i], order[next_random(random) % (i + 1)]);
    bool progressed = false;
    for (unsigned index : order)
      if (engine.fibers[index].wait == Wait::kNone) {
        resume(index);
        progressed = true;
      }
    // Whole warps at a warp barrier go on; then the block when all of it is at the block barrier.
    unsigned done = 0, at_block = 0;
    for (unsigned warp = 0; warp < count; warp += 32) {
      unsigned at_warp = 0;
      for (unsigned i = warp; i < warp + 32; ++i) {
        at_warp += engine.fibers[i].wait == Wait::kWarp;
        at_block += engine.fibers[i].wait == Wait::kBlock;
        done += engine.fibers[i].wait == Wait::kDone;
      }
      if (at_warp == 32) {
        for (unsigned i = warp; i < warp + 32; ++i) engine.fibers[i].wait = Wait::kNone;
        progressed = true;
      }
    }
    if (done == count) return;
    if (at_block == count) {
      for (Fiber& fiber : engine.fibers) fiber.wait = Wait::kNone;
      progressed = true;
    }
    if (!progressed)
      throw std::logic_error("emulated kernel: a barrier that not all threads reach (block " +
                             std::to_string(block_index) + ")");
  }
}

}  // namespace

Options& options() { return engine.options; }
int64_t launches() { return engine.launches; }
void* shared_memory() { return engine.shared.data(); }
unsigned thread_index() { return engine.current; }
void allow_shared(const void* kernel, size_t bytes) { engine.allowed[kernel] = bytes; }
size_t allowed_shared(const void* kernel) {
  auto found = engine.allowed.find(kernel);
  return std::max<size_t>(48 * 1024, found == engine.allowed.end() ? 0 : found->second);
}

void block_barrier() { wait_for(Wait::kBlock); }
void warp_barrier() { wait_for(Wait::kWarp); }

int block_or(int predicate) {
  engine.votes[engine.current] = predicate;
  block_barrier();
  int any = 0;
  for (unsigned i = 0; i < block_size; ++i) any |= engine.votes[i] != 0;
  block_barrier();
  return any;
}

uint64_t warp_exchange(uint64_t bits, unsigned source_lane) {
  engine.lanes[engine.current] = bits;
  warp_barrier();
  const uint64_t result = engine.lanes[engine.current / 32 * 32 + source_lane];
  warp_barrier();
  return result;
}

unsigned warp_ballot(bool predicate) {
  engine.lanes[engine.current] = predicate;
  warp_barrier();
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i)
    result |= static_cast<unsigned>(engine.lanes[engine.current / 32 * 32 + i]) << i;
  warp_barrier();
  return result;
}

cudaError_t run(const cudaLaunchConfig_t& config, size_t allowed, const std::function<void()>& thread) {
  block_size = config.blockDim.x;
  grid_size = config.gridDim.x;
  if (grid_size == 0 || block_size == 0 || block_size > 1024 || block_size % 32 != 0 ||
      config.dynamicSmemBytes > allowed)
    return cudaErrorInvalidValue;
  ++engine.launches;
  if (engine.stack_count < block_size) {
    if (engine.stacks != nullptr) munmap(engine.stacks, engine.stack_count * kStackBytes);
    engine.stack_count = block_size;
    engine.stacks = static_cast<char*>(mmap(nullptr, block_size * kStackBytes, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (engine.stacks == MAP_FAILED) throw std::bad_alloc();
  }
  engine.fibers.resize(block_size);
  engine.lanes.assign(block_size, 0);
  engine.votes.assign(block_size, 0);
  engine.thread = &thread;
  uint64_t random = engine.options.shuffle_seed;
  for (block_index = 0; block_index < grid_size; ++block_index) {
    // Exactly as large as asked for, so that an address checker sees what lies beyond.
    engine.shared.assign((config.dynamicSmemBytes + 7) / 8, std::numeric_limits<double>::quiet_NaN());
    engine.shared.shrink_to_fit();
    run_block(random);
  }
  return cudaSuccess;
}

}  // namespace emulator

using emulator::engine;

cudaError_t cudaGetDevice(int* device) {
  *device = engine.device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= engine.options.devices) return cudaErrorInvalidDevice;
  engine.device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = engine.options.devices;
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = engine.options.devices > 0 ? 13000 : 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "emulated on the host");
  properties->major = 9;
  properties->multiProcessorCount = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = engine.options.shared_limit;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t code) {
  return code == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidValue";
}
const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
