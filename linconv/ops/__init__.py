"""The public functions of the operators, which are registered with torch.library (csrc/library.cpp)."""

from linconv.ops.bidirectional_ssd import bidirectional_ssd
from linconv.ops.conv_scan import conv_scan
from linconv.ops.dispatch import LinconvPerformanceWarning, backends
from linconv.ops.distillation_loss import (
    distillation_loss,
    distillation_terms,
    kd_loss,
    layerwise_mse,
    linear_kd_loss,
)
from linconv.ops.gated_rms_norm import gated_rms_norm
from linconv.ops.linformer import linformer_attention, linformer_self_attention
from linconv.ops.selective_scan import selective_scan
from linconv.ops.short_conv import bidirectional_short_conv, short_conv
from linconv.ops.ssd import ssd

__all__ = [
    "LinconvPerformanceWarning",
    "backends",
    "bidirectional_short_conv",
    "bidirectional_ssd",
    "conv_scan",
    "distillation_loss",
    "distillation_terms",
    "gated_rms_norm",
    "kd_loss",
    "layerwise_mse",
    "linear_kd_loss",
    "linformer_attention",
    "linformer_self_attention",
    "selective_scan",
    "short_conv",
    "ssd",
]
