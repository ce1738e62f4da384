#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

unsigned block_size = 0, grid_size = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kLargestCluster = 8;  // that every device with clusters can run
enum class Wait { kNone, kBlock, kWarp, kCluster, kDone };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, source_bytes;
  size_t group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false;
  Wait wait = Wait::kNone;
  std::vector<Copy> copies;  // issued, not yet carried out
  size_t groups = 0;         // committed
  unsigned gathers = 0;
};

struct Engine {
  Options options;
  int64_t launches = 0;
  int device = 0;
  std::map<const void*, size_t> allowed;
  std::vector<Fiber> fibers;  // of one cluster, block by block
  char* stacks = nullptr;
  size_t stack_count = 0;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  unsigned current = 0;
  unsigned first_block = 0;  // of the running cluster
  std::string failure;       // of a fiber, which cannot throw
  const std::function<void()>* thread = nullptr;
  std::vector<std::vector<double>> shared;  // of each block of the cluster
  std::vector<Lane> lanes[2];
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

// An error of the running fiber: the scheduler throws it, and the fiber does not come back.
[[noreturn]] void fail(const std::string& message) {
  engine.failure = message + " (block " + std::to_string(block_index()) + ", thread " +
                   std::to_string(thread_index()) + ")";
  _longjmp(engine.scheduler, 1);
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
  fiber.copies.clear();
  fiber.groups = 0;
  fiber.gathers = 0;
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

// Threads that wait for `what` among [first, first + count).
unsigned waiting(Wait what, unsigned first, unsigned count) {
  unsigned number = 0;
  for (unsigned i = first; i < first + count; ++i) number += engine.fibers[i].wait == what;
  return number;
}

void run_cluster(uint64_t& random) {
  const unsigned count = static_cast<unsigned>(engine.fibers.size());
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = 0; i < count; ++i) prepare(i);
  for (;;) {
    if (engine.options.shuffle_seed != 0)
      for (unsigned i = count - 1; i > 0; --i) std::swap(order[i], order[next_random(random) % (i + 1)]);
    // Shuffled, one block of a cluster advances at a time: it may end long before the others.
    const bool one_block = engine.options.shuffle_seed != 0 && waiting(Wait::kNone, 0, count) > 0;
    unsigned block = 0;
    if (one_block) do {
        block = static_cast<unsigned>(next_random(random) % (count / block_size));
      } while (waiting(Wait::kNone, block * block_size, block_size) == 0);
    bool progressed = false;
    for (unsigned index : order)
      if (engine.fibers[index].wait == Wait::kNone && !(one_block && index / block_size != block)) {
        resume(index);
        if (!engine.failure.empty()) throw std::logic_error("emulated kernel: " + engine.failure);
        progressed = true;
      }
    // Groups of threads that are all at their barrier go on: warps, blocks, the cluster.
    auto release = [&](Wait what, unsigned first, unsigned threads) {
      if (waiting(what, first, threads) != threads) return;
      for (unsigned i = first; i < first + threads; ++i) engine.fibers[i].wait = Wait::kNone;
      progressed = true;
    };
    for (unsigned warp = 0; warp < count; warp += 32) release(Wait::kWarp, warp, 32);
    for (unsigned first = 0; first < count; first += block_size) {
      release(Wait::kBlock, first, block_size);
      if (waiting(Wait::kDone, first, block_size) == block_size) {
        // Whoever still reads it sees that it is gone.
        std::vector<double>& shared = engine.shared[first / block_size];
        std::fill(shared.begin(), shared.end(), std::numeric_limits<double>::quiet_NaN());
      }
    }
    release(Wait::kCluster, 0, count);
    if (waiting(Wait::kDone, 0, count) == count) return;
    if (!progressed)
      throw std::logic_error("emulated kernel: a barrier that not all threads reach (block " +
                             std::to_string(engine.first_block) + ")");
  }
}

}  // namespace

Options& options() { return engine.options; }
int64_t launches() { return engine.launches; }
void* shared_memory() { return engine.shared[engine.current / block_size].data(); }
unsigned thread_index() { return engine.current % block_size; }
unsigned block_index() { return engine.first_block + engine.current / block_size; }
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
  const unsigned first = engine.current / block_size * block_size;
  int any = 0;
  for (unsigned i = first; i < first + block_size; ++i) any |= engine.votes[i] != 0;
  block_barrier();
  return any;
}

