#include <algorithm>
#include <tuple>

#include "common/tasks.h"
#include "distillation_loss/arguments.h"

namespace linconv {
namespace {

constexpr int64_t kOperations = 16;  // of a class of a row of logits, about

// Which of (batch, L) rows count, and how many.
struct Rows {
  std::vector<uint8_t> valid;  // empty: all
  int64_t count = 0;

  const uint8_t* data() const { return valid.empty() ? nullptr : valid.data(); }
};

// mask: bool (batch, L), or lengths, int32 or int64 (batch,).
Rows valid_rows(const std::optional<Tensor>& mask, int64_t batch, int64_t frames, const char* name) {
  Rows rows;
  rows.count = batch * frames;
  if (!mask) return rows;
  rows.valid.resize(batch * frames);
  if (is_bool(*mask)) {
    require_bool_mask(*mask, batch, frames, name);
    const auto* data = static_cast<const bool*>(mask->data_ptr());
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < frames; ++t) rows.valid[b * frames + t] = data[b * mask->stride(0) + t * mask->stride(1)];
  } else {
    for (const Span& span : sequence_spans(mask, std::nullopt, batch, frames))
      std::fill_n(rows.valid.begin() + span.row * frames, span.end, uint8_t(1));
  }
  rows.count = std::count(rows.valid.begin(), rows.valid.end(), uint8_t(1));
  return rows;
}

// Hidden states and which rows of them count, re-checked.
struct HiddenStates {
  std::vector<LayerPair> layers;
  Rows rows;
  std::vector<Block> blocks;
  LayerArgs args{};

  HiddenStates(const Tensors& student, const Tensors& teacher, const std::optional<Tensor>& mask, bool layer_norm)
      : layers(read_layers(student, teacher)) {
    args.in_double = in_double(layers);
    if (!layers.empty()) {
      const int64_t batch = layers[0].student.size[0], frames = layers[0].student.size[1];
      rows = valid_rows(mask, batch, frames, "mask");
      blocks = cut_into_blocks(sequence_spans(std::nullopt, std::nullopt, batch, frames), frames, kLossFrames);
    }
    args.layers = layers.data();
    args.layer_count = static_cast<int64_t>(layers.size());
    args.layer_norm = layer_norm;
    args.valid = rows.data();
    args.blocks = blocks.data();
    args.block_count = static_cast<int64_t>(blocks.size());
  }
  int64_t tasks() const { return args.layer_count * args.block_count; }
  DType math() const { return args.in_double ? DType::kFloat64 : DType::kFloat32; }
};

struct Logits {
  Rows rows;
  LogitArgs args{};
  int64_t tasks = 0;

  Logits(const std::optional<Tensor>& student, const std::optional<Tensor>& teacher, const std::optional<Tensor>& mask,
         double temperature) {
    if (!read_logits(args, student, teacher, temperature)) return;
    args.in_double = in_double(args.student, args.teacher);
    const auto& size = args.student.size;
    rows = valid_rows(mask, size[0], size[1], "logits_mask");
    args.valid = rows.data();
    tasks = size[0] * size[1];
  }
  Logits(const Logits&) = delete;
  DType math() const { return args.in_double ? DType::kFloat64 : DType::kFloat32; }
  int64_t operations() const { return kOperations * tasks * args.student.size[2]; }
};

std::vector<double> values(const Tensor& tensor, int64_t count, const char* name) {
  const View<1> v = read_factors(tensor, count, name);
  std::vector<double> out(count);
  for (int64_t i = 0; i < count; ++i)
    out[i] = v.dtype == DType::kFloat64 ? *static_cast<double*>(at(v, i)) : *static_cast<float*>(at(v, i));
  return out;
}

void put(const Tensor& tensor, int64_t i, double value) {
  if (tensor.scalar_type() == ScalarType::Double) static_cast<double*>(tensor.data_ptr())[i] = value;
  else static_cast<float*>(tensor.data_ptr())[i] = static_cast<float>(value);
}

// Both halves in one launch.
template <class Layers, class Rows_>
void launch(const HiddenStates& hidden, const Logits& logits, Layers on_layers, Rows_ on_logits) {
  const auto layers = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(layer_scratch(hidden.args));
    on_layers(scratch.data(), begin, end);
  };
  const auto rows = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(logit_scratch());
    on_logits(scratch.data(), begin, end);
  };
  run_together({{hidden.tasks(), layers}, {logits.tasks, rows, logits.operations()}});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(
    Tensors student, Tensors teacher, std::optional<Tensor> mask, bool layer_norm, std::optional<Tensor> student_logits,
    std::optional<Tensor> teacher_logits, std::optional<Tensor> logits_mask, double temperature) {
  HiddenStates hidden(student, teacher, mask, layer_norm);
  Logits logits(student_logits, teacher_logits, logits_mask, temperature);
  std::vector<double> partial(2 * hidden.tasks());
  Tensor statistics = empty({logits.tasks, kStatistics}, DType::kFloat64);
  hidden.args.partial = partial.data();
  logits.args.statistics = static_cast<double*>(statistics.data_ptr());
  launch(
      hidden, logits, [&](void* s, int64_t b, int64_t e) { LINCONV_PICK(layers_forward)(hidden.args, s, b, e); },
      [&](void* s, int64_t b, int64_t e) { LINCONV_PICK(logits_forward)(logits.args, s, b, e); });

  // Sums in the order of the rows, whatever the number of threads.
  Tensor errors = empty({hidden.args.layer_count}, hidden.math());
  Tensor cosines = empty({hidden.args.layer_count}, hidden.math());
  for (int64_t i = 0; i < hidden.args.layer_count; ++i) {
    double error = 0, cosine = 0;
    for (int64_t b = 0; b < hidden.args.block_count; ++b) {
      const double* block = partial.data() + 2 * (i * hidden.args.block_count + b);
      error += block[0], cosine += block[1];
    }
    const double count = static_cast<double>(std::max<int64_t>(1, hidden.rows.count));
    put(errors, i, error / count);
    put(cosines, i, cosine / count);
  }
  Tensor kd = empty({1}, logits.math());
  double sum = 0;
  for (int64_t row = 0; row < logits.tasks; ++row) sum += logits.args.statistics[row * kStatistics + kStatistics - 1];
  put(kd, 0, sum / static_cast<double>(std::max<int64_t>(1, logits.rows.count)));
  return {errors, cosines, kd, statistics};
}

