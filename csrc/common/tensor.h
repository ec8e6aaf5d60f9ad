// Between torch's tensors and what kernels see of them. For cpu.cpp and cuda.cu: kernel.cpp includes no torch header.
//
// Compiled into each library for its own device: with LINCONV_CUDA tensors are in CUDA memory, without in CPU memory.
//
// The Python side has already raised a ValueError or TypeError on bad arguments; what is checked here, again, is what is
// dereferenced, for callers of torch.ops.linconv.* itself.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/view.h"

namespace linconv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A part of a message, a number or text. No stream: where a compiler links its C++ library in, a second one beside
// torch's, a stream does not find how to write numbers and the process may crash.
template <class Part>
std::string text(const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) return std::to_string(part);
  else return std::string(part);
}

// Throws (a RuntimeError in Python) unless ok; the parts make the message.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) throw std::runtime_error((text(parts) + ...));
}

DType dtype_of(const Tensor& tensor, const char* name);
ScalarType scalar_type(DType dtype);

// The dtype that kernels compute in: float64 for float64, else float32.
inline DType math_type(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Throws unless the tensor is in memory of the library's device, strided, and of N dimensions.
void require_strided(const Tensor& tensor, int64_t dims, const char* name);

template <int N>
View<N> view(const Tensor& tensor, const char* name) {
  require_strided(tensor, N, name);
  View<N> out;
  out.dtype = dtype_of(tensor, name);
  out.data = tensor.data_ptr();
  for (int i = 0; i < N; ++i) {
    out.size[i] = tensor.size(i);
    out.stride[i] = tensor.stride(i);
  }
  return out;
}

// An absent tensor is a view without data.
template <int N>
View<N> view(const std::optional<Tensor>& tensor, const char* name) {
  return tensor ? view<N>(*tensor, name) : View<N>{};
}

// Throws unless the view's sizes are the given ones.
template <int N>
void require_sizes(const View<N>& view, const int64_t (&sizes)[N], const char* name) {
  for (int i = 0; i < N; ++i)
    require(view.size[i] == sizes[i], name, " has size ", view.size[i], " in dimension ", i, ", wanted ", sizes[i]);
}

// The sequences of a batch of `rows` rows of `frames` frames: one per row of that length; one per row, cut to seq_lens
// (rows,); or those that cu_seqlens (sequences + 1,) packs into the only row. int32 or int64, any stride.
std::vector<Span> sequence_spans(const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                                 int64_t rows, int64_t frames);

// Those sequences, and the padding behind each, cut into blocks of at most `frames_per_block` frames counted from the
// sequence's own first: how a sequence is cut does not depend on what else is in the batch.
std::vector<Block> cut_into_blocks(const std::vector<Span>& spans, int64_t frames, int64_t frames_per_block);

// A new contiguous tensor on the library's (current) device, not initialised; filled with NaN where the environment has LINCONV_POISON=1, by which tests
// see that every element of a result is written.
Tensor empty(std::initializer_list<int64_t> sizes, DType dtype);
Tensor empty_as(const Tensor& other, DType dtype);  // with the sizes of another

}  // namespace linconv
