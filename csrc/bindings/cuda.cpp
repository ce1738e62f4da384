#include <cuda_runtime.h>

#include <array>
#include <vector>

#include "bindings/bindings.h"
#include "core/check.h"
#include "cuda/ops.h"

namespace py = pybind11;

namespace catapult::bindings {

namespace {

using Address = std::uintptr_t;
using Operand = std::tuple<Address, int64_t, int64_t, Address, int64_t, int64_t, int64_t>;
using Layer = std::tuple<Operand, Operand, int64_t, int64_t, double, double>;

cuda::GramOperand operand(const Operand& o) {
  const auto& [a, a_stride, a_column_stride, b, b_stride, b_output_stride, b_column_stride] = o;
  return {pointer(a), a_stride, a_column_stride, pointer(b), b_stride, b_output_stride, b_column_stride};
}

// A problem with the storage that it points to.
struct GramCall {
  std::vector<cuda::GramLayer> layers;
  cuda::Gram problem;
};

GramCall gram(int dtype, bool symmetric, int64_t n, int64_t m, int64_t c, const std::vector<Layer>& layers,
              Address kernel, int64_t kernel_stride, bool accumulate, int version) {
  GramCall call;
  for (const auto& [x, z, a_columns, b_columns, scale, beta] : layers)
    call.layers.push_back({operand(x), operand(z), a_columns, b_columns, scale, beta});
  call.problem = {static_cast<DType>(dtype),
                  symmetric,
                  n,
                  m,
                  c,
                  call.layers.data(),
                  static_cast<int64_t>(call.layers.size()),
                  pointer(kernel),
                  kernel_stride,
                  accumulate,
                  version};
  return call;
}

// in, out, weight, its stride, weight scale, bias or 0, bias scale, slope, whether weight and bias are
// trained.
using Link = std::tuple<int64_t, int64_t, Address, int64_t, double, Address, double, double, bool, bool>;

// As GramCall.
struct ChainCall {
  std::vector<ChainLayer> layers;
  std::vector<int64_t> batch_sizes, observed;
  cuda::ChainSteps problem;
};

ChainCall chain(int dtype, const std::vector<Link>& links, Address x, int64_t n, int64_t x_stride,
                int64_t x_column_stride, Address y, int64_t y_stride, Address batch_index, Address rates,
                const std::vector<int64_t>& batch_sizes, const std::vector<int64_t>& observed,
                double loss_limit, double tol, Address losses, Address lambda_1, int gram_version,
                int norm_version) {
  CATAPULT_CHECK(!links.empty() && batch_sizes.size() == observed.size(),
                 "_C.cuda_chain_sgd: expected layers, and a flag for each batch size, got "
                     << links.size() << " layers, " << observed.size() << " flags and " << batch_sizes.size()
                     << " sizes");
  ChainCall call;
  for (const auto& [in, out, weight, stride, weight_scale, bias, bias_scale, slope, trains_weight,
                    trains_bias] : links)
    call.layers.push_back({in, out, pointer(weight), stride, weight_scale, pointer(bias), bias_scale,
                           trains_weight, trains_bias, slope});
  call.batch_sizes = batch_sizes;
  call.observed = observed;
  call.problem = {static_cast<DType>(dtype),
                  call.layers.data(),
                  static_cast<int64_t>(call.layers.size()),
                  pointer(x),
                  n,
                  x_stride,
                  x_column_stride,
                  pointer(y),
                  y_stride,
                  static_cast<const int64_t*>(pointer(batch_index)),
                  static_cast<const double*>(pointer(rates)),
                  call.batch_sizes.data(),
                  call.observed.data(),
                  static_cast<int64_t>(call.batch_sizes.size()),
                  loss_limit,
                  tol,
                  pointer(losses),
                  pointer(lambda_1),
                  gram_version,
                  norm_version};
  return call;
}

cuda::Context context(int device, Address stream, Address status, Address workspace) {
  return {device, stream, static_cast<int*>(pointer(status)), pointer(workspace)};
}

// What this machine offers: {"driver", "runtime", "devices", "reason"}; an empty reason means usable.
py::dict cuda_status() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t code = cudaGetDeviceCount(&count);
  cudaGetLastError();
  auto version = [](int number) {
    return number == 0 ? std::string()
                       : std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  std::string reason;
  py::list devices;
  if (code == cudaErrorInsufficientDriver && driver > 0) {
    reason = "the CUDA driver (" + version(driver) + ") is older than the runtime compiled in (" +
             version(runtime) + "): no usable device";
  } else if (code == cudaErrorInsufficientDriver || code == cudaErrorNoDevice) {
    reason = driver == 0 ? "no CUDA driver: no usable device" : "no CUDA device";
  } else if (code != cudaSuccess) {
    reason = std::string("CUDA error ") + cudaGetErrorName(code) + ": " + cudaGetErrorString(code);
  } else {
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties;
      if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
      devices.append(std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                     std::to_string(properties.minor));
    }
  }
  py::dict status;
  status["driver"] = version(driver);
  status["runtime"] = version(runtime);
  status["devices"] = devices;
  status["reason"] = reason;
  return status;
}

// Each op twice: how much workspace (nothing is launched), and the launch itself.
template <typename Problem, typename... Fields>
void bind_op(py::module_& module, const char* name, int64_t (*workspace_bytes)(const Problem&),
             void (*launch)(const Problem&, const cuda::Context&), Problem (*make)(Fields...)) {
  module.def((std::string("cuda_") + name + "_workspace").c_str(),
             [=](Fields... fields) { return workspace_bytes(make(fields...)); });
  module.def((std::string("cuda_") + name).c_str(),
             [=](int device, Address stream, Address status, Address workspace, Fields... fields) {
               py::gil_scoped_release release;
               launch(make(fields...), context(device, stream, status, workspace));
             });
}

// The same of ChainSteps, whose workspace depends on the device.
template <typename... Fields>
void bind_chain(py::module_& module, ChainCall (*make)(Fields...)) {
  module.def("cuda_chain_sgd_workspace", [=](int device, Fields... fields) {
    return cuda::chain_sgd_workspace_bytes(make(fields...).problem, device);
  });
  module.def("cuda_chain_sgd",
             [=](int device, Address stream, Address status, Address workspace, Fields... fields) {
               py::gil_scoped_release release;
               cuda::launch_chain_sgd(make(fields...).problem, context(device, stream, status, workspace));
             });
}

cuda::JacobianTile jacobian_tile(int dtype, int64_t rows, int64_t columns, Address tile, int64_t tile_stride,
                                 int64_t tile_column_stride, Address kernel, int64_t kernel_stride,
                                 Address weight, int64_t weight_stride, Address grad, int version) {
  return {static_cast<DType>(dtype),
          rows,
          columns,
          pointer(tile),
          tile_stride,
          tile_column_stride,
          pointer(kernel),
          kernel_stride,
          pointer(weight),
          weight_stride,
          pointer(grad),
          version};
}

// shape: n, c, in, height, width, out, out_height, out_width; geometry: groups, kernel, stride, padding,
// dilation.
cuda::JacobianConv2d jacobian_conv2d(int dtype, std::vector<int64_t> shape, std::vector<int64_t> geometry,
                                     Address input, std::vector<int64_t> input_strides, Address b,
                                     std::vector<int64_t> b_strides, double scale, Address kernel,
                                     int64_t kernel_stride, Address weight, int64_t weight_stride,
                                     Address grad, int64_t tile_bytes, int version) {
  cuda::JacobianConv2d problem{};
  problem.dtype = static_cast<DType>(dtype);
  const std::array<int64_t*, 8> sizes{&problem.n,     &problem.c,   &problem.in,         &problem.height,
                                      &problem.width, &problem.out, &problem.out_height, &problem.out_width};
  for (size_t i = 0; i < sizes.size(); ++i) *sizes[i] = shape.at(i);
  const std::array<int64_t*, 9> numbers{&problem.groups,   &problem.kernel_h,   &problem.kernel_w,
                                        &problem.stride_h, &problem.stride_w,   &problem.pad_h,
                                        &problem.pad_w,    &problem.dilation_h, &problem.dilation_w};
  for (size_t i = 0; i < numbers.size(); ++i) *numbers[i] = geometry.at(i);
  problem.input = pointer(input);
  for (size_t i = 0; i < 4; ++i) problem.input_strides[i] = input_strides.at(i);
  problem.b = pointer(b);
  for (size_t i = 0; i < 5; ++i) problem.b_strides[i] = b_strides.at(i);
  problem.scale = scale;
  problem.kernel = pointer(kernel);
  problem.kernel_stride = kernel_stride;
  problem.weight = pointer(weight);
  problem.weight_stride = weight_stride;
  problem.grad = pointer(grad);
  problem.tile_bytes = tile_bytes;
  problem.version = version;
  return problem;
}

cuda::Agop agop(int dtype, int64_t rows, int64_t d, Address g, int64_t g_stride, int64_t g_column_stride,
                double scale, Address agop, int64_t agop_stride, int version) {
  return {static_cast<DType>(dtype),
          rows,
          d,
          pointer(g),
          g_stride,
          g_column_stride,
          scale,
          pointer(agop),
          agop_stride,
          version};
}

cuda::Inner inner(int dtype, int64_t g_rows, int64_t h_rows, int64_t d, Address g, int64_t g_stride,
                  int64_t g_column_stride, Address h, int64_t h_stride, int64_t h_column_stride,
                  Address result) {
  return {static_cast<DType>(dtype),
          g_rows,
          h_rows,
          d,
          pointer(g),
          g_stride,
          g_column_stride,
          pointer(h),
          h_stride,
          h_column_stride,
          static_cast<double*>(pointer(result))};
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_status", &cuda_status);

  module.def("cuda_ntk_gram_workspace", [](int dtype, bool symmetric, int64_t n, int64_t m, int64_t c,
                                           const std::vector<Layer>& layers, Address kernel,
                                           int64_t kernel_stride, bool accumulate, int version) {
    return cuda::ntk_gram_workspace_bytes(
        gram(dtype, symmetric, n, m, c, layers, kernel, kernel_stride, accumulate, version).problem);
  });
  module.def("cuda_ntk_gram", [](int device, Address stream, Address status, Address workspace, int dtype,
                                 bool symmetric, int64_t n, int64_t m, int64_t c,
                                 const std::vector<Layer>& layers, Address kernel, int64_t kernel_stride,
                                 bool accumulate, int version) {
    py::gil_scoped_release release;
    const GramCall call = gram(dtype, symmetric, n, m, c, layers, kernel, kernel_stride, accumulate, version);
    cuda::launch_ntk_gram("ntk_gram", call.problem, context(device, stream, status, workspace));
  });
  bind_op(module, "jacobian_tile", &cuda::jacobian_tile_workspace_bytes, &cuda::launch_jacobian_tile,
          &jacobian_tile);
  bind_op(module, "jacobian_conv2d", &cuda::jacobian_conv2d_workspace_bytes, &cuda::launch_jacobian_conv2d,
          &jacobian_conv2d);
  bind_op(module, "agop_reduce", &cuda::agop_reduce_workspace_bytes, &cuda::launch_agop_reduce, &agop);
  bind_op(module, "agop_inner", &cuda::agop_inner_workspace_bytes, &cuda::launch_agop_inner, &inner);

  // The eigensolvers ask the device how much shared memory a block may have.
  module.def("cuda_topk_eigh_workspace",
             [](int device, int dtype, int64_t batch, int64_t n, int64_t k, int version) {
               cuda::Eigh problem{};
               problem.dtype = static_cast<DType>(dtype);
               problem.batch = batch;
               problem.n = n;
               problem.k = k;
               problem.version = version;
               return cuda::topk_eigh_workspace_bytes(problem, device);
             });
  module.def(
      "cuda_topk_eigh",
      [](int device, Address stream, Address status, Address workspace, int dtype, int64_t batch, int64_t n,
         int64_t k, Address kernel, int64_t kernel_batch_stride, int64_t kernel_stride, Address start,
         int64_t start_columns, double tol, Address values, Address vectors, Address residuals, int version) {
        py::gil_scoped_release release;
        cuda::launch_topk_eigh({static_cast<DType>(dtype), batch, n, k, pointer(kernel), kernel_batch_stride,
                                kernel_stride, pointer(start), start_columns, tol, pointer(values),
                                pointer(vectors), pointer(residuals), version},
                               context(device, stream, status, workspace));
      });
  module.def("cuda_spectral_norm_workspace",
             [](int device, int dtype, int64_t batch, int64_t n, int version) {
               cuda::Norm problem{};
               problem.dtype = static_cast<DType>(dtype);
               problem.batch = batch;
               problem.n = n;
               problem.version = version;
               return cuda::spectral_norm_workspace_bytes(problem, device);
             });
  module.def("cuda_spectral_norm",
             [](int device, Address stream, Address status, Address workspace, int dtype, int64_t batch,
                int64_t n, Address kernel, int64_t kernel_batch_stride, int64_t kernel_stride, double tol,
                Address values, int version) {
               py::gil_scoped_release release;
               cuda::launch_spectral_norm({static_cast<DType>(dtype), batch, n, pointer(kernel),
                                           kernel_batch_stride, kernel_stride, tol, pointer(values), version},
                                          context(device, stream, status, workspace));
             });
  bind_chain(module, &chain);
}

}  // namespace catapult::bindings