std::tuple<Tensors, Tensors, Tensor, Tensor> distillation_loss_backward(
    Tensor grad_errors, Tensor grad_kd, Tensors student, Tensors teacher, std::optional<Tensor> mask, bool layer_norm,
    std::optional<Tensor> student_logits, std::optional<Tensor> teacher_logits, std::optional<Tensor> logits_mask,
    double temperature, Tensor statistics, bool of_student, bool of_teacher, bool of_student_logits,
    bool of_teacher_logits) {
  HiddenStates hidden(student, teacher, mask, layer_norm);
  Logits logits(student_logits, teacher_logits, logits_mask, temperature);
  const std::vector<double> upstream = values(grad_errors, hidden.args.layer_count, "grad_errors");
  Tensors student_gradients, teacher_gradients;
  int64_t bytes = 0;
  for (size_t i = 0; i < hidden.layers.size(); ++i) {
    LayerPair& layer = hidden.layers[i];
    const double elements = static_cast<double>(std::max<int64_t>(1, hidden.rows.count)) * layer.student.size[2];
    layer.scale = 2 * upstream[i] / elements;
    if (of_student) bytes += student[i].numel() * element_size(layer.student.dtype);
    student_gradients.push_back(gradient(of_student, layer.student, student[i], layer.grad_student));
    teacher_gradients.push_back(gradient(of_teacher, layer.teacher, teacher[i], layer.grad_teacher));
  }
  constexpr int64_t kCached = 16 << 20;  // about what a last-level cache leaves one user
  hidden.args.stream = bytes > kCached;
  const std::vector<double> kd = values(grad_kd, 1, "grad_kd");
  const double scale = kd[0] / static_cast<double>(std::max<int64_t>(1, logits.rows.count));
  const Tensor none = empty({0}, DType::kFloat32);
  Tensor student_gradient = none, teacher_gradient = none;
  if (student_logits) {
    logits.args.statistics = read_statistics(statistics, logits.tasks, "statistics");
    logits.args.scale = &scale;
    student_gradient = gradient(of_student_logits, logits.args.student, *student_logits, logits.args.grad_student);
    teacher_gradient = gradient(of_teacher_logits, logits.args.teacher, *teacher_logits, logits.args.grad_teacher);
  }
  launch(
      hidden, logits, [&](void* s, int64_t b, int64_t e) { LINCONV_PICK(layers_backward)(hidden.args, s, b, e); },
      [&](void* s, int64_t b, int64_t e) { LINCONV_PICK(logits_backward)(logits.args, s, b, e); });
  return {student_gradients, teacher_gradients, student_gradient, teacher_gradient};
}

// The same for a tile of (rows, classes) logits: what is known of each row after these classes too.
Tensor kd_statistics(Tensor student, Tensor teacher, std::optional<Tensor> before, double temperature) {
  const Tensor s = torch::stable::unsqueeze(student, 0), t = torch::stable::unsqueeze(teacher, 0);
  Logits logits(s, t, std::nullopt, temperature);
  if (before) logits.args.before = read_statistics(*before, logits.tasks, "before");
  Tensor statistics = empty({logits.tasks, kStatistics}, DType::kFloat64);
  logits.args.statistics = static_cast<double*>(statistics.data_ptr());
  const auto forward = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(logit_scratch());
    LINCONV_PICK(logits_forward)(logits.args, scratch.data(), begin, end);
  };
  run({logits.tasks, forward, logits.operations()});
  return statistics;
}

// The gradient of scale[row] * KL of each row by the student's logits, given the statistics over all classes.
Tensor kd_gradient(Tensor student, Tensor teacher, Tensor statistics, Tensor scale, double temperature) {
  const Tensor s = torch::stable::unsqueeze(student, 0), t = torch::stable::unsqueeze(teacher, 0);
  Logits logits(s, t, std::nullopt, temperature);
  const std::vector<double> scales = values(scale, logits.tasks, "scale");
  logits.args.statistics = read_statistics(statistics, logits.tasks, "statistics");
  logits.args.scale = scales.data();
  logits.args.scale_stride = 1;
  Tensor out = empty_as(student, logits.args.student.dtype);
  logits.args.grad_student = view<3>(torch::stable::unsqueeze(out, 0), "gradient");
  const auto backward = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(logit_scratch());
    LINCONV_PICK(logits_backward)(logits.args, scratch.data(), begin, end);
  };
  run({logits.tasks, backward, logits.operations()});
  return out;
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("distillation_loss", TORCH_BOX(&linconv::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&linconv::distillation_loss_backward));
  m.impl("kd_statistics", TORCH_BOX(&linconv::kd_statistics));
  m.impl("kd_gradient", TORCH_BOX(&linconv::kd_gradient));
}
