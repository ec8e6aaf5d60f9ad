#include "common/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>

#include "common/pages.h"

namespace linconv {

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  require(false, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
          ", wanted Float, Double, BFloat16 or Half");
  return DType::kFloat32;
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat64: return ScalarType::Double;
    case DType::kBFloat16: return ScalarType::BFloat16;
    case DType::kFloat16: return ScalarType::Half;
  }
  return ScalarType::Undefined;
}

void require_strided(const Tensor& tensor, int64_t dims, const char* name) {
#if defined(LINCONV_CUDA)
  require(tensor.is_cuda(), name, " is not on a CUDA device");
#else
  require(tensor.is_cpu(), name, " is not on the CPU");
#endif
  require(tensor.layout() == torch::headeronly::Layout::Strided, name, " is not a strided tensor");
  require(tensor.dim() == dims, name, " has ", tensor.dim(), " dimensions, wanted ", dims);
  // Such as of a sharded parameter between its uses.
  require(tensor.data_ptr() != nullptr || tensor.numel() == 0, name, " has no memory: it has been freed");
}

static std::vector<int64_t> integers(const Tensor& tensor, const char* name) {
  require_strided(tensor, 1, name);
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Int || type == ScalarType::Long, name, " has dtype ", torch::headeronly::toString(type),
          ", wanted Int or Long");
  std::vector<int64_t> out(tensor.size(0));
  const int64_t stride = tensor.stride(0);
  const void* data = tensor.data_ptr();
  for (size_t i = 0; i < out.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * stride;
    out[i] = type == ScalarType::Int ? static_cast<const int32_t*>(data)[at] : static_cast<const int64_t*>(data)[at];
  }
  return out;
}

std::vector<Span> sequence_spans(const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                                 int64_t rows, int64_t frames) {
  require(!(seq_lens && cu_seqlens), "seq_lens and cu_seqlens are both given, wanted at most one");
  std::vector<Span> spans;
  if (cu_seqlens) {
    const std::vector<int64_t> bounds = integers(*cu_seqlens, "cu_seqlens");
    require(rows == 1, "cu_seqlens wants a batch of 1, got ", rows);
    require(!bounds.empty() && bounds.front() == 0 && bounds.back() == frames, "cu_seqlens wants to run from 0 to ",
            frames);
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      require(bounds[i] <= bounds[i + 1], "cu_seqlens decreases after element ", i);
      spans.push_back({0, bounds[i], bounds[i + 1]});
    }
    return spans;
  }
  std::vector<int64_t> lengths(rows, frames);
  if (seq_lens) lengths = integers(*seq_lens, "seq_lens");
  require(static_cast<int64_t>(lengths.size()) == rows, "seq_lens has ", lengths.size(), " elements, wanted ", rows);
  for (int64_t row = 0; row < rows; ++row) {
    require(lengths[row] >= 0 && lengths[row] <= frames, "seq_lens[", row, "] is ", lengths[row], ", wanted 0 to ", frames);
    spans.push_back({row, 0, lengths[row]});
  }
  return spans;
}

std::vector<Block> cut_into_blocks(const std::vector<Span>& spans, int64_t frames, int64_t frames_per_block) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans[i];
    const bool row_goes_on = i + 1 < spans.size() && spans[i + 1].row == span.row;
    const int64_t end = row_goes_on ? spans[i + 1].begin : frames;
    for (int64_t t = span.begin; t < end; t += frames_per_block)
      blocks.push_back({span.row, span.begin, span.end, t, std::min(t + frames_per_block, end)});
  }
  return blocks;
}

static bool poison() {
  const char* value = std::getenv("LINCONV_POISON");
  return value != nullptr && std::string(value) == "1";
}

static Tensor empty(const int64_t* sizes, size_t dims, DType dtype) {
#if defined(LINCONV_CUDA)
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA);
  Tensor out = torch::stable::empty({sizes, dims}, scalar_type(dtype), std::nullopt, device);
#else
  Tensor out = torch::stable::empty({sizes, dims}, scalar_type(dtype));
  prefer_large_pages(out.data_ptr(), out.numel() * element_size(dtype));
#endif
  static const bool poisoned = poison();
  if (poisoned) torch::stable::fill_(out, std::numeric_limits<double>::quiet_NaN());
  return out;
}

Tensor empty(std::initializer_list<int64_t> sizes, DType dtype) { return empty(sizes.begin(), sizes.size(), dtype); }

Tensor empty_as(const Tensor& other, DType dtype) { return empty(other.sizes().data(), other.dim(), dtype); }

}  // namespace linconv
