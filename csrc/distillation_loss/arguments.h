// What cpu.cpp and cuda.cu check of their arguments.
#pragma once

#include "common/tensor.h"
#include "distillation_loss/kernel.h"

namespace linconv {

using Tensors = std::vector<Tensor>;

// The layers of hidden states (batch, L, d), gradients not yet wanted.
inline std::vector<LayerPair> read_layers(const Tensors& student, const Tensors& teacher) {
  require(student.size() == teacher.size(), "teacher has ", teacher.size(), " tensors, wanted ", student.size());
  std::vector<LayerPair> layers;
  for (size_t i = 0; i < student.size(); ++i) {
    LayerPair pair;
    pair.student = view<3>(student[i], "student");
    pair.teacher = view<3>(teacher[i], "teacher");
    const auto& size = pair.student.size;
    require_sizes(pair.student, {student[0].size(0), student[0].size(1), size[2]}, "student");
    require_sizes(pair.teacher, {size[0], size[1], size[2]}, "teacher");
    require(size[2] >= 1, "student has rows of no elements, wanted at least 1");
    layers.push_back(pair);
  }
  return layers;
}

inline bool in_double(const View<3>& student, const View<3>& teacher) {
  return student.dtype == DType::kFloat64 || teacher.dtype == DType::kFloat64;
}
inline bool in_double(const std::vector<LayerPair>& layers) {
  bool any = false;
  for (const LayerPair& layer : layers) any |= in_double(layer.student, layer.teacher);
  return any;
}

// A mask of bool, (batch, L).
inline bool is_bool(const Tensor& mask) { return mask.scalar_type() == ScalarType::Bool; }
inline void require_bool_mask(const Tensor& mask, int64_t batch, int64_t frames, const char* name) {
  require_strided(mask, 2, name);
  require(mask.size(0) == batch && mask.size(1) == frames, name, " is (", mask.size(0), ", ", mask.size(1), "), wanted (",
          batch, ", ", frames, ")");
}

// Logits of both sides, into anything with a `student`, a `teacher` and a `temperature`; returns whether there are any.
template <class Args>
bool read_logits(Args& args, const std::optional<Tensor>& student, const std::optional<Tensor>& teacher, double temperature) {
  require(student.has_value() == teacher.has_value(), "student_logits and teacher_logits: one is absent");
  if (!student) return false;
  args.student = view<3>(student, "student_logits");
  args.teacher = view<3>(teacher, "teacher_logits");
  const auto& size = args.student.size;
  require_sizes(args.teacher, {size[0], size[1], size[2]}, "teacher_logits");
  require(size[2] >= 1, "student_logits has no classes, wanted at least 1");
  require(temperature > 0, "temperature is ", temperature, ", wanted a number above 0");
  args.temperature = temperature;
  return true;
}

// (rows, kStatistics).
inline double* read_statistics(const Tensor& statistics, int64_t rows, const char* name) {
  const View<2> known = view<2>(statistics, name);
  require_sizes(known, {rows, kStatistics}, name);
  require(known.dtype == DType::kFloat64 && statistics.is_contiguous(), name, " wants Double, contiguous");
  return static_cast<double*>(known.data);
}

// `count` factors on gradients.
inline View<1> read_factors(const Tensor& tensor, int64_t count, const char* name) {
  const View<1> factors = view<1>(tensor, name);
  require(factors.size[0] == count, name, " has ", factors.size[0], " elements, wanted ", count);
  require(factors.dtype == DType::kFloat32 || factors.dtype == DType::kFloat64, name, " wants dtype Float or Double");
  return factors;
}

// An empty tensor, and a view without data, for a gradient that is not wanted.
template <int N>
Tensor gradient(bool wanted, const View<N>& of, const Tensor& like, View<N>& out) {
  if (!wanted) return empty({0}, of.dtype);
  Tensor made = empty_as(like, of.dtype);
  out = view<N>(made, "gradient");
  return made;
}

}  // namespace linconv