const Lane* warp_gather(const void* mine, size_t bytes) {
  // Two buffers in turn: who writes one again has passed the barrier behind its last readers.
  std::vector<Lane>& lanes = engine.lanes[engine.fibers[engine.current].gathers++ % 2];
  std::memcpy(lanes[engine.current].bytes, mine, bytes);
  warp_barrier();
  return &lanes[engine.current / 32 * 32];
}

uint64_t warp_exchange(uint64_t bits, unsigned source_lane) {
  const Lane* lanes = warp_gather(&bits, sizeof(bits));
  std::memcpy(&bits, lanes[source_lane].bytes, sizeof(bits));
  return bits;
}

unsigned warp_ballot(bool predicate) {
  const Lane* lanes = warp_gather(&predicate, sizeof(predicate));
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(lanes[lane].bytes[0]) << lane;
  return result;
}

unsigned cluster_rank() { return engine.current / block_size; }
void cluster_barrier() { wait_for(Wait::kCluster); }

void* cluster_address(const void* own, unsigned rank) {
  if (rank >= engine.shared.size()) fail("a block of rank " + std::to_string(rank) + " that does not exist");
  const std::ptrdiff_t offset =
      static_cast<const std::byte*>(own) - static_cast<const std::byte*>(shared_memory());
  return reinterpret_cast<std::byte*>(engine.shared[rank].data()) + offset;
}

void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(shared_memory());
  const uintptr_t to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (to % bytes != 0 || from % bytes != 0)
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes that is not aligned to them");
  if (to < begin || to + bytes > begin + engine.shared[engine.current / block_size].size() * sizeof(double))
    fail("an asynchronous copy beyond the shared memory");
  if (source_bytes > bytes) fail("an asynchronous copy with more source than target");
  Fiber& fiber = engine.fibers[engine.current];
  fiber.copies.push_back({shared, global, bytes, source_bytes, fiber.groups});
}

void commit_copies() { ++engine.fibers[engine.current].groups; }

void wait_copies(unsigned groups_left) {
  Fiber& fiber = engine.fibers[engine.current];
  auto copy = fiber.copies.begin();
  for (; copy != fiber.copies.end() && copy->group + groups_left < fiber.groups; ++copy) {
    std::memset(copy->to, 0, copy->bytes);
    std::memcpy(copy->to, copy->from, copy->source_bytes);
  }
  fiber.copies.erase(fiber.copies.begin(), copy);
}

cudaError_t run(const cudaLaunchConfig_t& config, size_t allowed, const std::function<void()>& thread) {
  block_size = config.blockDim.x;
  grid_size = config.gridDim.x;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config.attrs[i].val.clusterDim.x;
  if (grid_size == 0 || block_size == 0 || block_size > 1024 || block_size % 32 != 0 ||
      config.dynamicSmemBytes > allowed || cluster == 0 || cluster > kLargestCluster ||
      grid_size % cluster != 0 || (cluster > 1 && engine.options.capability < 9))
    return cudaErrorInvalidValue;
  ++engine.launches;
  const unsigned count = cluster * block_size;
  if (engine.stack_count < count) {
    if (engine.stacks != nullptr) munmap(engine.stacks, engine.stack_count * kStackBytes);
    engine.stack_count = count;
    engine.stacks = static_cast<char*>(mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (engine.stacks == MAP_FAILED) throw std::bad_alloc();
  }
  engine.fibers.resize(count);
  for (std::vector<Lane>& lanes : engine.lanes) lanes.resize(count);
  engine.votes.assign(count, 0);
  engine.thread = &thread;
  engine.failure.clear();
  uint64_t random = engine.options.shuffle_seed;
  for (engine.first_block = 0; engine.first_block < grid_size; engine.first_block += cluster) {
    // Exactly as large as asked for, so that an address checker sees what lies beyond.
    engine.shared.clear();
    for (unsigned rank = 0; rank < cluster; ++rank)
      engine.shared.emplace_back((config.dynamicSmemBytes + 7) / 8, std::numeric_limits<double>::quiet_NaN());
    run_cluster(random);
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
  properties->major = engine.options.capability;
  properties->multiProcessorCount = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? engine.options.capability
                                                          : engine.options.shared_limit;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t code) {
  return code == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidValue";
}
const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
